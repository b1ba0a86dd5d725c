"""onnxruntime gives the network's features for batches of every size."""

from dataclasses import replace
from importlib import util

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.cli import main
from fasttrain.errors import ConfigError
from fasttrain.export.onnx import write_onnx
from fasttrain.pretrained import from_run, from_timm

onnxruntime = pytest.importorskip("onnxruntime")


def _exported(tmp_path, *source):
    file = tmp_path / "n.onnx"
    assert main(["export", *map(str, source), "--format", "onnx", "--output", str(file)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["run", "test_vit"])
def test_batches_of_any_size(simclr_run, tmp_path, name):
    session = _exported(tmp_path, *([simclr_run] if name == "run" else ["--timm", name]))
    network, size = (from_run(simclr_run).network, 32) if name == "run" else (from_timm(name).network, 160)
    for batch in np.random.default_rng().integers(1, 20, 4):
        images = torch.randn(int(batch), 3, size, size)
        (found,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network(images), rtol=1e-4, atol=1e-4)


def test_without_the_packages_a_line_says_what_to_type(simclr_run, tmp_path, capsys, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name.startswith("onnx") else find(name, *more))
    assert main(["export", str(simclr_run), "--format", "onnx", "--output", str(tmp_path / "n.onnx")]) == 2
    line = "--format onnx needs onnx, onnxruntime, onnxscript; type: pip install 'fasttrain[export]'\n"
    assert capsys.readouterr().err.endswith(line)
    assert list(tmp_path.iterdir()) == []


class _Branching(nn.Module):
    """Which way it goes depends on the pixels."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images if images.sum() > 0 else -images)


def test_what_torch_cannot_trace_is_one_line_that_says_why(tmp_path):
    backbone = from_timm("test_vit")
    branching = replace(backbone, network=_Branching(backbone.network))
    why = "torch cannot write test_vit as ONNX: Could not guard on data-dependent .*; choose another"
    with pytest.raises(ConfigError, match=f"^{why} --format$"):
        write_onnx(branching, tmp_path / "n.onnx")
