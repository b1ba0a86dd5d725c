"""The import order of the packages, as data, and what the packaging says about them."""

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

ORDER = (
    ("run",),
    ("api", "cli"),
    ("report",),
    ("training",),
    ("evaluate", "export"),
    ("pretrained",),
    ("checkpoint", "plan"),
    ("engine",),
    ("config",),
    ("methods",),
    ("models",),
    ("losses",),
    ("kernels",),
)
"""A module may import from packages further down, and from its own package."""
GROUND = ("distributed", "optim", "pipelines", "errors", "flags", "files")
"""Packages that every package may import. They import each other only."""
ALONE = {"kernels": set(), "pipelines": {"errors"}, "errors": set(), "losses": {"kernels"}}
"""Packages with fewer dependencies than their place in the order allows: they are used without the trainer."""


def _module(path):
    """Return the dotted name under which a file is imported."""
    parts = list(path.relative_to(_ROOT).with_suffix("").parts)
    if parts[0] != "fasttrain":
        parts.insert(0, "fasttrain")
    return ".".join(parts)


def _imports(path):
    """Return the absolute names of everything that a file imports, inside functions too."""
    package = _module(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def _edges():
    """Return (package, imported package, file) for every import between packages of fasttrain."""
    packages = {name for level in ORDER for name in level} | set(GROUND)
    for path in _FILES:
        own = _module(path).split(".")[1]
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "fasttrain" and len(parts) > 1 and parts[1] in packages and parts[1] != own:
                yield own, parts[1], path.relative_to(_ROOT).as_posix()


def test_every_package_has_a_place_in_the_order():
    entries = {path.stem for path in (_ROOT / "fasttrain").iterdir() if not path.name.startswith(("_", "."))}
    assert entries - {"py"} == {name for level in ORDER for name in level} | set(GROUND)


def test_imports_follow_the_declared_order():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    wrong = set()
    for own, other, file in _edges():
        if own == "__init__":
            continue
        upwards = other not in GROUND and (own in GROUND or level[other] <= level[own])
        if upwards or (own in ALONE and other not in ALONE[own]):
            wrong.add((file, other))
    assert wrong == set()


def test_package_imports_nothing_but_the_api_and_errors():
    assert {other for own, other, _ in _edges() if own == "__init__"} == {"api", "errors"}


def test_root_has_at_most_nine_modules():
    modules = list((_ROOT / "fasttrain").glob("*.py"))
    assert len(modules) <= 9


def test_files_are_searched_as_modules():
    names = {_module(path) for path in _FILES}
    assert {"fasttrain.kernels.vmf", "fasttrain.pipelines.dali", "fasttrain.evaluate.knn"} <= names
    assert len(names) == len(_FILES)
    assert "fasttrain.kernels.collectives.gather_rows" in _imports(_ROOT / "kernels" / "entropy.py")


def test_no_file_imports_the_folders_as_top_level_packages():
    files = [*_FILES, *(_ROOT / "tests").rglob("*.py"), *(_ROOT / "bench").rglob("*.py")]
    wrong = {(path.name, n) for path in files for n in _imports(path) if n.split(".")[0] in ("kernels", "pipelines")}
    assert wrong == set()


@pytest.mark.parametrize("package", ["fasttrain.kernels", "fasttrain.losses"])
def test_kernels_and_losses_load_nothing_of_the_trainer(package):
    heavy = "deepspeed nvidia.dali timm pydantic yaml rich mlxtend tensorboard apex".split()  # noqa: SIM905
    code = f"import sys, {package}; print(*(n for n in {heavy} if n in sys.modules), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_every_operator_family_has_its_reference():
    families = [p for p in (_ROOT / "kernels").iterdir() if p.is_dir() and not p.name.startswith(("_", "."))]
    assert {"similarity", "prototypes", "sinkhorn"} <= {family.name for family in families}
    assert [family.name for family in families if not (family / "reference.py").is_file()] == []


def test_dependencies_are_those_of_the_contract():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    assert {_name(entry) for entry in project["dependencies"]} == {"torch", "triton", "numpy"}
    extras = {_name(entry) for entries in project["optional-dependencies"].values() for entry in entries}
    assert {"deepspeed", "timm", "mlxtend"} <= extras
    assert "apex" not in extras  # on PyPI that name is another project's


def _name(requirement):
    for end in "<>=!~[; ":
        requirement = requirement.partition(end)[0]
    return requirement.lower()
