"""Docstrings name things by Sphinx's roles, which Markdown does not know: leave the name in code, drop the role."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>|`|<span)")


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles."""
    return _ROLE.sub("", html)
