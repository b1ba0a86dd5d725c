"""Run by test_unequal_batches.py in two processes, one start for all cases.

Every rank writes its observations to ``FOLDER/rank-N.json``.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fasttrain import kernels, losses
from fasttrain.kernels import collectives
from fasttrain.losses.compat.dino import DINOLoss as CompatDINOLoss
from fasttrain.losses.compat.open_clip import ClipLoss, SigLipLoss
from tests.methods.small import CASES, build, run

ROWS, DIM = 8, 16
USUAL = (ROWS, DIM, torch.float32)
FAULTS = {
    "rows": (6, DIM, torch.float32),
    "no rows": (0, DIM, torch.float32),
    "dimension": (ROWS, 12, torch.float32),
    "type": (ROWS, DIM, torch.float64),
}
"""Rank 1's batches. Rank 0 has the usual one."""

_W = torch.eye(5, DIM)
_BOTH = {"teacher_prototypes": _W, "student_prototypes": _W}
_TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
_SHARE = {"gather_distributed": True}
_SWAV = {"sinkhorn_gather_distributed": True}
_QUEUE = {"memory_bank_size": (32, DIM)}


def _pair(loss, a, b):
    return loss(a, b)


def _views(loss, a, b):
    return loss([a, b], [a, b])


def _clip(loss, a, b):
    return loss(a, b, 10.0)


def _images(rows):
    """Return numbers of images that differ between the ranks."""
    return torch.arange(len(rows)) + ROWS * dist.get_rank()


def _after(update, state):
    """Return a call that returns the module's state after an update."""
    return lambda module, a, b: (update(module, a, b), getattr(module, state))[1]


KERNELS = {
    "nt_xent": lambda a, b, **o: kernels.nt_xent(a, b, temperature=0.1, **o),
    "info_nce": lambda a, b, **o: kernels.info_nce(a, b, temperature=0.1, **o),
    "info_nce with a queue": lambda a, b, **o: kernels.info_nce(a, b, _W, in_batch=True, temperature=1, **o),
    "row_logsumexp": lambda a, b, **o: kernels.row_logsumexp(a, b, scale=2.0, **o).sum(),
    "row_logsumexp of one": lambda a, b, **o: kernels.row_logsumexp(a, a, scale=2.0, exclude_self=True, **o).sum(),
    "row_logsumexp eager": lambda a, b, **o: kernels.row_logsumexp(a, b, scale=2.0, backend="eager", **o).sum(),
    "vmf_entropy": lambda a, b, **o: kernels.vmf_entropy(a, **o),
    "vmf_entropy weighted": lambda a, b, **o: kernels.vmf_entropy(a, estimator="expectation", **o),
    "vmf_reconstruction": lambda a, b, **o: kernels.vmf_reconstruction(a, b, **o),
    "gaussian_entropy": lambda a, b, **o: kernels.gaussian_entropy(a, bandwidth=1.0, **o),
    "coding_rate": lambda a, b, **o: kernels.coding_rate(torch.stack([a, b]), eps=0.5, **o).sum(),
    "nearest_similarity": lambda a, b, **o: kernels.nearest_similarity(a, **o)[0].sum(),
    "covariance_norms": lambda a, b, **o: kernels.covariance_norms(a, b, **o)[0],
    "siglip": lambda a, b, **o: kernels.siglip(a, b, scale=10.0, bias=-5.0, **o),
    "sliced_characteristic": lambda a, b, **o: kernels.sliced_characteristic(a, torch.eye(DIM), **o),
    "prototype_terms": lambda a, b, **o: kernels.prototype_terms(
        torch.stack([a, b]), torch.stack([b, a]), _W, _W, **_TEMPS, **o
    )[1],
    "prototype_entropy": lambda a, b, **o: sum(kernels.prototype_entropy(a, _W, temp=0.1, **o)),
}
"""Calls of functions, by name and variant."""

