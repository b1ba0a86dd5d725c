"""SwAV and DeepCluster v2, written out."""

import torch
from torch.nn.functional import cross_entropy

from tests.methods.official import Official, entropy_of_mean, mean, project, project_apart, unit

_UNSEEN = -100


class SwAV(Official):
    def __init__(self, method):
        super().__init__(method)
        s = self.settings
        queue = torch.zeros(self.count, s.queue_length, s.out_dim, dtype=torch.float64)
        self.kept = {"queue": queue, "queue_filled": torch.tensor(0)}

    def loss(self, views, step, indices):
        s = self.settings
        z, prototypes = unit(project(self.student, views)), self.student.prototypes()
        predictions = z @ prototypes.T / s.temperature
        with torch.no_grad():
            globals_ = z[: self.count]
            if s.sinkhorn_iterations:
                codes = self.balanced(globals_, prototypes, step)
            else:
                codes = (globals_ @ prototypes.T / s.epsilon).softmax(-1)
        self.codes = codes
        loss = mean(
            mean(cross_entropy(predictions[v], code) for v in range(len(z)) if v != i) for i, code in enumerate(codes)
        )
        return loss - entropy_of_mean(predictions) if self.twin else loss

    def balanced(self, z, prototypes, step):
        """Sinkhorn's codes of each global view, together with its queue once that is full."""
        s, queue = self.settings, self.kept["queue"]
        used = s.queue_length > 0 and step.epoch >= s.epoch_queue_starts
        codes = []
        for view, past in zip(z, queue, strict=True):
            full = used and bool((past[-1] != 0).any())
            rows = torch.cat([past, view]) if full else view
            codes.append(sinkhorn(rows @ prototypes.T, s.epsilon, s.sinkhorn_iterations)[-len(view) :])
        if used:
            batch = z.shape[1]
            self.kept["queue"] = torch.cat([z, queue[:, :-batch]], dim=1)
            self.kept["queue_filled"] = self.kept["queue_filled"] + batch
        return torch.stack(codes)


def sinkhorn(scores, epsilon, iterations):
    """Algorithm 1 of the paper's appendix: rescale the matrix in turn to equal prototypes and to equal images."""
    q = (scores / epsilon).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


class DeepCluster(Official):
    def __init__(self, method):
        super().__init__(method)
        s, images = self.settings, method.memory.shape[1]
        self.seen = torch.zeros(images, dtype=torch.bool)
        self.kept = {
            "memory": torch.zeros(self.count, images, s.out_dim, dtype=torch.float64),
            "centroids": torch.zeros(s.cluster_heads, s.nmb_prototypes, s.out_dim, dtype=torch.float64),
            "assignments": torch.full((s.cluster_heads, images), _UNSEEN),
        }

    def loss(self, views, step, indices):
        z = unit(project(self.student, views))
        logits = [z @ centroids.T / self.settings.temperature for centroids in self.kept["centroids"]]
        targets = [assigned[indices].repeat(len(z)) for assigned in self.kept["assignments"]]
        loss = mean(
            cross_entropy(x.flatten(0, 1), y, ignore_index=_UNSEEN) for x, y in zip(logits, targets, strict=True)
        )
        self.remember(z, indices)
        return loss - mean(entropy_of_mean(x) for x in logits) if self.twin else loss

    @torch.no_grad()
    def first_pass(self, views, indices):
        self.remember(unit(project_apart(self.student, views[:1])), indices)

    def remember(self, z, indices):
        self.kept["memory"][:, indices] = z[: self.count].detach()
        self.seen[indices] = True

    def start_epoch(self):
        """A clustering a head, of the global views in turn; images without a projection have no cluster."""
        s = self.settings
        for head in range(s.cluster_heads):
            rows = self.kept["memory"][head % self.count][self.seen]
            centroids, nearest = kmeans(rows, s.nmb_prototypes, s.kmeans_iterations)
            self.kept["centroids"][head] = centroids
            self.kept["assignments"][head] = _UNSEEN
            self.kept["assignments"][head, self.seen] = nearest


def kmeans(rows, clusters, iterations):
    centroids = rows[torch.randperm(len(rows))[:clusters]]  # the draw that gives both the same start
    for _ in range(iterations):
        nearest = (rows @ centroids.T).argmax(1)
        for k in nearest.unique():  # an empty cluster stays where it is
            centroids[k] = unit(rows[nearest == k].mean(0))
    return centroids, (rows @ centroids.T).argmax(1)
