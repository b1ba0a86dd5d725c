"""Methods: one file per paper, and the interface with which a package or a file outside adds its own.

A method subclasses :class:`Method` and is registered with :func:`register`. See ``examples/own_method.py``.
"""

from .base import Method, Objective, Step, Task
from .bound import PrototypeMethod, SphereMethod, SphereSettings
from .branch import Branch, Network
from .registry import load, load_plugin, names, register

__all__ = [
    "Branch",
    "Method",
    "Network",
    "Objective",
    "PrototypeMethod",
    "SphereMethod",
    "SphereSettings",
    "Step",
    "Task",
    "load",
    "load_plugin",
    "names",
    "register",
]
