"""What ``fasttrain plan`` says of memory and traffic, beside what two ranks on the CPU really hold and send.

    python bench/scale/plan_check.py [--output bench/results/plan.json]      # exit status 1 if anything is apart

Every case is a run of its own: two processes, gloo, DeepSpeed, three steps. Rank 0's storages are summed by what they
are for (never the process's memory): parameters, teacher, buffers, the optimizer's state and master weights; gradients
just before and just after their reduction, whichever is more; what autograd keeps, by a hook, in a real forward pass;
ZeRO's buckets; what ZeRO-3 has fetched at the worst call of a module. Bytes sent are those handed to
``torch.distributed``. Each is held to the plan's own functions: memory within 10 %, what is sent to the byte.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environments import environments

ROOT = Path(__file__).parents[2]
BATCH, IMAGES, RANKS = 8, 64, 2
TOLERANCE = 0.1
_VIT = {"arch": "vit_tiny", "patch_size": 8}
_DINO = {**_VIT, "out_dim": 512}
Case = dict[str, Any]


def case(method: str, stage: int, entropy: bool = False, **values: Any) -> Case:
    return {"method": method, "stage": stage, "entropy": entropy, "values": values}


TINY = [case("byol", stage, arch="conv_small", optimizer="lars") for stage in range(4)]
"""Small enough for a test."""
CASES = [
    *TINY,
    *(case("dino", stage, **_DINO) for stage in range(4)),
    *(case("dino", stage, **_DINO, precision="bf16") for stage in range(4)),
    *(case("moco", stage, arch="conv_small", optimizer="lamb", queue_length=64) for stage in (0, 2, 3)),
    case("simclr", 1, True, arch="resnet18", optimizer="sgd"),
    case("mocov3", 3, **_VIT),
    case("dino", 1, **_DINO, gradient_accumulation_steps=2),
    case("dino", 2, **_DINO, gradient_accumulation_steps=2),
]

# On one rank: what really happens.

_SIZED = {
    "all_reduce": "tensor",
    "broadcast": "tensor",
    "all_gather_single": "output_tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "reduce_scatter_single": "input",
}
_KINDS = {"all_gather_single": "all_gather", "all_gather_into_tensor": "all_gather"}
_KINDS |= {"reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}


class Sent:
    """Counts what is handed to torch.distributed: whose it is, in which part of the step, and of what kind."""

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
            if tensor.is_floating_point():  # not ZeRO-3's comparisons of traces
                self.bytes[f"{_caller()} {self.moment} {_KINDS.get(name, name)}"] += tensor.nbytes
            return function(*args, **kwargs)

        return counted


def _caller() -> str:
    """Whether fasttrain or DeepSpeed called last."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_globals.get("__name__", "").partition(".")[0]
        if owner in ("fasttrain", "deepspeed"):
            return str(owner)
        frame = frame.f_back
    return "neither"


