"""Remove Sphinx's roles from the pages: docstrings use them, and Markdown does not know them."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>|`|<span)")


def on_page_content(html: str, **_: Any) -> str:
    """Return the page without the roles. The names stay in code."""
    return _ROLE.sub("", html)
