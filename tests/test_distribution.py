"""The wheel and the sdist hold the package, whole, and are built without a warning; the wheel is built of the sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.egg-info")
_ABOUT = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py", "MANIFEST.in"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, and what the build said."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("fasttrain", "kernels", "pipelines", "tests"):
        shutil.copytree(_ROOT / folder, source / folder, symlinks=True, ignore=_NO_SOURCE)
    for name in _ABOUT:
        shutil.copy(_ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built[0].glob("fasttrain-*.whl")
    with zipfile.ZipFile(file) as content:
        yield content


def _package():
    """Every file of the package, those of the root folders that are linked into it included."""
    found = set()
    for folder, _, names in os.walk(_ROOT / "fasttrain", followlinks=True):
        inside = Path(folder).relative_to(_ROOT)
        found |= {str(inside / name) for name in names if not name.endswith((".pyc", ".md"))}
    return found


def test_the_build_says_no_warning(built):
    said = [line for line in built[1].splitlines() if re.search("warning|deprecat|would be ignored", line, re.I)]
    assert said == []


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    about = {name for name in wheel.namelist() if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in about} >= {"licenses/LICENSE", "entry_points.txt", "METADATA"}
    assert set(wheel.namelist()) - about == _package()
    assert {
        "fasttrain/kernels/vmf.py",
        "fasttrain/config/recipes/demo/dino.yaml",
        "fasttrain/report/page.html",
    } <= _package()


def test_the_sdist_holds_what_the_wheel_is_built_of(built):
    (file,) = built[0].glob("fasttrain-*.tar.gz")
    with tarfile.open(file) as content:
        members = [member for member in content.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no link that leads nowhere
    names = {member.name.partition("/")[2] for member in members}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == _package() | _ABOUT


def test_what_is_installed_runs_outside_of_the_repository(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = "import sys, fasttrain.cli; print(fasttrain.__file__); sys.exit(fasttrain.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--method", "dino", "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where, method, *_ = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert method == "method: dino"
