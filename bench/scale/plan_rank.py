"""Measure the storages and the traffic of a rank. plan_check.py starts one process of it per rank.

Storages are summed by purpose. Traffic is the bytes passed to ``torch.distributed``.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH, IMAGES = 8, 64
Case = dict[str, Any]


def resolved(one: Case) -> Any:
    from fasttrain.config.resolve import resolve

    values = {"recipe": "cifar", "data_path": ".", "batch_size_per_gpu": BATCH, "entropy": one["entropy"]}
    return resolve(one["method"], values | {"zero_stage": one["stage"]} | one["values"])


_SIZED = {
    "all_reduce": "tensor",
    "all_to_all_single": "input",
    "broadcast": "tensor",
    "all_gather_single": "output_tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "reduce_scatter_single": "input",
}
_KINDS = {"all_gather_single": "all_gather", "all_gather_into_tensor": "all_gather"}
_KINDS |= {"reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}


class Sent:
    """Count the bytes passed to torch.distributed by caller, part of the step and kind."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.bytes: Counter[str] = Counter()
        self.moment = ""
        for name, argument in _SIZED.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), name, argument))

    def _counting(self, function: Any, name: str, argument: str) -> Any:
        signature = inspect.signature(function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = signature.bind(*args, **kwargs).arguments[argument]
            if tensor.is_floating_point():  # ignores ZeRO-3's comparisons of traces
                self.bytes[f"{_caller()} {self.moment} {_KINDS.get(name, name)}"] += tensor.nbytes
            return function(*args, **kwargs)

        return counted


def _caller() -> str:
    """Return the last caller of the two, fasttrain or DeepSpeed, and ``reduction`` for stage 0's own gradients."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        owner = module.partition(".")[0]
        if owner in ("fasttrain", "deepspeed"):
            return "reduction" if module == "fasttrain.engine.reduction" else str(owner)
        frame = frame.f_back
    return "neither"


def storages(tensors: Iterable[Any], seen: set[int]) -> int:
    """Return the bytes of the tensors' storages that were not ``seen`` before."""
    total = 0
    for tensor in tensors:
        storage = None if tensor is None else tensor.untyped_storage()
        if storage is not None and storage.data_ptr() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def measure(one: Case, sent: Sent) -> dict[str, Any]:
    """Return storages and traffic of a rank in a step of the engine."""
    import torch

    from fasttrain.distributed.world import World, initialise
    from fasttrain.engine.build import build_method
    from fasttrain.engine.engine import Engine
    from fasttrain.pipelines import Batch, sides
    from fasttrain.plan.ledger import Kept

    world = World.from_environment()
    initialise(world)
    config = resolved(one)
    torch.manual_seed(0)
    method = build_method(config, images=IMAGES, world_size=world.size)
    engine = Engine(config, method, world, steps_per_epoch=2)
    method, zero = engine.method, engine.optimizer
    sizes: Counter[str] = Counter()

    def gradients() -> None:
        seen = _seen(method, zero)
        now = [g for p in method.parameters() for g in (p.grad, getattr(p, "grad_accum", None))]
        averaged = getattr(zero, "averaged_gradients", None) or {}
        now += [g for group in averaged.values() for g in group or ()]
        now += [g for group in (getattr(zero, "all_grad_tensors", None) or {}).values() for g in group or ()]
        now.append(getattr(zero, "grad_partitions_flat_buffer", None))
        sizes["gradients"] = max(sizes["gradients"], storages(now, seen))
        sizes["buckets"] = max(sizes["buckets"], storages(_buckets(zero), set()))

    def fetched(*_: Any) -> None:
        sharded = [p.data for p in method.parameters() if not getattr(p, "ds_persist", True)]
        sizes["fetched"] = max(sizes["fetched"], storages(sharded, set()))

    for module in method.modules():
        module.register_forward_hook(fetched)
    for index in range(3):
        sent.bytes.clear()
        for _ in range(config.train.gradient_accumulation_steps):
            images = [torch.randn(n, BATCH, config.views.channels, *sides(size)) for size, n in config.views.groups]
            batch = Batch(tuple(images), None, torch.arange(BATCH) + BATCH * world.rank)
            step = engine.step_at(index, measure=False)
            sent.moment = "forward"
            kept = Kept(method, images)
            with before_reduction(engine.deepspeed, gradients), kept.counting():
                views, indices = engine._on_device(batch)
                loss = engine.deepspeed(views, step, indices).loss
                sent.moment = "backward"
                engine.backward(loss)
            gradients()
            sent.moment = "update"
            engine.update(step)
            del loss, images, views, batch
    gc.collect()
    sizes["activations"] = sum(kept.total(place) for place in ("network", "loss", "copies"))
    seen: set[int] = set()
    teacher = [] if method.teacher is None else list(method.teacher.parameters())
    of_teacher = {id(p) for p in teacher}
    sizes["parameters"] = storages(_data(p for p in method.parameters() if id(p) not in of_teacher), seen)
    sizes["teacher"] = storages(_data(teacher), seen)
    sizes["method's buffers"] = storages(method.buffers(), seen)
    state = getattr(zero, "optimizer", zero).state
    tensors = [x for values in state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    sizes["optimizer"] = storages([*_masters(zero), *tensors], seen)
    storages([*_buckets(zero), getattr(zero, "grad_partitions_flat_buffer", None)], seen)
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    sizes["anything else"] = storages(alive, seen)
    engine.close()
    return {"held": dict(sizes), "sent": dict(sent.bytes)}


@contextmanager
def before_reduction(deepspeed: Any, measure_gradients: Any) -> Iterator[None]:
    """Measure the gradients when all of them exist and none is reduced, if DeepSpeed has such a moment."""
    reduce = deepspeed.allreduce_gradients

    def measured(*args: Any, **kwargs: Any) -> Any:
        measure_gradients()
        return reduce(*args, **kwargs)

    deepspeed.allreduce_gradients = measured
    yield
    del deepspeed.allreduce_gradients


def _data(parameters: Iterable[Any]) -> list[Any]:
    return [x for p in parameters for x in (getattr(p, "ds_tensor", None), p.data)]


def _masters(zero: Any) -> list[Any]:
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [x for name in names for x in getattr(zero, name, ())]


def _buckets(zero: Any) -> list[Any]:
    buffers = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    return [x for buffer in buffers for x in (buffer if isinstance(buffer, list) else [buffer])]


def _seen(method: Any, zero: Any) -> set[int]:
    seen: set[int] = set()
    storages([*_data(method.parameters()), *_masters(zero), *_buckets(zero)], seen)
    return seen


def main() -> None:
    """Measure cases one after another. Rank 0 writes the results to ``output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=json.loads, help="a JSON list of cases")
    parser.add_argument("output", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    from fasttrain.distributed.world import World, prepare_environment

    prepare_environment()
    sent = Sent()  # patches torch.distributed before DeepSpeed imports its functions by name
    measured = [measure(one, sent) for one in options.cases]
    if World.from_environment().is_main:
        options.output.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
