"""Test that every name that bench/ imports exists, also in functions that only run in a measurement."""

import ast
import importlib

import pytest

from bench import ROOT

_MODULES = sorted(path for path in (ROOT / "bench").rglob("*.py") if "tests" not in path.parts)


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imported_names_exist(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            name = f"{package}.{node.module}" if node.level else node.module
            if name.split(".")[0] in ("fasttrain", "bench", "tests"):
                module = importlib.import_module(name)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                for alias in missing:  # a submodule
                    importlib.import_module(f"{name}.{alias}")
