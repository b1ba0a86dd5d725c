"""Checks of errors that only a GPU can make: races, large grids, far offsets, strides. bench/gpu runs them on a GPU.

Each takes the use, the sizes n, m, d, the type of the inputs, the scale and the device. It raises AssertionError.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn.functional import pad

from fasttrain.kernels import bidirectional_logsumexp, row_logsumexp
from tests.kernels.similarity.uses import check, compare, results, rows

REPEATS = 50
LARGE = ("self without own", "both directions")
"""The uses in which a program takes several blocks of rows, if there are many."""
LEARNT = {
    "rows": lambda x, y, **kw: [row_logsumexp(x, y, **kw)],
    "self without own": lambda x, y, **kw: [row_logsumexp(x, x, exclude_self=True, **kw)],
    "both directions": lambda x, y, **kw: list(bidirectional_logsumexp(x, y, **kw)),
}


@contextmanager
def poisoned_memory():
    """Fill new floating-point tensors with NaN, so that a read before the first write shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = empty(self, *args, **kwargs)
        fill = tensor.is_floating_point() and not torch.compiler.is_compiling()
        return tensor.fill_(torch.nan) if fill else tensor

    with mock.patch.object(torch.Tensor, "new_empty", poisoned):
        yield


def reference(use, n, m, d, dtype, scale, unit_norm, device):
    """Compare with the fp64 reference."""
    check(use, "triton", n, m, d, dtype, scale, unit_norm=unit_norm, device=device)


def same_bits(use, n, m, d, dtype, scale, unit_norm, device):
    """Check that repeated calls give identical bits. A race would change bits."""
    x, y = rows(n, d, 0, dtype, device), rows(m, d, 1, dtype, device)
    bias = torch.linspace(-1, 1, n if use == "self with bias" else m, device=device).to(dtype)
    assert_same_bits(lambda: results(use, "triton", x, y, bias, scale, unit_norm), REPEATS, use)


def assert_same_bits(call, repeats, name):
    """Check that every call returns the same dictionary of tensors, bit by bit."""
    first = call()
    for repeat in range(1, repeats):
        for part, value in call().items():
            if not torch.equal(value, first[part]):
                differ = int((value != first[part]).sum())
                raise AssertionError(f"{name}, {part}: call {repeat} gave {differ} other numbers than call 0")


def several_blocks_of_rows(use, n, m, d, dtype, scale, unit_norm, device):
    """Check a use of LARGE with a matrix that is too large for the plain reference."""
    symmetric = use == "self without own"
    x = rows(n, d, 0, dtype, device)
    y = x if symmetric else rows(m, d, 1, dtype, device)
    got = results(use, "triton", x, y, y.new_zeros(len(y)), scale, unit_norm)
    compare(got, chunked_results(x.double(), y.double(), scale, symmetric), dtype, scale, use)


def chunked_results(x, y, scale, symmetric, chunk=1000):
    """Compute ``uses.results`` for a use of LARGE from the formulas, in chunks of rows."""

    def scores():
        for start in range(0, len(x), chunk):
            part = scale * (x[start : start + chunk] @ y.T)
            if symmetric:
                part.diagonal(start).fill_(-torch.inf)
            yield slice(start, start + len(part)), part

    def weights(lse):
        return torch.linspace(0.5, 1.5, len(lse), dtype=torch.float64, device=lse.device) / len(lse)

    by_row, by_col = x.new_zeros(len(x)), x.new_full((len(y),), -torch.inf)
    for i, part in scores():
        by_row[i] = part.logsumexp(1)
        by_col = torch.logaddexp(by_col, part.logsumexp(0))
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for i, part in scores():
        grad = (part - by_row[i, None]).exp() * weights(by_row)[i, None]
        if not symmetric:
            grad += (part - by_col).exp() * weights(by_col)
        dx[i] = scale * (grad @ y)
        dy += scale * (grad.T @ x[i])
    return {"lse 0": by_row, "dx": dx + dy} if symmetric else {"lse 0": by_row, "lse 1": by_col, "dx": dx, "dy": dy}


def far_offsets(use, n, m, d, dtype, scale, unit_norm, device):
    """Check the last rows of x and its gradient, beyond the reach of a 32-bit offset."""
    assert use == "rows"
    x = torch.randn(n, d, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))
    y, last = rows(m, d, 1, dtype, device), x[-500:].double().requires_grad_()
    lse = row_logsumexp(x.requires_grad_(), y, scale=scale, unit_norm=unit_norm, backend="triton")
    expected = row_logsumexp(last, y.double(), scale=scale, backend="eager")
    (dx,), (dlast,) = torch.autograd.grad(lse.sum(), x), torch.autograd.grad(expected.sum(), last)
    compare({"lse": lse.detach()[-500:], "dx": dx[-500:]}, {"lse": expected.detach(), "dx": dlast}, dtype, scale, use)


def learnt_scale(use, n, m, d, dtype, scale, unit_norm, device):
    """Check a scale on the device with a gradient, and rows of a wider matrix whose other columns are NaN."""
    sides = []
    for backend, kind, of_scale in (("triton", dtype, torch.float32), ("eager", torch.float64, torch.float64)):
        wide = [pad(rows(k, d, seed, dtype, device).to(kind), (0, 8), value=torch.nan) for seed, k in enumerate((n, m))]
        leaves = [w[:, :d].requires_grad_() for w in wide]
        leaves.append(torch.tensor(scale, device=device, dtype=of_scale).requires_grad_())
        lses = LEARNT[use](*leaves[:2], scale=leaves[2], unit_norm=unit_norm, backend=backend)
        gradients = torch.autograd.grad(sum(lse.mean() for lse in lses), leaves, allow_unused=True)
        parts = {f"lse {i}": lse.detach() for i, lse in enumerate(lses)}
        parts |= {name: g for name, g in zip(("dx", "dy"), gradients, strict=False) if g is not None}
        sides.append(parts | {"dscale": gradients[2].to(kind)})
    compare(*sides, dtype, scale, use)


KINDS = {
    "reference": reference,
    "same bits": same_bits,
    "several blocks of rows": several_blocks_of_rows,
    "offsets beyond 2^31": far_offsets,
    "learnt scale, strided rows": learnt_scale,
}
