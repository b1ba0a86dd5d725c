"""Every use of the prototypes' family against the fp64 reference, and what only a real GPU can get wrong.

python -m bench.gpu runs these there. Each of KINDS takes the use, the shape (student views, teacher views, images, prototypes,
features), the type, the kind of centre and the device, and raises AssertionError.
"""

import torch
from torch.nn.functional import normalize, pad

from fasttrain.kernels import patch_cross_entropy, prototype_entropy, prototype_terms, sinkhorn
from tests.kernels.similarity.stress import assert_same_bits
from tests.kernels.tolerances import assert_close

REPEATS = 30
CENTERS = ("none", "one", "one a view")

_TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
_STEEPEST = 40  # the largest score in nats, with some room; the tolerances ask for it
_ATTENDED = ("loss", "conditional")  # means over prototypes, whose probabilities bf16 kernels round before the product


def cross_entropy(backend, student, teacher, ws, wt, center):
    loss, _ = prototype_terms(student, teacher, ws, wt, center=center, entropy=False, backend=backend, **_TEMPS)
    return {"loss": loss}, loss


def with_entropy(backend, student, teacher, ws, wt, center):
    loss, entropy = prototype_terms(student, teacher, ws, wt, center=center, backend=backend, **_TEMPS)
    return {"loss": loss, "entropy": entropy}, loss - 0.7 * entropy


def learnt_temperature(backend, student, teacher, ws, wt, center, temp):
    temps = {"student_temp": temp, "teacher_temp": 0.04}
    loss, entropy = prototype_terms(student, teacher, ws, wt, center=center, backend=backend, **temps)
    return {"loss": loss, "entropy": entropy}, loss - 0.7 * entropy


def patches(backend, student, teacher, ws, wt, center):
    """Every row meets the teacher's of the same place, with one centre for all."""
    views = min(len(student), len(teacher))
    rows = (student[:views].flatten(0, 1), teacher[:views].flatten(0, 1))
    center = center if center is None or center.ndim == 1 else center[:1]
    loss = patch_cross_entropy(*rows, ws, wt, center=center, backend=backend, **_TEMPS)
    return {"loss": loss}, loss


def entropies(backend, student, teacher, ws, wt, center):
    # Rows of nearly one prototype have a conditional entropy of nearly none, whose gradient is what cancels.
    marginal, conditional = prototype_entropy(student.flatten(0, 1), ws, temp=0.3, backend=backend)
    return {"marginal": marginal, "conditional": conditional}, 0.5 * marginal - 0.3 * conditional


def balanced(backend, scores):
    return {"assignment": balanced_reference(scores) if backend == "eager" else sinkhorn(scores)}, None


def balanced_reference(scores, epsilon=0.05, iterations=3):
    """As kernels/sinkhorn/reference.py has it, but in the type that is given."""
    logits = scores / epsilon
    rows = torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        columns = -(logits + rows).logsumexp(0)
        rows = -(logits + columns).logsumexp(1, keepdim=True)
    return (logits + columns).softmax(1)


USES = {
    "cross-entropy": cross_entropy,
    "cross-entropy and entropy": with_entropy,
    "learnt temperature": learnt_temperature,
    "patches": patches,
    "entropies": entropies,
    "sinkhorn": balanced,
    "sinkhorn, far apart": balanced,
}
"""Each gives named values, and what is differentiated if anything is."""
TAUGHT = ("cross-entropy", "cross-entropy and entropy", "learnt temperature", "patches")
"""The uses with a teacher, and so with a centre."""


def unit_rows(*shape, seed):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def inputs(use, shape, dtype, center="none", device="cpu"):
    """The arguments of a use by name, drawn in fp64 and rounded; those that start with d have a gradient."""
    views, teachers, batch, count, dim = shape
    student, ws = unit_rows(views, batch, dim, seed=0), unit_rows(count, dim, seed=2)
    if use.startswith("sinkhorn"):
        scores = student.flatten(0, 1).to(device) @ ws.to(device).T
        scores *= (5 if "far" in use else 1) / scores.abs().max()
        return {"scores": scores.to(dtype)}
    drawn = {"dstudent": student, "teacher": unit_rows(teachers, batch, dim, seed=1)}
    drawn |= {"dprototypes": 1.5 * ws, "teacher_prototypes": unit_rows(count, dim, seed=3)}
    drawn = {name: x.to(device, dtype) for name, x in drawn.items()}
    sizes = {"none": None, "one": (count,), "one a view": (teachers, count)}[center]
    drawn["center"] = None if sizes is None else (0.3 * unit_rows(*sizes, seed=4)).to(device, dtype)
    if use == "learnt temperature":
        drawn["dtemp"] = torch.tensor(0.1, dtype=torch.float32, device=device)
    return drawn


def results(use, backend, drawn):
    """The values of a use and the gradients of what it differentiates."""
    leaves = {name: x.detach().requires_grad_() for name, x in drawn.items() if name.startswith("d")}
    values, objective = USES[use](backend, *(drawn | leaves).values())
    found = {name: value.detach() for name, value in values.items()}
    if objective is not None:
        gradients = torch.autograd.grad(objective, list(leaves.values()))
        found |= dict(zip(leaves, gradients, strict=True))
    return found


def compare(got, expected, dtype, use):
    """Hold the results of a backend for inputs of ``dtype`` to those of the fp64 reference."""
    assert got.keys() == expected.keys()
    steepest = 200 if "far" in use else _STEEPEST
    for part, value in expected.items():
        if part.startswith("d"):
            # A gradient of 1e-8 is 0 in fp16, however it was computed, and one of 1e-5 has two digits.
            kind, least = dtype, max(1e-30, torch.finfo(dtype).smallest_normal)
            value = value.to(dtype)
        else:
            kind = dtype if part in _ATTENDED and dtype == torch.bfloat16 else torch.float32
            least = 1e-30 if part == "assignment" else 1.0
        assert_close(got[part], value, kind, steepest, f"{use}, {part}", least=least)


def exact(drawn):
    return {name: None if x is None else x.double() for name, x in drawn.items()}


def reference(use, shape, dtype, center, device):
    """The same rounded inputs in fp64, by the definitions."""
    drawn = inputs(use, shape, dtype, center, device)
    compare(results(use, "triton", drawn), results(use, "eager", exact(drawn)), dtype, use)


def strided_rows(use, shape, dtype, center, device):
    """Rows that stand in a wider matrix whose other columns are NaN."""
    drawn = inputs(use, shape, dtype, center, device)
    wide = {
        name: pad(x, (0, 8), value=torch.nan)[..., : x.shape[-1]] if x is not None and x.ndim > 1 else x
        for name, x in drawn.items()
    }
    compare(results(use, "triton", wide), results(use, "eager", exact(drawn)), dtype, use)


def same_bits(use, shape, dtype, center, device):
    """The same call many times gives identical bits: a race shows as bits that change."""
    drawn = inputs(use, shape, dtype, center, device)
    assert_same_bits(lambda: results(use, "triton", drawn), REPEATS, use)


KINDS = {"reference": reference, "strided rows": strided_rows, "same bits": same_bits}
