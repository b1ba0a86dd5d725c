"""onnxruntime gives the network's features for batches of every size."""

from dataclasses import replace
from importlib import util

import pytest
import torch
from torch import nn

from fasttrain.errors import ConfigError
from fasttrain.export.onnx import write_onnx
from fasttrain.export.write import write_export
from fasttrain.pretrained import from_run, from_timm

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["run", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_onnx_gives_the_same_features_for_any_batch(simclr_run, tmp_path, name):
    backbone = from_run(simclr_run) if name == "run" else from_timm(name)
    write_export(backbone, tmp_path / "n.onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "n.onnx"), providers=["CPUExecutionProvider"])
    for batch in (4, 11, 18):
        images = torch.randn(batch, 3, backbone.blueprint.size, backbone.blueprint.size)
        (features,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), backbone.network(images), rtol=1e-4, atol=1e-4)


def test_onnx_without_its_packages_is_refused(simclr_run, tmp_path, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name.startswith("onnx") else find(name, *more))
    with pytest.raises(ConfigError, match=r"--format: .*onnx, onnxruntime, onnxscript.*fasttrain\[export\]"):
        write_export(from_run(simclr_run), tmp_path / "n.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


class _Branching(nn.Module):
    """A network whose operations depend on the pixels."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images if images.sum() > 0 else -images)


def test_onnx_names_the_reason_that_torch_cannot_trace(tmp_path):
    backbone = from_timm("test_vit")
    branching = replace(backbone, network=_Branching(backbone.network))
    with pytest.raises(ConfigError, match="--format: .*test_vit.*Could not guard on data-dependent"):
        write_onnx(branching, tmp_path / "n.onnx")
