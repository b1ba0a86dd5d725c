"""SimCLR, MoCo, MoCo v3, InfoMin and CMC, written out."""

import torch
from torch.nn.functional import cross_entropy

from tests.methods.official import (
    Official,
    mean,
    of_other_views,
    one_of,
    predict,
    project,
    project_apart,
    sphere_twin,
    unit,
)


class SimCLR(Official):
    def loss(self, views, step, indices):
        z = unit(project(self.student, views))
        pairs = [(z[i], z[j]) for i in range(self.count) for j in range(i + 1, len(z))]
        if self.twin:
            return sphere_twin(pairs, z, self.settings.kappa)
        return mean(nt_xent(a, b, self.settings.temperature) for a, b in pairs)


def nt_xent(a, b, temperature):
    """Equation 1 of the paper, mean over the 2B rows (the authors' TensorFlow code returns twice that)."""
    rows = torch.cat([a, b])
    itself = torch.eye(len(rows), dtype=torch.bool)
    logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    return cross_entropy(logits, torch.arange(len(rows)).roll(len(a)))


class MoCo(Official):
    def __init__(self, method):
        super().__init__(method)
        self.kept = {
            "loss.memory_bank.bank": method.loss.queue,
            "loss.memory_bank.bank_ptr": torch.zeros(1, dtype=torch.long),
        }

    def loss(self, views, step, indices):
        key, queue = self.key(views[0][1], step), self.kept["loss.memory_bank.bank"]
        loss = self.objective(views, key, queue)
        self.enqueue(key)
        return loss

    def objective(self, views, key, queue):
        queries = self.in_parts(self.student, [views[0][:1], *views[1:]])
        if self.twin:
            return self.bound(queries, key, queue)
        return mean(self.contrast(query, key, queue) for query in queries)

    def bound(self, queries, key, queue):
        support = queue if self.settings.entropy_support == "queue" else None
        return sphere_twin([(query, key) for query in queries], queries, self.settings.kappa, support)

    def contrast(self, query, key, queue):
        return one_of((query * key).sum(1), query @ queue.T, self.settings.temperature)

    @torch.no_grad()
    def key(self, images, step):
        """The key of every image; the shuffle shows only in which images BatchNorm sees together."""
        if self.settings.bn_splits == 1:
            return self.in_parts(self.teacher, [images[None]])[0]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step.index))
        shuffled = self.in_parts(self.teacher, [images[order][None]])[0]
        key = torch.empty_like(shuffled)
        key[order] = shuffled
        return key

    def in_parts(self, branch, views):
        """Unit projections, each part of the batch in a pass of its own."""
        size = views[0].shape[1] // self.settings.bn_splits
        starts = range(0, views[0].shape[1], size)
        return torch.cat([unit(project(branch, [g[:, i : i + size] for g in views])) for i in starts], dim=1)

    def enqueue(self, key):
        """The keys replace the oldest rows of a copy, because backward still reads the former rows."""
        bank, start = self.kept["loss.memory_bank.bank"].clone(), int(self.kept["loss.memory_bank.bank_ptr"])
        bank[start : start + len(key)] = key
        pointer = torch.tensor([(start + len(key)) % len(bank)])
        self.kept = {"loss.memory_bank.bank": bank, "loss.memory_bank.bank_ptr": pointer}


class InfoMin(MoCo):
    def objective(self, views, key, queue):
        s = self.settings
        plain = unit(project(self.student, [views[0][:1]]))[0]
        shuffled = self.solve(views[1])
        if self.twin:
            return self.bound([plain, shuffled], key, queue)
        return (1 - s.beta) * self.contrast(plain, key, queue) + s.beta * self.contrast(shuffled, key, queue)

    def solve(self, patches):
        """The jigsaw's query: project each patch, join an image's in a random order, project them together."""
        count, batch = patches.shape[:2]
        each = self.jigsaw.each(self.student.backbone(patches.flatten(0, 1))).unflatten(0, (count, batch))
        orders = torch.rand(batch, count).argsort(1).tolist()  # the draw that gives both the same permutations
        joined = torch.stack([torch.cat([each[p, image] for p in order]) for image, order in enumerate(orders)])
        return unit(self.jigsaw.joined(joined))


class MoCoV3(Official):
    def loss(self, views, step, indices):
        predictions = unit(predict(self.predictor, project_apart(self.student, views)))
        with torch.no_grad():
            keys = unit(project_apart(self.teacher, views[:1]))
        pairs = of_other_views(predictions, keys)
        if self.twin:
            return sphere_twin(pairs, predictions, self.settings.kappa)
        return 2 * mean(self.contrast(q, k) for q, k in pairs)  # the sum of the two directions of two views

    def contrast(self, query, keys):
        t = self.settings.temperature
        return 2 * t * cross_entropy(query @ keys.T / t, torch.arange(len(query)))


class CMC(Official):
    """Views are crops in Lab, whose sensors are luminance and chroma; in RGB, two views are the sensors."""

    def __init__(self, method):
        super().__init__(method)
        self.by_channel = method.by_channel
        if not self.twin:
            self.kept = {"memory_loss.memory.bank": method.memory_loss.memory.bank.clone()}

    def loss(self, views, step, indices):
        crops = [crop for group in views for crop in group]
        seen = [(crop[:, :1], crop[:, 1:]) for crop in crops] if self.by_channel else [crops[:2]]
        pairs = [[self.encode(sensor, x) for sensor, x in enumerate(both)] for both in seen]
        if self.twin:
            return sphere_twin(pairs, [z for pair in pairs for z in pair], self.settings.kappa)
        return mean(self.contrast(pair, indices) for pair in pairs)  # crop by crop: the second meets the first's memory

    def encode(self, sensor, x):
        return unit(self.student.heads[sensor](self.student.backbone.encoders[sensor](x)))

    def contrast(self, pair, indices):
        """Each sensor's projections against the other's memory, which then moves."""
        s, memory = self.settings, self.kept["memory_loss.memory.bank"].clone()
        drawn = torch.randint(memory.shape[1], (s.negatives,))  # once for the batch, as CMCMemoryLoss says
        losses = [
            one_of((z * other[indices]).sum(1), z @ other[drawn].T, s.temperature)
            for z, other in zip(pair, memory.flip(0), strict=True)
        ]
        m = s.memory_momentum
        for z, own in zip(pair, memory, strict=True):
            own[indices] = unit(m * own[indices] + (1 - m) * z.detach())
        self.kept["memory_loss.memory.bank"] = memory
        return sum(losses)
