import pytest
import torch

from fasttrain.kernels.backend import choose_backend


def test_the_device_decides_unless_told(monkeypatch):
    monkeypatch.delenv("FASTTRAIN_BACKEND", raising=False)
    assert choose_backend("auto", torch.zeros(1)) == "cpu"
    assert choose_backend("eager", torch.zeros(1)) == "eager"
    monkeypatch.setenv("FASTTRAIN_BACKEND", "eager")
    assert choose_backend("auto", torch.zeros(1)) == "eager"
    assert choose_backend("cpu", torch.zeros(1)) == "cpu"  # an argument is nearer than the environment


def test_a_wrong_name_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("FASTTRAIN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"got 'cuda' \(argument or FASTTRAIN_BACKEND\)"):
        choose_backend("auto", torch.zeros(1))


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", torch.zeros(1)) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        choose_backend("triton", torch.zeros(1))


def test_triton_takes_no_fp64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"got torch\.float64; use backend='cpu'"):
        choose_backend("triton", torch.zeros(1, dtype=torch.float64))