LOSSES = {
    "NTXentLoss": (lambda: losses.NTXentLoss(**_SHARE), _pair),
    "NTXentLoss with a bank": (lambda: losses.NTXentLoss(**_QUEUE, **_SHARE), _pair),
    "InfoNCELoss": (lambda: losses.InfoNCELoss(**_SHARE), _pair),
    "InfoNCELoss symmetric": (lambda: losses.InfoNCELoss(symmetric=True, **_SHARE), _pair),
    "InfoNCELoss with negatives": (lambda: losses.InfoNCELoss(**_SHARE), lambda loss, a, b: loss(a, b, b)),
    "KoLeoLoss": (lambda: losses.KoLeoLoss(**_SHARE), lambda loss, a, b: loss(a)),
    "BarlowTwinsLoss": (lambda: losses.BarlowTwinsLoss(**_SHARE), _pair),
    "VICRegLoss": (lambda: losses.VICRegLoss(**_SHARE), _pair),
    "SIGRegLoss": (lambda: losses.SIGRegLoss(num_vectors=4, **_SHARE), lambda loss, a, b: loss(a)),
    "SigLIPLoss": (lambda: losses.SigLIPLoss(**_SHARE), _pair),
    "MoCoLoss": (lambda: losses.MoCoLoss(**_QUEUE, **_SHARE), _pair),
    "MoCoLoss enqueue": (
        lambda: losses.MoCoLoss(**_QUEUE, **_SHARE),
        _after(lambda loss, a, b: loss.enqueue(a), "queue"),
    ),
    "MoCoV3Loss": (lambda: losses.MoCoV3Loss(**_SHARE), lambda loss, a, b: loss(a, b, a, b)),
    "MoCoV3Loss views": (
        lambda: losses.MoCoV3Loss(**_SHARE),
        lambda loss, a, b: loss.views(torch.stack([a, b]), torch.stack([a, b])),
    ),
    "CMCLoss": (lambda: losses.CMCLoss(**_SHARE), lambda loss, a, b: loss([a, b, a])),
    "CMCMemoryLoss": (
        lambda: losses.CMCMemoryLoss(20, DIM, negatives=4, **_SHARE),
        lambda loss, a, b: loss([a, b], _images(a)),
    ),
    "DINOLoss": (lambda: losses.DINOLoss(DIM), _views),
    "DINOLoss with prototypes": (lambda: losses.DINOLoss(5), lambda loss, a, b: loss([a, b], [a, b], **_BOTH)),
    "DINOLoss update_center": (
        lambda: losses.DINOLoss(DIM),
        _after(lambda loss, a, b: loss.update_center(torch.stack([a, b])), "center"),
    ),
    "DINOLoss terms": (
        lambda: losses.DINOLoss(5),
        lambda loss, a, b: loss.terms(torch.stack([a, b]), torch.stack([a, b]), _W, _W, teacher_temp=0.04)[1],
    ),
    "DINOLoss of compat": (
        lambda: CompatDINOLoss(DIM, 2, 0.04, 0.04, 0, 1),
        lambda loss, a, b: loss(torch.cat([a, b]), torch.cat([a, b]), 0),
    ),
    "SimDINOLoss": (lambda: losses.SimDINOLoss(**_SHARE), _views),
    "SwaVLoss": (lambda: losses.SwaVLoss(**_SWAV), lambda loss, a, b: loss([a, b], [a])),
    "SwaVLoss without Sinkhorn": (
        lambda: losses.SwaVLoss(sinkhorn_iterations=0, **_SWAV),
        lambda loss, a, b: loss([a, b], []),
    ),
    "SwaVLoss with prototypes": (
        lambda: losses.SwaVLoss(**_SWAV),
        lambda loss, a, b: loss([a, b], [], prototypes=_W),
    ),
    "SwaVLoss terms": (
        lambda: losses.SwaVLoss(**_SWAV),
        lambda loss, a, b: loss.terms(torch.stack([a, b]), torch.stack([a, b]), _W, centers=None)[1],
    ),
    "EntropyReconstructionLoss": (lambda: losses.EntropyReconstructionLoss(**_SHARE), _pair),
    "EntropyReconstructionLoss terms": (
        lambda: losses.EntropyReconstructionLoss(**_SHARE),
        lambda loss, a, b: loss.terms(a, b).information,
    ),
    "EntropyReconstructionLoss discrete": (
        lambda: losses.EntropyReconstructionLoss(support="discrete", **_SHARE),
        _pair,
    ),
    "MemoryBankModule": (
        lambda: losses.MemoryBankModule((32, DIM), **_SHARE),
        _after(lambda bank, a, b: bank.enqueue(a), "bank"),
    ),
    "InstanceBank": (
        lambda: losses.InstanceBank(20, DIM, **_SHARE),
        _after(lambda bank, a, b: bank.update(_images(a), [a, b]), "bank"),
    ),
    "SigLipLoss": (lambda: SigLipLoss(world_size=2), lambda loss, a, b: loss(a, b, 10.0, -5.0)),
    "ClipLoss": (lambda: ClipLoss(world_size=2), _clip),
    "ClipLoss with gradients": (lambda: ClipLoss(gather_with_grad=True, world_size=2), _clip),
    "ClipLoss local": (lambda: ClipLoss(local_loss=True, world_size=2), _clip),
}
"""Constructors of modules and calls with two batches, by class and variant."""


