"""Imports flow one way, the links are there, and the packages are what they say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ROOT = Path(__file__).parent.parent
_FOLDERS = ("kernels", "pipelines", "fasttrain")
_FILES = [path for folder in _FOLDERS for path in sorted((_ROOT / folder).rglob("*.py"))]
# rglob follows no links, so a file of kernels/ or pipelines/ is listed once.


def _module(path):
    """The dotted name under which a file is imported."""
    parts = list(path.relative_to(_ROOT).with_suffix("").parts)
    if parts[0] != "fasttrain":
        parts.insert(0, "fasttrain")
    return ".".join(parts)


def _imports(path):
    """Absolute names of everything that a file imports, inside functions too."""
    package = _module(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def _of(folder):
    return [path for path in _FILES if path.relative_to(_ROOT).parts[0] == folder]


def _inside(name, package):
    return name == package or name.startswith(package + ".")


def test_the_files_are_found():
    names = {_module(path) for path in _FILES}
    assert {"fasttrain.kernels.vmf", "fasttrain.pipelines.dali", "fasttrain.evaluate.knn"} <= names
    assert len(names) == len(_FILES)
    assert "fasttrain.kernels.collectives.gather_rows" in _imports(_ROOT / "kernels" / "entropy.py")


def test_kernels_import_nothing_of_the_others():
    wrong = {
        (path.name, name)
        for path in _of("kernels")
        for name in _imports(path)
        if _inside(name, "fasttrain") and not _inside(name, "fasttrain.kernels")
    }
    assert wrong == set()


def test_pipelines_import_nothing_of_the_others():
    wrong = {
        (path.name, name)
        for path in _of("pipelines")
        for name in _imports(path)
        if _inside(name, "fasttrain") and not _inside(name, "fasttrain.pipelines")
    }
    assert wrong == set()


def test_losses_import_kernels_only():
    files = [path for path in _FILES if _module(path).startswith("fasttrain.losses.")]
    assert len(files) > 5
    ours = {(path.name, name) for path in files for name in _imports(path) if _inside(name, "fasttrain")}
    allowed = ("fasttrain.losses", "fasttrain.kernels")
    assert {(file, name) for file, name in ours if not any(_inside(name, a) for a in allowed)} == set()


def test_no_file_takes_the_folders_for_top_level_packages():
    files = [*_FILES, *(_ROOT / "tests").rglob("*.py"), *(_ROOT / "bench").rglob("*.py")]
    wrong = {(path.name, n) for path in files for n in _imports(path) if n.split(".")[0] in ("kernels", "pipelines")}
    assert wrong == set()


@pytest.mark.parametrize("package", ["fasttrain.kernels", "fasttrain.losses"])
def test_kernels_and_losses_alone_load_nothing_of_the_trainer(package):
    heavy = "deepspeed nvidia.dali timm pydantic yaml rich mlxtend tensorboard apex".split()  # noqa: SIM905
    code = f"import sys, {package}; print(*(n for n in {heavy} if n in sys.modules), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("name", ["kernels", "pipelines"])
def test_the_links_are_relative_and_lead_to_the_root_folders(name):
    link = _ROOT / "fasttrain" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").samefile(_ROOT / name / "__init__.py")


def test_every_operator_family_has_its_reference():
    families = [p for p in (_ROOT / "kernels").iterdir() if p.is_dir() and not p.name.startswith(("_", "."))]
    assert {"similarity", "prototypes", "sinkhorn"} <= {family.name for family in families}
    assert [family.name for family in families if not (family / "reference.py").is_file()] == []


def test_dependencies():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    assert {_name(entry) for entry in project["dependencies"]} == {"torch", "triton", "numpy"}
    extras = {_name(entry) for entries in project["optional-dependencies"].values() for entry in entries}
    assert {"deepspeed", "timm", "mlxtend"} <= extras
    assert "apex" not in extras  # on PyPI that name is another project's


def _name(requirement):
    for end in "<>=!~[; ":
        requirement = requirement.partition(end)[0]
    return requirement.lower()


def test_no_file_is_longer_than_350_lines():
    lengths = {str(path.relative_to(_ROOT)): len(path.read_text().splitlines()) for path in _FILES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
