"""Every tensor argument of every public function, and every incoming gradient, as a view whose neighbours are NaN."""

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain import kernels

TEMPS = {"student_temp": 0.5, "teacher_temp": 0.4}


def draw(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def column(x):
    wide = x.new_full((*x.shape, 3), torch.nan)
    wide[..., 1] = x
    return wide[..., 1]


def expanded(x):
    memory = x.new_full((x.numel() + 1,), torch.nan)
    memory[0] = x.flatten()[0]
    return memory[0].expand(x.shape)


def transposed(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.ndim else x


def offset(x):
    memory = x.new_full((x.numel() + 7,), torch.nan)
    memory[7:] = x.flatten()
    return memory[7:].view(x.shape)


def pair_operator(x, y, bias, gain, *, backend):
    return torch.ops.fasttrain.pair_lse(x, y, bias, gain, 2.0, None, False, False, False, backend)[0]


def loss_operator(student, teacher, ws, wt, bias, weight, *, backend):
    options = (2.0, 3.0, False, True, True, True, backend)
    return torch.ops.fasttrain.prototype_loss(student, teacher, ws, wt, bias, weight, *options)[:2]


PAIR = (draw(5, 6, seed=0), draw(7, 6, seed=1))
SAME = (draw(5, 6, seed=0), draw(5, 6, seed=1))
VIEWS = (draw(2, 3, 6, seed=0), draw(2, 3, 6, seed=1), draw(9, 6, seed=2), draw(9, 6, seed=3))
BIAS, SCALE = draw(7, seed=4), torch.tensor(1.5)
CALLS = {
    "row_logsumexp": (lambda x, y, bias, scale, **k: kernels.row_logsumexp(x, y, bias=bias, scale=scale, **k),
                      (*PAIR, BIAS, SCALE)),
    "row_logsumexp of itself": (lambda x, scale, **k: kernels.row_logsumexp(x, x, scale=scale, **k), (PAIR[0], SCALE)),
    "bounded": (lambda x, y, **k: kernels.row_logsumexp(x, y, scale=2.0, unit_norm=True, **k), PAIR),
    "bidirectional_logsumexp": (lambda x, y, **k: kernels.bidirectional_logsumexp(x, y, scale=2.0, **k), PAIR),
    "nt_xent": (lambda a, b, t, **k: kernels.nt_xent(a, b, temperature=t, **k), (*SAME, SCALE)),
    "info_nce": (lambda q, k, queue, t, **o: kernels.info_nce(q, k, queue, temperature=t, in_batch=True, **o),
                 (*SAME, PAIR[1], SCALE)),
    "vmf_entropy": (lambda z, **k: kernels.vmf_entropy(z, kappa=2.0, **k), VIEWS[:1]),
    "vmf_reconstruction": (lambda a, b, **k: kernels.vmf_reconstruction(a, b, kappa=2.0, **k), SAME),
    "gaussian_entropy": (lambda z, **k: kernels.gaussian_entropy(z, bandwidth=0.5, **k), PAIR[:1]),
    "prototype_terms": (lambda *x, **k: kernels.prototype_terms(*x[:4], center=x[4], **TEMPS, **k),
                        (*VIEWS, draw(2, 9, seed=5))),
    "prototype_cross_entropy": (lambda *x, **k: kernels.prototype_cross_entropy(*x[:4], center=x[4], **TEMPS, **k),
                                (*VIEWS, draw(9, seed=5))),
    "patch_cross_entropy": (
        lambda *x, **k: kernels.patch_cross_entropy(*x[:4], center=x[4], weight=x[5], **TEMPS, **k),
        (*SAME, *VIEWS[2:], draw(9, seed=5), draw(5, seed=6).abs()),
    ),
    "prototype_entropy": (lambda z, w, **k: kernels.prototype_entropy(z, w, temp=0.5, **k), (SAME[0], VIEWS[2])),
    "sinkhorn": (lambda scores, **k: kernels.sinkhorn(scores, **k), (draw(5, 9, seed=7),)),
    "sinkhorn_center": (lambda scores, **k: kernels.sinkhorn_center(scores, **k), (draw(5, 9, seed=7),)),
    "nearest_similarity": (lambda x, **k: kernels.nearest_similarity(x, **k)[0], PAIR[:1]),
    "covariance_norms": (kernels.covariance_norms, SAME),
    "siglip": (lambda x, y, scale, bias, **k: kernels.siglip(x, y, scale=scale, bias=bias, **k),
               (*SAME, SCALE, torch.tensor(-1.0))),
    "sliced_characteristic": (kernels.sliced_characteristic, (VIEWS[0], draw(6, 9, seed=5))),
    "pair_lse": (pair_operator, (*PAIR, BIAS, SCALE)),
    "prototype_loss, the operator": (loss_operator, (
        *VIEWS, draw(1, 9, seed=5), draw(3, seed=6).abs())),
}  # fmt: skip


def test_every_public_function_is_called():
    """The rest takes no tensor, or consists of torch's operators on every device."""
    rest = {"log_sphere_area", "log_vmf_normalizer", "reference_log_vmf_normalizer"}
    rest |= {"coding_rate", "gram_error", "prototype_sinkhorn_center"}
    assert set(kernels.__all__) - rest <= CALLS.keys()


def results(function, arguments, view, backend):
    """Return the outputs, and the gradients of all arguments that get one, for outputs' gradients as views too."""
    leaves = [view(x).requires_grad_() for x in arguments]
    outputs = function(*leaves, backend=backend)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [x for x in outputs if x.numel()]
    if not outputs[0].requires_grad:
        return outputs
    incoming = [view(torch.linspace(0.5, 1.5, x.numel()).view(x.shape)) for x in outputs]
    return outputs + [g for g in torch.autograd.grad(outputs, leaves, incoming, allow_unused=True) if g is not None]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("view", [column, expanded, transposed, offset])
@pytest.mark.parametrize("name", CALLS)
def test_views_give_what_their_copies_give(name, view, backend):
    function, arguments = CALLS[name]
    got = results(function, arguments, view, backend)
    expected = results(function, arguments, lambda x: view(x).contiguous().clone(), backend)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
