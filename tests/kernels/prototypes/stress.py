"""Checks of every use of the prototype kernels against the fp64 reference, and of errors that only a GPU can make.

``python -m bench.gpu`` runs them on a GPU. Each of KINDS takes the use, the shape (student views, teacher views,
images, prototypes, features), the type, the kind of centre and the device. It raises AssertionError.
"""

import torch
from torch.nn.functional import normalize, pad

from fasttrain.kernels import patch_cross_entropy, prototype_entropy, prototype_terms, sinkhorn
from tests.kernels.similarity.stress import assert_same_bits
from tests.kernels.tolerances import assert_close

REPEATS = 30
CENTERS = ("none", "one", "one a view")

_TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
_STEEPEST = 40  # nats; an upper bound of the scores, for the tolerances
_ATTENDED = ("loss", "conditional")  # means over prototypes: bf16 kernels round their probabilities before the product


def cross_entropy(backend, student, teacher, ws, wt, center):
    loss, _ = prototype_terms(student, teacher, ws, wt, center=center, entropy=False, backend=backend, **_TEMPS)
    return {"loss": loss}, loss


def with_entropy(backend, student, teacher, ws, wt, center, temp=0.1):
    temps = {"student_temp": temp, "teacher_temp": 0.04}
    loss, entropy = prototype_terms(student, teacher, ws, wt, center=center, backend=backend, **temps)
    return {"loss": loss, "entropy": entropy}, loss - 0.7 * entropy


def patches(backend, student, teacher, ws, wt, center):
    """Pair every row with the teacher's row of the same place. All have one centre."""
    views = min(len(student), len(teacher))
    rows = (student[:views].flatten(0, 1), teacher[:views].flatten(0, 1))
    center = center if center is None or center.ndim == 1 else center[:1]
    loss = patch_cross_entropy(*rows, ws, wt, center=center, backend=backend, **_TEMPS)
    return {"loss": loss}, loss


def entropies(backend, student, teacher, ws, wt, center):
    # temp is not small: the gradient of a conditional entropy near 0 cancels.
    marginal, conditional = prototype_entropy(student.flatten(0, 1), ws, temp=0.3, backend=backend)
    return {"marginal": marginal, "conditional": conditional}, 0.5 * marginal - 0.3 * conditional


def balanced(backend, scores):
    return {"assignment": balanced_reference(scores) if backend == "eager" else sinkhorn(scores)}, None


def balanced_reference(scores, epsilon=0.05, iterations=3):
    """Compute kernels/sinkhorn/reference.py in the type of the scores."""
    logits = scores / epsilon
    rows = torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        columns = -(logits + rows).logsumexp(0)
        rows = -(logits + columns).logsumexp(1, keepdim=True)
    return (logits + columns).softmax(1)


USES = {
    "cross-entropy": cross_entropy,
    "cross-entropy and entropy": with_entropy,
    "learnt temperature": with_entropy,
    "patches": patches,
    "entropies": entropies,
    "sinkhorn": balanced,
    "sinkhorn, far apart": balanced,
}
"""Each returns named values and the objective to differentiate, or None."""
TAUGHT = ("cross-entropy", "cross-entropy and entropy", "learnt temperature", "patches")
"""The uses with a teacher. Only these have a centre."""


def unit_rows(*shape, seed):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def inputs(use, shape, dtype, center="none", device="cpu"):
    """Return the arguments of a use by name, drawn in fp64 and rounded. Names that start with d have a gradient."""
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
    """Return the values of a use and the gradients of its objective."""
    leaves = {name: x.detach().requires_grad_() for name, x in drawn.items() if name.startswith("d")}
    values, objective = USES[use](backend, *(drawn | leaves).values())
    parts = {name: value.detach() for name, value in values.items()}
    if objective is not None:
        gradients = torch.autograd.grad(objective, list(leaves.values()))
        parts |= dict(zip(leaves, gradients, strict=True))
    return parts


def compare(got, expected, dtype, use):
    """Compare the results of a backend for inputs of ``dtype`` with the fp64 reference."""
    assert got.keys() == expected.keys()
    steepest = 200 if "far" in use else _STEEPEST
    for part, value in expected.items():
        if part.startswith("d"):
            # fp16 cannot represent a gradient of 1e-8, and represents 1e-5 with two digits.
            kind, least = dtype, max(1e-30, torch.finfo(dtype).smallest_normal)
            value = value.to(dtype)
        else:
            rounded = part in _ATTENDED and dtype == torch.bfloat16
            kind = dtype if rounded or dtype == torch.float64 else torch.float32
            least = 1e-30 if part == "assignment" else 1.0
        assert_close(got[part], value, kind, steepest, f"{use}, {part}", least=least)


def exact(drawn):
    return {name: None if x is None else x.double() for name, x in drawn.items()}


def reference(use, shape, dtype, center, device, backend="triton"):
    """Compare with the definitions in fp64 for the same rounded inputs."""
    drawn = inputs(use, shape, dtype, center, device)
    compare(results(use, backend, drawn), results(use, "eager", exact(drawn)), dtype, use)


def strided_rows(use, shape, dtype, center, device):
    """Check rows of a wider matrix. Its other columns are NaN."""
    drawn = inputs(use, shape, dtype, center, device)
    wide = {
        name: pad(x, (0, 8), value=torch.nan)[..., : x.shape[-1]] if x is not None and x.ndim > 1 else x
        for name, x in drawn.items()
    }
    compare(results(use, "triton", wide), results(use, "eager", exact(drawn)), dtype, use)


def same_bits(use, shape, dtype, center, device):
    """Check that repeated calls give identical bits. A race would change bits."""
    drawn = inputs(use, shape, dtype, center, device)
    assert_same_bits(lambda: results(use, "triton", drawn), REPEATS, use)


KINDS = {"reference": reference, "strided rows": strided_rows, "same bits": same_bits}
