"""What the official losses share, in plain torch: every matrix is written out, and nothing of fasttrain is called.

A counterpart of a method has copies of its networks, which are not under test. Its stop-gradients, averages, queues and
losses are its own, from the papers and the authors' code.
"""

import copy
import math
from abc import abstractmethod

import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Official(nn.Module):
    """The counterpart of a method or, if that is a twin, of its twin; parameters have the same names."""

    def __init__(self, method):
        super().__init__()
        self.settings, self.twin, self.count = method.settings, method.entropy, method.n_global
        for name in ("student", "predictor", "jigsaw"):
            if hasattr(method, name):
                setattr(self, name, copy.deepcopy(getattr(method, name)))
        # Teachers start as their students. iBOT's has no prototypes of patches if it shares its head.
        self.teacher = None if method.teacher is None else copy.deepcopy(method.teacher)
        self.kept = {}

    @abstractmethod
    def loss(self, views, step, indices):
        """The loss of a batch of views grouped by resolution, the first group being the global ones."""

    def first_pass(self, views, indices):
        """Nothing, but in DeepCluster."""

    def start_epoch(self):
        """Nothing, but in DeepCluster."""

    @torch.no_grad()
    def end_step(self, step):
        """The teacher's parameters move; its BatchNorm statistics are of its own forward passes."""
        if self.teacher is None:
            return
        start, end = self.settings.momentum_teacher, self.settings.momentum_teacher_end
        m = end - (end - start) * (math.cos(math.pi * step.index / step.total) + 1) / 2
        trained = dict(self.student.named_parameters())
        for name, old in self.teacher.named_parameters():
            old.copy_(m * old + (1 - m) * trained[name])

    def state(self):
        """All that a run must remember, by the names that the method has for it."""
        return self.state_dict() | self.kept


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def project(branch, views):
    """Projections [V, B, D]: one pass of the backbone a resolution, one of the head over all, as in DINO and SwAV."""
    features = torch.cat([branch.backbone(group.flatten(0, 1)) for group in views])
    return branch.head(features).unflatten(0, (-1, views[0].shape[1]))


def project_apart(branch, views):
    """The same one view after the other, which BatchNorm sees, as in SimSiam, BYOL and MoCo v3."""
    return torch.stack([branch.head(branch.backbone(view)) for group in views for view in group])


def predict(predictor, projections):
    """The predictor, one view after the other."""
    return torch.stack([predictor(view) for view in projections])


def mean(terms):
    return torch.stack(list(terms)).mean()


def of_other_views(queries, targets):
    """All pairs of a query and a target from another view; for two views these are the two directions."""
    return [(q, t) for j, t in enumerate(targets) for i, q in enumerate(queries) if i != j]


def one_of(positives, negatives, temperature):
    """InfoNCE: tell the positive [B] from negatives [B, N], all of them cosines."""
    logits = torch.cat([positives[:, None], negatives], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def sphere_twin(pairs, variables, kappa, support=None):
    """Reconstruction less mean kernel entropy, both without the von Mises-Fisher constant, which cancels."""
    reconstruction = mean(-kappa * (query * target).sum(1).mean() for query, target in pairs)
    entropy = mean(kernel_entropy(z, z if support is None else support, kappa) for z in variables)
    return reconstruction - entropy


def kernel_entropy(z, support, kappa):
    """Minus the mean log density of rows under kernels on ``support``; a row's own kernel counts."""
    return math.log(len(support)) - (kappa * z @ support.T).logsumexp(1).mean()


def entropy_of_mean(logits):
    """H of the mean prediction over all rows of all views [..., K]."""
    p = logits.flatten(0, -2).softmax(1).mean(0)
    return -(p * p.log()).sum()
