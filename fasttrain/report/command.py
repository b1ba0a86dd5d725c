"""``fasttrain report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..distributed import prepare_environment


def main(arguments: Sequence[str]) -> int:
    """Draw what the arguments ask for; returns the exit status, 2 for what cannot be used."""
    if "--views" not in arguments:
        print("fasttrain: report needs --views, and a training's flags beside it", file=sys.stderr)
        return 2
    prepare_environment()
    from ..config import ConfigError
    from ..pipelines import DataError
    from .views import main as views

    try:
        return views([word for word in arguments if word != "--views"])
    except (ConfigError, DataError) as error:
        print(f"fasttrain: {error}", file=sys.stderr)
        return 2
