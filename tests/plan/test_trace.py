"""A traced step saves the same bytes as a real one. The trace sees ranks, BatchNorm and precision."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fasttrain import methods
from fasttrain.kernels.prototypes import cpu
from fasttrain.methods.base import Step
from fasttrain.plan.ledger import Kept
from fasttrain.plan.trace import drop_values, trace

from .small import IMAGES, built, configured


def _traced(config, world=1, **options):
    options = {"precision": "fp32", **options}
    return trace(built(config, world), config.views, config.train.batch_size_per_gpu, world=world, **options)


@pytest.mark.parametrize(
    ("name", "arch", "precision"),
    [
        *((name, "vit_mini" if methods.load(name).needs_patches else "conv_small", "fp32") for name in methods.names()),
        ("simclr", "vit_tiny", "fp32"),
        ("simclr", "vit_tiny", "bf16"),
        ("simclr", "resnet18", "bf16"),
    ],
)
def test_trace_saves_what_a_real_step_saves(name, arch, precision, monkeypatch):
    # On the CPU the loss saves its gradient, which a GPU's kernels compute in the backward pass.
    monkeypatch.setattr(cpu, "in_forward", lambda problem: False)
    monkeypatch.setattr(cpu, "is_kept", lambda problem: False)
    config = configured(name, arch=arch, patch_size=8, batch_size_per_gpu=4 if arch in ("vit_tiny", "resnet18") else 8)
    traced = _traced(config, precision=precision)
    method, batch = built(config, device="cpu"), config.train.batch_size_per_gpu
    views = [torch.randn(n, batch, config.views.channels, size, size) for size, n in config.views.groups]
    kept = Kept(method, views)
    with kept.counting(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        method(views, Step(0, 1, 1, measure=False), torch.arange(batch) % IMAGES)
    real = sum(kept.total(place) for place in ("network", "loss"))
    # The CPU's kernels save a few small matrices that the GPU's kernels compute again.
    tolerance = 0.03 if arch == "conv_small" else 0.01
    assert traced.kept + traced.kept_by_loss + traced.weight_copies == pytest.approx(real, rel=tolerance)
    assert traced.flops > 0
    assert traced.messages == ()


def test_trace_replaces_a_shared_parameter_once():
    layer = torch.nn.Conv2d(2, 2, 3)
    shared = torch.nn.Sequential(torch.nn.Sequential(layer), torch.nn.Sequential(layer), torch.nn.BatchNorm2d(2))
    with FakeTensorMode():
        drop_values(shared)
        assert len(list(shared.parameters())) == 4
        assert all(isinstance(x, FakeTensor) for x in shared.state_dict().values())
        assert shared(torch.empty(1, 2, 8, 8)).shape == (1, 2, 4, 4)


def test_trace_depends_on_precision_and_stage_3():
    config = configured("simclr", arch="vit_tiny", patch_size=8)
    single, low, sharded = (
        _traced(config, precision=precision, stage=stage)
        for precision, stage in (("fp32", 3), ("bf16", 0), ("bf16", 3))
    )
    assert low.kept < 0.8 * single.kept
    assert single.weight_copies == 0
    linear = [m.weight.numel() for m in built(config).modules() if isinstance(m, torch.nn.Linear)]
    assert low.weight_copies == pytest.approx(2 * sum(linear), rel=0.02)  # biases are not needed again
    assert low.flops == single.flops == sharded.flops
    # DeepSpeed's linear layer saves no copy of its weight, and its input in fp32 after LayerNorm.
    assert sharded.weight_copies < 0.01 * low.weight_copies
    assert low.kept < sharded.kept < single.kept


@pytest.mark.slow
def test_recomputed_blocks_save_their_inputs():
    config = configured("simclr", arch="vit_tiny", patch_size=8, activation_checkpointing=True, drop_path_rate=0)
    plain = _traced(configured("simclr", arch="vit_tiny", patch_size=8, drop_path_rate=0))
    traced, sharded = (_traced(config, stage=stage) for stage in (0, 3))
    assert traced.flops > 1.2 * plain.flops  # another forward pass, except for patches and head
    assert traced.kept == sharded.kept < 0.2 * plain.kept
    assert traced.uses == plain.uses
    method = built(config, device="cpu")
    views = [torch.randn(n, 8, config.views.channels, size, size) for size, n in config.views.groups]
    before = _alive()
    with Kept(method, views).counting():  # makes saved tensors visible to gc
        objective = method(views, Step(0, 1, 1, measure=False), torch.arange(8))
    real = sum(size for storage, size in _alive().items() if storage not in before)
    assert objective.loss.requires_grad
    assert traced.kept + traced.kept_by_loss == pytest.approx(real, rel=0.03)


def _alive():
    """Return the bytes of every storage of a real tensor by its address. Other tests may leave fake tensors."""
    gc.collect()
    tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and type(x) is not FakeTensor)
    storages = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_trace_is_linear_in_the_batch():
    config = configured("dino", arch="conv_small")
    method = built(config)
    few, more, most = (trace(method, config.views, b, precision="fp32", world=1) for b in (4, 8, 16))
    assert most.kept - more.kept == 2 * (more.kept - few.kept)
    assert most.inputs == 4 * few.inputs


def test_trace_of_ranks_gathers_rows_and_statistics():
    config = configured("mocov3", arch="conv_small")
    one, many = (_traced(config, world) for world in (1, 64))
    assert many.kept == one.kept
    assert many.kept_by_loss > one.kept_by_loss + 64 * 8 * 4  # keys of all ranks
    method = built(config, 64)
    layers = [m.num_features for m in method.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    statistics = [m for m in many.messages if m.about == "BatchNorm statistics"]
    gathered = {m.bytes for m in statistics if m.kind == "all_gather"}
    assert gathered == {64 * 4 * (2 * channels + 1) for channels in layers}
    assert {m.bytes for m in statistics if m.kind == "all_reduce"} <= {4 * 2 * channels for channels in layers}
    assert sum(m.kind == "all_gather" for m in statistics) > sum(m.kind == "all_reduce" for m in statistics)  # teacher
    assert any(m.about == "loss and centre" and m.kind == "all_gather" for m in many.messages)


def test_trace_of_moco_does_not_synchronise_batch_norm():
    traced = _traced(configured("moco", arch="conv_small"), world=4)
    assert {m.about for m in traced.messages} == {"loss and centre"}
    # Images to other ranks, their keys back, and all keys for every rank's queue.
    assert [m.kind for m in traced.messages] == ["all_to_all", "all_to_all", "all_gather"]


def test_uses_go_forward_then_backward_without_the_teacher():
    config = configured("dino", arch="conv_small")
    uses = _traced(config).uses
    trained = [names for names in uses if names[0].startswith("student.")]
    assert trained == trained[::-1]
    teacher = [index for index, names in enumerate(uses) if names[0].startswith("teacher.")]
    assert len(uses) == len(trained) + len(teacher)
    assert teacher == list(range(len(trained) // 2, len(trained) // 2 + len(teacher)))


def test_trace_does_not_change_the_method():
    config = configured("swav", arch="conv_small")
    method = built(config, 4)
    before = {name: x.device for name, x in method.state_dict().items()}
    trace(method, config.views, 8, precision="bf16", world=4)
    assert {name: x.device for name, x in method.state_dict().items()} == before
    assert method.group is None
    assert not any(m._forward_pre_hooks for m in method.modules())
