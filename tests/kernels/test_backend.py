import pytest
import torch

from fasttrain.kernels.backend import choose_backend


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        ({}, "auto", "cpu"),
        ({}, "eager", "eager"),
        ({"FASTTRAIN_BACKEND": "eager"}, "auto", "eager"),
        ({"FASTTRAIN_BACKEND": "eager"}, "cpu", "cpu"),  # an argument overrides the environment
        ({"TRITON_INTERPRET": "1"}, "triton", "triton"),
    ],
)
def test_backend_is_chosen(environment, argument, expected, monkeypatch):
    for name in ("FASTTRAIN_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_backend(argument, torch.zeros(1)) == expected


@pytest.mark.parametrize(
    ("name", "value", "argument", "dtype", "message"),
    [
        ("FASTTRAIN_BACKEND", "cuda", "auto", torch.float32, "'cuda' .*FASTTRAIN_BACKEND"),
        ("TRITON_INTERPRET", "0", "triton", torch.float32, "got cpu.*TRITON_INTERPRET"),
        ("TRITON_INTERPRET", "1", "triton", torch.float64, r"got torch\.float64"),
    ],
)
def test_impossible_backend_is_an_error(name, value, argument, dtype, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^backend .*{message}"):
        choose_backend(argument, torch.zeros(1, dtype=dtype))
