"""Every use of the log-sum-exps. All backends are compared with the reference in all of them."""

import torch
from torch.nn.functional import normalize

from fasttrain.kernels import bidirectional_logsumexp, row_logsumexp
from tests.kernels.tolerances import assert_close

USES = {
    "rows": lambda x, y, bias, **kw: [row_logsumexp(x, y, **kw)],
    "rows with bias": lambda x, y, bias, **kw: [row_logsumexp(x, y, bias=bias, **kw)],
    "rows without own": lambda x, y, bias, **kw: [row_logsumexp(x, y, exclude_self=True, **kw)],
    "self": lambda x, y, bias, **kw: [row_logsumexp(x, x, **kw)],
    "self without own": lambda x, y, bias, **kw: [row_logsumexp(x, x, exclude_self=True, **kw)],
    "self with bias": lambda x, y, bias, **kw: [row_logsumexp(x, x, bias=bias[: len(x)], **kw)],
    "both directions": lambda x, y, bias, **kw: list(bidirectional_logsumexp(x, y, **kw)),
}


def uses_and_types(*dtypes):
    """Return all pairs, except for one use in half precision: there autograd adds two rounded gradients of x."""
    return [(use, dtype) for dtype in dtypes for use in USES if use != "self with bias" or dtype.itemsize > 2]


def rows(n, d, seed, dtype=torch.float64, device="cpu"):
    """Return unit-norm rows, drawn in fp64 and rounded."""
    draw = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(draw, dim=1).to(device, dtype)


def results(use, backend, x, y, bias, scale, unit_norm):
    """Return the log-sum-exps of a use and the gradients of their weighted sum."""
    leaves = [t.clone().requires_grad_() for t in (x, y, bias)]
    lses = USES[use](*leaves, scale=scale, backend=backend, unit_norm=unit_norm)
    weighted = [
        (lse.masked_fill(lse == -torch.inf, 0) * torch.linspace(0.5, 1.5, len(lse), dtype=lse.dtype, device=x.device))
        for lse in lses
    ]
    sum(w.mean() for w in weighted).backward()
    parts = {f"lse {i}": lse.detach() for i, lse in enumerate(lses)}
    names = ("dx", "dy", "dbias")
    return parts | {n: leaf.grad for n, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}


def check(use, backend, n, m, d, dtype, scale, *, unit_norm=True, device="cpu"):
    """Compare a backend with the fp64 reference on the same rounded inputs."""
    x, y = rows(n, d, 0, dtype, device), rows(m, d, 1, dtype, device)
    bias = torch.linspace(-1, 1, max(n, m), device=device, dtype=torch.float64)
    bias = (bias if use == "self with bias" else bias[:m]).to(dtype)
    got = results(use, backend, x, y, bias, scale, unit_norm)
    compare(got, results(use, "eager", x.double(), y.double(), bias.double(), scale, unit_norm), dtype, scale, use)


def compare(got, expected, dtype, scale, name):
    """Compare the results of a backend for inputs of ``dtype`` with the fp64 reference."""
    assert got.keys() == expected.keys()
    for part, value in expected.items():
        if part.startswith("lse"):
            # The log-sum-exp is accumulated and returned in fp32 for all inputs.
            kind, least = dtype if dtype == torch.float64 else torch.float32, 1.0
        else:
            # fp16 cannot represent a gradient of 1e-8, and represents 1e-5 with two digits.
            kind, least = dtype, max(1e-30, torch.finfo(dtype).smallest_normal)
            value = value.to(dtype)
        dim = got["dx"].shape[-1] if got[part].is_cuda and dtype.itemsize == 2 else 0
        assert_close(got[part], value, kind, scale, f"{name}, {part}", least=least, products=dim)
