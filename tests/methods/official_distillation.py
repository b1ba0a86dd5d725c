"""SimSiam, BYOL, SimDINO and DINO, written out."""

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from tests.methods.official import (
    Official,
    entropy_of_mean,
    mean,
    of_other_views,
    predict,
    project,
    project_apart,
    sphere_twin,
    unit,
)


class SimSiam(Official):
    def loss(self, views, step, indices):
        projections = project_apart(self.student, views)
        predictions = predict(self.predictor, projections)
        targets = projections[: self.count].detach()
        if self.twin:
            pairs = of_other_views(unit(predictions), unit(targets))
            return sphere_twin(pairs, unit(predictions), self.settings.kappa)
        # Equation 1 halves the sum of two views' two directions; ours is the mean over all pairs.
        return -mean(cosine_similarity(p, z).mean() for p, z in of_other_views(predictions, targets))


class BYOL(Official):
    def loss(self, views, step, indices):
        projections = project_apart(self.student, views)
        predictions = unit(predict(self.predictor, projections))
        with torch.no_grad():
            targets = unit(project_apart(self.teacher, views[:1]))
        pairs = of_other_views(predictions, targets)
        if self.twin:
            variables = predictions if self.settings.entropy_of == "prediction" else unit(projections)
            return sphere_twin(pairs, variables, self.settings.kappa)
        # |p - t|^2 = 2 - 2 cos, as the authors write it; for two views, twice the mean is the sum of both directions.
        return 2 * mean((p - t).square().sum(1).mean() for p, t in pairs)


class SimDINO(Official):
    def loss(self, views, step, indices):
        s = self.settings
        student = unit(project(self.student, views))
        with torch.no_grad():
            teacher = unit(project(self.teacher, views[:1]))
        pairs = of_other_views(student, teacher)
        if self.twin:
            return sphere_twin(pairs, student[: self.count], s.kappa)
        z = student[: self.count]
        z = (z + teacher) / 2 if s.smooth else z
        rows, dim = z.shape[1:]
        spread = mean((torch.eye(dim) + dim / (rows * s.eps) * view.T @ view).logdet() / 2 for view in z)
        cosine = mean(cosine_similarity(p, t).mean() for p, t in pairs)
        return -s.coeff * cosine - (dim + rows) / (dim * rows) * spread


class DINO(Official):
    def __init__(self, method):
        super().__init__(method)
        if not self.settings.no_centering:
            self.kept = {"loss.center": torch.zeros(1, 1, self.settings.out_dim, dtype=torch.float64)}

    def loss(self, views, step, indices):
        s = self.settings
        predictions = unit(project(self.student, views)) @ self.student.prototypes().T / s.student_temp
        with torch.no_grad():
            logits = unit(project(self.teacher, views[:1])) @ self.teacher.prototypes().T
            targets = ((logits - self.kept.get("loss.center", 0)) / s.teacher_temp).softmax(-1)
        loss = mean(cross_entropy(p, t) for p, t in of_other_views(predictions, targets))
        if not s.no_centering:
            m = s.center_momentum
            self.kept["loss.center"] = m * self.kept["loss.center"] + (1 - m) * logits.flatten(0, 1).mean(0)
        return loss - entropy_of_mean(predictions) if self.twin else loss
