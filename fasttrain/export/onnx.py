"""Export as ONNX: images [batch, C, size, size] to features [batch, D] for any batch, checked by onnxruntime."""

from __future__ import annotations

import logging
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pretrained import Backbone
from .check import check_same, random_images

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_LARGEST = 2**31 - 2**20  # bytes of a protobuf; weights of larger networks go to a separate file
_TOLERANCE = 1e-4  # onnxruntime's kernels sum in another order


def write_onnx(backbone: Backbone, path: Path) -> str:
    """Write the network for inference; return the line that loads it.

    Raise ConfigError if a package is missing, and for a network that torch cannot trace.
    """
    if missing := [name for name in _NEEDED if util.find_spec(name) is None]:
        raise ConfigError(f"--format: onnx needs {', '.join(missing)}. Type: pip install 'fasttrain[export]'")
    import onnxruntime

    size = sum(tensor.numel() * tensor.element_size() for tensor in backbone.network.state_dict().values())
    noisy = logging.getLogger("onnxscript"), logging.getLogger("onnx_ir"), logging.getLogger("torch.onnx")
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        torch.onnx.export(
            backbone.network,
            (random_images(backbone.blueprint, 2),),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            external_data=size > _LARGEST,
            dynamo=True,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.OnnxExporterError) as error:
        cause = error.__cause__ or error  # the error itself only names torch's export step, with colour codes
        why = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(
            f"--format: torch cannot write {backbone.blueprint.arch} as onnx: {why}. Choose another format."
        ) from None
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    check_same(backbone, run, "onnxruntime", tolerance=_TOLERANCE, batches=(1, 2, 3, 7))
    return f"onnxruntime.InferenceSession({path.name!r}).run(['features'], {{'images': images}})"
