"""The wheel and the sdist hold the whole package, from a checkout, a GitHub zip, and a clone without symbolic links."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parent.parent
_NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.egg-info")
_ABOUT = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py", "MANIFEST.in"}


def _build(source, output, *options):
    """Build in a folder of sources; return what the build printed."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), *options, str(source)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _wheel_files(folder):
    """Return the names in a wheel, without those about the distribution."""
    (file,) = folder.glob("fasttrain-*.whl")
    with zipfile.ZipFile(file) as content:
        return {name for name in content.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist of the working tree, and what the build printed."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("fasttrain", "kernels", "pipelines", "tests"):
        shutil.copytree(_ROOT / folder, source / folder, symlinks=True, ignore=_NO_SOURCE)
    for name in _ABOUT:
        shutil.copy(_ROOT / name, source)
    return output, _build(source, output)


def _package():
    """Return every file of the package, including files of the linked root folders."""
    names = set()
    for folder, _, files in os.walk(_ROOT / "fasttrain", followlinks=True):
        inside = Path(folder).relative_to(_ROOT)
        names |= {str(inside / name) for name in files if not name.endswith((".pyc", ".md"))}
    return names


def test_build_prints_no_warning(built):
    lines = [line for line in built[1].splitlines() if re.search("warning|deprecat|would be ignored", line, re.I)]
    assert lines == []


def test_wheel_holds_the_package_and_nothing_else(built):
    assert _wheel_files(built[0]) == _package()
    (file,) = built[0].glob("fasttrain-*.whl")
    with zipfile.ZipFile(file) as content:
        about = {name.partition("/")[2] for name in content.namelist() if ".dist-info/" in name}
    assert about >= {"licenses/LICENSE", "entry_points.txt", "METADATA"}
    expected = {"kernels/vmf.py", "pipelines/sources/open.py", "config/recipes/demo/dino.yaml", "report/page.html"}
    assert {f"fasttrain/{name}" for name in expected} <= _package()


def test_sdist_holds_what_the_wheel_is_built_of(built):
    (file,) = built[0].glob("fasttrain-*.tar.gz")
    with tarfile.open(file) as content:
        members = [member for member in content.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no dangling link
    names = {member.name.partition("/")[2] for member in members}
    generated = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    roots = {
        re.sub(r"^fasttrain/(kernels|pipelines)/", r"\1/", name) if name not in names else name for name in _package()
    }
    assert names - generated == roots | _ABOUT


@pytest.mark.skipif(not (_ROOT / ".git").exists(), reason="needs a git checkout")
def test_github_zip_builds_the_same_wheel(tmp_path):
    """pip unpacks a zip's symbolic links as text files."""
    archive = tmp_path / "main.zip"
    subprocess.run(["git", "-C", str(_ROOT), "archive", "--format=zip", "-o", str(archive), "HEAD"], check=True)
    source = tmp_path / "source"
    with zipfile.ZipFile(archive) as content:
        content.extractall(source)
    assert (source / "fasttrain/kernels").is_file()
    _build(source, tmp_path / "dist", "--wheel")
    tracked = subprocess.run(["git", "-C", str(_ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    kernels = {f"fasttrain/{name}" for name in tracked.split() if re.match(r"(kernels|pipelines)/.*\.py$", name)}
    assert kernels <= _wheel_files(tmp_path / "dist") | {"fasttrain/kernels", "fasttrain/pipelines"}


@pytest.mark.skipif(not (_ROOT / ".git").exists(), reason="needs a git checkout")
def test_clone_without_symlinks_builds_the_same_wheel(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "-c", "core.symlinks=false", str(_ROOT), str(source)], check=True)
    assert (source / "fasttrain/kernels").is_file()
    _build(source, tmp_path / "dist", "--wheel")
    files = _wheel_files(tmp_path / "dist")
    assert {"fasttrain/kernels/vmf.py", "fasttrain/pipelines/sources/open.py"} <= files
    assert "fasttrain/config/recipes/demo/dino.yaml" in files


def test_installed_package_runs_outside_the_repository(built, tmp_path):
    (file,) = built[0].glob("fasttrain-*.whl")
    with zipfile.ZipFile(file) as content:
        content.extractall(tmp_path / "site")
    code = "import sys, fasttrain.cli; print(fasttrain.__file__); sys.exit(fasttrain.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--method", "dino", "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    path, method, *_ = done.stdout.splitlines()
    assert Path(path).is_relative_to(tmp_path / "site")
    assert method == "method: dino"