def call(name, a, b, **options):
    """Return the result of a case for two batches [B, D]. ``check_batches`` is the only option."""
    if name in KERNELS:
        return KERNELS[name](a, b, group=dist.group.WORLD, **options)
    make, use = LOSSES[name]
    torch.manual_seed(0)  # the same banks
    loss = make()
    vars(loss).update(options)
    torch.manual_seed(1)
    return use(loss, a, b)


def batches(rows, dim, dtype):
    generator = torch.Generator().manual_seed(dist.get_rank())
    draw = [torch.randn(rows, dim, generator=generator, dtype=dtype) for _ in range(2)]
    return [normalize(x, dim=1).requires_grad_() for x in draw]


def refusal(function):
    """Return the message of the function's ValueError, or None."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def unequal(name):
    """Return the messages by fault of rank 1's batch."""
    kinds = {fault: kind if dist.get_rank() else USUAL for fault, kind in FAULTS.items()}
    return {fault: refusal(lambda kind=kind: call(name, *batches(*kind))) for fault, kind in kinds.items()}


def equal(name, comparisons):
    """Return whether values and gradients have the same bits with and without comparison, and the comparisons."""
    results, counts = [], []
    for options in ({"check_batches": False}, {}):
        comparisons.clear()
        a, b = batches(*USUAL)
        value = call(name, a, b, **options)
        if value.requires_grad:
            value.sum().backward()
        results.append([value.detach(), a.grad, b.grad])
        counts.append(len(comparisons))
    same = all(x is y is None or torch.equal(x, y) for x, y in zip(*results, strict=True))
    return {"same": same, "comparisons": counts}


def compiled():
    """Return whether a compiled loss has the eager value, and its message for unequal batches."""
    loss = losses.NTXentLoss(**_SHARE)
    function = torch.compile(loss, backend="aot_eager")
    rows = batches(*USUAL)
    close = torch.allclose(function(*rows), loss(*rows))
    kind = FAULTS["rows"] if dist.get_rank() else USUAL
    return {"close": close, "message": refusal(lambda: function(*batches(*kind)))}


def on_device():
    """Return the message for tensors that are not on the CPU, of a group whose backend is."""
    rows = torch.empty(6 if dist.get_rank() else ROWS, DIM, device="meta")
    return refusal(lambda: collectives.check_equal_batches("on a device", dist.group.WORLD, rows))


def queries_differ():
    """Return whether row_logsumexp accepts other numbers of queries x, against columns that get no gradient."""
    x, y = batches(6 if dist.get_rank() else ROWS, DIM, torch.float32)[0], batches(*USUAL)[1].detach()
    value = kernels.row_logsumexp(x, y, scale=2.0, group=dist.group.WORLD)
    value.sum().backward()
    columns = collectives.gather_rows(y, dist.group.WORLD)
    return torch.allclose(value, (2 * x @ columns.T).logsumexp(1)) and x.grad.abs().sum().item() > 0


def without_gradient():
    """Return the messages of losses that write a bank only if there is a gradient."""
    kind = FAULTS["rows"] if dist.get_rank() else USUAL
    with torch.no_grad():
        return [
            refusal(lambda n=name: call(n, *batches(*kind))) for name in ("NTXentLoss with a bank", "CMCMemoryLoss")
        ]


def sinkhorn_differences():
    """Return the largest difference between the codes of unequal batches and of one process, by backend."""
    scores = torch.rand(14, 6, generator=torch.Generator().manual_seed(0))
    own = slice(8, 14) if dist.get_rank() else slice(0, 8)
    differences = {}
    for backend in ("cpu", "eager"):
        codes = kernels.sinkhorn(scores[own], backend=backend, group=dist.group.WORLD)
        differences[backend] = (codes - kernels.sinkhorn(scores, backend=backend)[own]).abs().max().item()
    return differences


def comparing_methods(comparisons):
    """Return the methods that compare batches in a step under the trainer's group."""
    names = []
    for name, entropy in CASES:
        method = build(name, entropy)
        method.group = dist.group.WORLD
        comparisons.clear()
        run(method, name)
        names += [name] * bool(comparisons)
    return names


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    comparisons, original = [], collectives._batches_of_all_ranks

    def counted(rows, group):
        comparisons.append(len(rows))
        return original(rows, group)

    collectives._batches_of_all_ranks = counted
    results = {
        "unequal": {name: unequal(name) for name in (*KERNELS, *LOSSES)},
        "equal": {name: equal(name, comparisons) for name in (*KERNELS, *LOSSES)},
        "compiled": compiled(),
        "device": on_device(),
        "queries": queries_differ(),
        "without gradient": without_gradient(),
        "sinkhorn": sinkhorn_differences(),
        "methods": comparing_methods(comparisons),
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