def storages(tensors: Iterable[Any], seen: set[int]) -> int:
    """Bytes of the storages of some tensors that were not ``seen`` before."""
    total = 0
    for tensor in tensors:
        storage = None if tensor is None else tensor.untyped_storage()
        if storage is not None and storage.data_ptr() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def measure(one: Case, sent: Sent) -> dict[str, Any]:
    """What a rank holds and sends in a step of the engine."""
    import torch

    from fasttrain.build import build_method
    from fasttrain.distributed import initialise, world_from_environment
    from fasttrain.engine import Engine
    from fasttrain.pipelines import Batch
    from fasttrain.plan.ledger import Kept

    world = world_from_environment()
    initialise(world)
    config = resolved(one)
    torch.manual_seed(0)
    method = build_method(config, images=IMAGES, world_size=world.size)
    engine = Engine(config, method, world, steps_per_epoch=2)
    method, zero = engine.method, engine.optimizer
    held: Counter[str] = Counter()

    def gradients() -> None:
        seen = _seen(method, zero)
        now = [g for p in method.parameters() for g in (p.grad, getattr(p, "grad_accum", None))]
        averaged = getattr(zero, "averaged_gradients", None) or {}
        now += [g for group in averaged.values() for g in group or ()]
        now += [g for group in (getattr(zero, "all_grad_tensors", None) or {}).values() for g in group or ()]
        now.append(getattr(zero, "grad_partitions_flat_buffer", None))
        held["gradients"] = max(held["gradients"], storages(now, seen))
        held["buckets"] = max(held["buckets"], storages(_buckets(zero), set()))

    def fetched(*_: Any) -> None:
        sharded = [p.data for p in method.parameters() if not getattr(p, "ds_persist", True)]
        held["fetched"] = max(held["fetched"], storages(sharded, set()))

    for module in method.modules():
        module.register_forward_hook(fetched)
    for index in range(3):
        sent.bytes.clear()
        for _ in range(config.train.gradient_accumulation_steps):
            images = [torch.randn(n, BATCH, config.views.channels, size, size) for size, n in config.views.groups]
            batch = Batch(tuple(images), None, torch.arange(BATCH) + BATCH * world.rank)
            step = engine.step_at(index, measure=False)
            sent.moment = "forward"
            kept = Kept(method, images)
            with before_reduction(engine.deepspeed, gradients), kept.counting():
                views, indices = engine._on_device(batch)
                loss = engine.deepspeed(views, step, indices).loss
                sent.moment = "backward"
                engine.deepspeed.backward(loss)
            gradients()
            sent.moment = "update"
            engine.update(step)
            del loss, images, views, batch
    gc.collect()
    held["activations"] = sum(kept.total(place) for place in ("network", "loss", "copies"))
    seen: set[int] = set()
    teacher = [] if method.teacher is None else list(method.teacher.parameters())
    mine = {id(p) for p in teacher}
    held["parameters"] = storages(_data(p for p in method.parameters() if id(p) not in mine), seen)
    held["teacher"] = storages(_data(teacher), seen)
    held["method's buffers"] = storages(method.buffers(), seen)
    state = getattr(zero, "optimizer", zero).state
    tensors = [x for values in state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    held["optimizer"] = storages([*_masters(zero), *tensors], seen)
    storages([*_buckets(zero), getattr(zero, "grad_partitions_flat_buffer", None)], seen)
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    held["anything else"] = storages(found, seen)
    engine.close()
    return {"held": dict(held), "sent": dict(sent.bytes)}


@contextmanager
def before_reduction(deepspeed: Any, look: Any) -> Iterator[None]:
    """Look at the gradients when they are all there and not yet reduced, where that is a moment of its own."""
    reduce = deepspeed.allreduce_gradients

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        look()
        return reduce(*args, **kwargs)

    deepspeed.allreduce_gradients = looked_at
    yield
    del deepspeed.allreduce_gradients


def _data(parameters: Iterable[Any]) -> list[Any]:
    return [x for p in parameters for x in (getattr(p, "ds_tensor", None), p.data)]


def _masters(zero: Any) -> list[Any]:
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [x for name in names for x in getattr(zero, name, ())]


def _buckets(zero: Any) -> list[Any]:
    found = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    return [x for buffer in found for x in (buffer if isinstance(buffer, list) else [buffer])]


def _seen(method: Any, zero: Any) -> set[int]:
    seen: set[int] = set()
    storages([*_data(method.parameters()), *_masters(zero), *_buckets(zero)], seen)
    return seen


# What the plan says of it.


def resolved(one: Case) -> Any:
    from fasttrain.config import resolve

    values = {"recipe": "cifar", "data_path": ".", "batch_size_per_gpu": BATCH, "entropy": one["entropy"]}
    return resolve(one["method"], values | {"zero_stage": one["stage"]} | one["values"])


def predict(one: Case) -> dict[str, Any]:
    """The same figures from the plan's functions."""
    import torch

    from fasttrain.build import build_method
    from fasttrain.plan.communication import traffic
    from fasttrain.plan.memory import gradient_bytes, parts
    from fasttrain.plan.trace import trace
    from fasttrain.plan.update import trace_update
    from fasttrain.plan.weights import gathers, weights_of, zero_of

    config = resolved(one)
    train = config.train
    precision = "fp32" if train.precision == "auto" else train.precision
    accumulation = train.gradient_accumulation_steps
    with torch.device("meta"):
        method = build_method(config, images=IMAGES, world_size=RANKS)
    weights = weights_of(method, train, precision)
    traced = trace(method, config.views, BATCH, precision=precision, world=RANKS, stage=one["stage"], on_gpu=False)
    update = trace_update(method, train, world=RANKS)
    zero = zero_of(train, one["stage"], RANKS, precision, weights)
    buffers = sum(buffer.nbytes for buffer in method.buffers())
    said = {p.name: p.backward for p in parts(weights, buffers, traced, update, zero, accumulation=accumulation)}
    held = {
        "parameters": said["parameters"],
        "teacher": said["teacher"],
        "method's buffers": said["buffers"],
        "optimizer": said["optimizer"],
        "gradients": gradient_bytes(weights, zero, rank=0),
        "activations": said["activations"] + said["loss"] + said["weights in low precision"],
        "buckets": parts(weights, buffers, traced, update, zero)[-2].update,
        "fetched": gathers(weights, traced.uses, zero).peak,
    }
    sent = {"gradients": 0, "weights": 0, "BatchNorm, loss, centre": 0}
    for t in traffic(weights, traced, update, zero, accumulation=accumulation):
        what = "weights" if "parameters" in t.about else t.about
        sent[what if what in sent else "BatchNorm, loss, centre"] += t.bytes
    return {"held": held, "sent": sent}


def compare(one: Case, real: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Both side by side, and what is apart by more than is allowed: 10 % for memory, nothing for what is sent."""
    sent = purposes(real["sent"])
    rows = [
        *(
            _row(f"holds: {name}", real["held"].get(name, 0), planned, TOLERANCE)
            for name, planned in said["held"].items()
        ),
        *(_row(f"sends: {name}", sent[name], planned, 0) for name, planned in said["sent"].items()),
    ]
    return {**one, "rows": rows, "holds besides": real["held"]["anything else"]}


def _row(what: str, measured: int, planned: int, tolerance: float) -> dict[str, Any]:
    return {
        "what": what,
        "measured_bytes": measured,
        "planned_bytes": planned,
        "ratio": round(planned / measured, 4) if measured else None,
        "holds": abs(planned - measured) <= tolerance * measured,
    }


def purposes(sent: dict[str, int]) -> dict[str, int]:
    """Bytes by what they are for. Norms, which the plan leaves out, are what is all-reduced in the update."""
    found = {"gradients": 0, "weights": 0, "BatchNorm, loss, centre": 0}
    for name, size in sent.items():
        owner, moment, kind = name.split()
        if moment == "update" and kind == "all_reduce":
            continue
        if owner == "fasttrain":
            found["BatchNorm, loss, centre"] += size
        else:
            found["weights" if kind == "all_gather" else "gradients"] += size
    return found


def check(cases: list[Case]) -> list[dict[str, Any]]:
    """Every case on two ranks, in processes of its own, beside the plan; only one after another."""
    found = []
    for one in cases:
        found.append(compare(one, on_two_ranks([one])[0], predict(one)))
        print(summary(found[-1]), flush=True)
    return found


def on_two_ranks(cases: list[Case]) -> list[dict[str, Any]]:
    """What rank 0 measured, case by case, all in one pair of processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(cases), "--output", str(path)]
        common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error"}
        ranks = [subprocess.Popen(command, cwd=ROOT, env=os.environ | common | one) for one in environments(RANKS)]
        try:
            ended = [rank.wait(timeout=600) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(ended):
            raise RuntimeError(f"the ranks ended with {ended}")
        measured: list[dict[str, Any]] = json.loads(path.read_text())
    return measured


def summary(found: dict[str, Any]) -> str:
    """A line a case: what is furthest apart."""
    name = f"{found['method']}{'+ER' if found['entropy'] else ''} ZeRO {found['stage']} {found['values']}"
    bad = [row["what"] for row in found["rows"] if not row["holds"]]
    worst = max((row for row in found["rows"] if row["ratio"]), key=lambda row: abs(row["ratio"] - 1))
    verdict = f"APART in {bad}" if bad else "ok"
    return f"{name}: {verdict}; furthest off: {worst['what']}, x {worst['ratio']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/plan.json")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from fasttrain.distributed import prepare_environment, world_from_environment

    prepare_environment()
    if options.measure is not None:
        sent = Sent()  # before anything takes the functions by name
        measured = [measure(one, sent) for one in options.measure]
        if world_from_environment().is_main:
            options.output.write_text(json.dumps(measured))
        return 0
    import deepspeed
    import timm
    import torch

    found = check(CASES)
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "timm": timm.__version__}
    settings = {"ranks": RANKS, "batch_size_per_gpu": BATCH, "memory_tolerance": TOLERANCE, "traffic_tolerance": 0}
    content = {"versions": versions, "settings": settings, "cases": found}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["holds"] for one in found for row in one["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
