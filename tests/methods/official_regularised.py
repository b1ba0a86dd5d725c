"""VICReg, Barlow Twins and LeJEPA, written out."""

import torch

from tests.methods.official import Official, mean, project, project_apart


class VICReg(Official):
    def loss(self, views, step, indices):
        z = project_apart(self.student, views)
        return mean(self.pair(z[i], z[j]) for i in range(self.count) for j in range(i + 1, len(z)))

    def pair(self, a, b):
        """The authors' code: both views' hinge is halved, their covariances are added."""
        s = self.settings
        std = [(x.var(0) + 1e-4).sqrt() for x in (a, b)]
        hinge = (1 - std[0]).clamp_min(0).mean() / 2 + (1 - std[1]).clamp_min(0).mean() / 2
        return (
            s.sim_coeff * ((a - b) ** 2).mean()
            + s.std_coeff * hinge
            + s.cov_coeff * (squared_covariances(a) + squared_covariances(b))
        )


def squared_covariances(x):
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)
    return off_diagonal(covariance).square().sum() / x.shape[1]


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


class Barlow(Official):
    def loss(self, views, step, indices):
        z = project_apart(self.student, views)
        return mean(self.pair(z[i], z[j]) for i in range(self.count) for j in range(i + 1, len(z)))

    def pair(self, a, b):
        a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (a, b))
        c = a.T @ b / len(a)
        return (c.diagonal() - 1).square().sum() + self.settings.lambd * off_diagonal(c).square().sum()


class LeJEPA(Official):
    def loss(self, views, step, indices):
        z = project(self.student, views)
        invariance = (z[: self.count].mean(0) - z).square().mean()
        weight = self.settings.sigreg_weight
        rest = 1 - weight if self.settings.sigreg_form == "convex" else 1
        return rest * invariance + weight * self.sigreg(z, step)

    def sigreg(self, z, step):
        """The README's: the step is the seed, a direction a unit column, and the weights count t and -t."""
        s = self.settings
        generator = torch.Generator().manual_seed(step.index)
        a = torch.randn(z.shape[-1], s.slices, generator=generator, dtype=z.dtype)
        a = a / a.norm(dim=0)
        t = torch.linspace(0, s.t_max, s.knots, dtype=z.dtype)
        weights = torch.full_like(t, 2 * s.t_max / (s.knots - 1))
        weights[[0, -1]] /= 2
        normal = torch.exp(-t.square() / 2)
        angles = (z @ a)[..., None] * t
        errors = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
        return (errors @ (weights * normal) * z.shape[-2]).mean()
