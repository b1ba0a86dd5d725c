"""DINO's and SwAV's losses written out as the papers' double loops over views, and random views to try them on."""

import torch

from tests.losses.pairs import draw, unit


def random_views(seed):
    """A small random case: unit features [S, B, D], which of them the teacher sees, and prototypes of both sides."""
    generator = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    views, batch, dim, count = number(2, 5), number(1, 6), number(2, 7), number(2, 11)
    teachers = number(1, views)
    student = unit(draw(views, batch, dim, seed=seed))
    teacher = unit(draw(teachers, batch, dim, seed=seed + 1))
    return student, teacher, unit(draw(count, dim, seed=seed + 2)), unit(draw(count, dim, seed=seed + 3))


def cross_entropies(targets, logits, temp):
    """Of every pair of different views, one after the other."""
    return [
        -(target * (logits[s] / temp).log_softmax(-1)).sum(-1).mean()
        for t, target in enumerate(targets)
        for s in range(len(logits))
        if s != t
    ]


def written_dino(teacher, student, center, teacher_temp, student_temp=0.1):
    targets = [((t.detach() - center) / teacher_temp).softmax(-1) for t in teacher]
    return torch.stack(cross_entropies(targets, student, student_temp)).mean()


def written_sinkhorn(scores, epsilon, iterations):
    """Rescaled in turn to equal columns and to rows that sum to 1, in fp64."""
    codes = (scores.double() / epsilon).exp()
    codes = codes * len(codes) / codes.sum()  # of effect without iterations only
    for _ in range(iterations):
        codes = codes / codes.sum(0)
        codes = codes / codes.sum(1, keepdim=True)
    return codes


def written_swav(high, low, queues=None, temp=0.1, epsilon=0.05, iterations=3):
    codes = []
    for number, scores in enumerate(high):
        rows = scores.detach() if queues is None else torch.cat([scores.detach(), queues[number]])
        codes.append(written_sinkhorn(rows, epsilon, iterations)[: len(scores)])
    return torch.stack(cross_entropies(codes, [*high, *low], temp)).mean()
