"""The inputs of the golden values, and losses written out as a cross-entropy over a full matrix, in fp64."""

import torch
from torch.nn.functional import cross_entropy, normalize


def golden_pair():
    """Seed 0, two draws of randn(8, 16) in fp64: the input of every golden value of the peers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x):
    return normalize(x, dim=-1)


def written_info_nce(q, k, temperature, queue=None):
    """Cross-entropy of the matrix of cosines: every key a class, or the own key first and then the queue."""
    q, k = unit(q), unit(k)
    if queue is None:
        return cross_entropy(q @ k.T / temperature, torch.arange(len(q)))
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    return cross_entropy(scores, torch.zeros(len(q), dtype=torch.long))


def written_nt_xent(a, b, temperature):
    """Every row against all others of both views."""
    z = unit(torch.cat([a, b]))
    scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(scores, torch.arange(len(z)).roll(len(a)))


def gradients(loss, *inputs):
    """The loss and its gradients with respect to fresh copies of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]
