"""Run by test_two_ranks.py in 1 process and in 2: the same global batches through every case, results to a file.

One process group serves all cases, because the start of a group takes most of the time.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fasttrain import kernels, losses
from fasttrain.checkpoint.card import Card
from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World, initialise, prepare_environment
from fasttrain.engine import zero
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.evaluate.features import extract
from fasttrain.kernels.collectives import permute_rows
from fasttrain.methods.kmeans import spherical_kmeans
from fasttrain.models.batchnorm import RankBatchNorm
from fasttrain.pipelines import Loader, View, ViewRecipe
from fasttrain.pipelines.sources.base import ArraySource
from tests.checkpoints import publish, train

BATCH = 16
STEPS = 3
IMAGES = 64
CASES = [
    ("dino", False, 0),
    ("dino", True, 1),
    ("dino", True, 2),
    ("dino", True, 3),
    ("simclr", False, 2),
    ("simclr", True, 0),
    ("swav", False, 0),
    ("swav", True, 2),
    ("simsiam", False, 1),
    ("byol", True, 2),
    ("mocov3", False, 2),
    ("moco", False, 0),
    ("cmc", True, 2),
    ("deepcluster", False, 1),
    ("simdino", False, 2),
    ("ibot", True, 1),
    ("ibot", False, 3),
    ("dinov2", False, 2),
    ("dinov2", True, 3),
    ("vicreg", False, 0),
    ("barlow", False, 1),
    ("lejepa", False, 2),
]
LAYERWISE = [(name, stage) for name in ("lars", "lamb") for stage in (1, 2, 3)]

OPTIONS = {
    **{(stage, "offload_optimizer"): True for stage in (1, 2, 3)},
    **{(stage, "overlap_comm"): False for stage in (1, 2)},
    (3, "deepspeed_config"): '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}',
}
"""Options that change no number of ("dino", True, stage), and their values."""


def kernel_gradients(world):
    """Return loss and input gradient of every reduction that crosses ranks, averaged as a trainer averages."""
    group = dist.group.WORLD if world.size > 1 else None
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(BATCH, 8, dtype=torch.float64, generator=generator) for _ in range(2)]
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    prototypes = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    heads = torch.stack([prototypes, prototypes.flip(1)])
    batch_norm = torch.nn.BatchNorm1d(8).double()
    if group is not None:
        batch_norm = RankBatchNorm(8).double()
        batch_norm.group = group

    def wide(x):  # more features than rows
        return torch.cat([x.pow(k) for k in range(1, 5)], dim=1)

    losses = {
        "nt_xent": lambda a, b, t: kernels.nt_xent(a, b, temperature=t, group=group),
        "nt_xent_pairs": lambda a, b, t: kernels.nt_xent(
            torch.stack([a, b]), torch.stack([b, -a]), temperature=t, group=group
        ).dot(weights),
        "nt_xent_running_maximum": lambda a, b, t: kernels.nt_xent(a, b, temperature=t / 100, group=group),
        "info_nce": lambda a, b, t: kernels.info_nce(a, b, temperature=t, group=group),
        "info_nce_both": lambda a, b, t: (
            kernels.info_nce(a, b, temperature=t, group=group) + kernels.info_nce(b, a, temperature=t, group=group)
        ),
        "rows_without_own": lambda a, b, t: (
            kernels.row_logsumexp(a, b, scale=3.0, exclude_self=True, group=group).square().mean()
        ),
        "vmf_average": lambda a, b, t: kernels.vmf_entropy(a, group=group) + kernels.vmf_entropy(b, group=group),
        "vmf_views": lambda a, b, t: kernels.vmf_entropy(torch.stack([a, b]), group=group).square().sum(),
        "vmf_views_expectation": lambda a, b, t: kernels.vmf_entropy(
            torch.stack([a, b]), estimator="expectation", leave_one_out=True, group=group
        ).prod(),
        "vmf_expectation": lambda a, b, t: kernels.vmf_entropy(a, estimator="expectation", group=group),
        "vmf_leave_one_out": lambda a, b, t: kernels.vmf_entropy(a, leave_one_out=True, group=group),
        "vmf_reconstruction": lambda a, b, t: kernels.vmf_reconstruction(a, b, group=group),
        "gaussian": lambda a, b, t: kernels.gaussian_entropy(a + b, bandwidth=0.3, group=group),
        "nearest": lambda a, b, t: (kernels.nearest_similarity(a, group=group)[0] * b.sum(1)).mean(),
        "covariance_gram": lambda a, b, t: sum(
            x.sum() for x in kernels.covariance_norms(wide(a), wide(b), group=group)
        ),
        "covariance_of_itself": lambda a, b, t: kernels.covariance_norms(wide(a), group=group)[0] / 100,
        "covariance": lambda a, b, t: sum(x.square().sum() for x in kernels.covariance_norms(a, b, group=group)),
        "siglip": lambda a, b, t: kernels.siglip(a, b, scale=t, bias=t - 2, group=group),
        "characteristic": lambda a, b, t: kernels.sliced_characteristic(torch.stack([a, b]), prototypes.T, group=group),
        "batch_norm": lambda a, b, t: (batch_norm(a) * b).square().mean(),
        "prototype_entropy_heads": lambda a, b, t: sum(
            x.square().sum() for x in kernels.prototype_entropy(a + b, heads, temp=0.3, group=group)
        ),
        "prototype_entropy": lambda a, b, t: sum(kernels.prototype_entropy(a + b, prototypes, temp=0.3, group=group)),
    }
    results = {}
    for name, loss in losses.items():
        leaves = [torch.nn.functional.normalize(x, dim=1)[rows].clone().requires_grad_() for x in draw]
        temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        value = loss(*leaves, temperature)
        value.backward()
        # A trainer averages over ranks, a loss does not.
        gradients = [gathered(leaf.grad / world.size, world) for leaf in leaves if leaf.grad is not None]
        if temperature.grad is not None:
            gradients.append(mean(temperature.grad, world))
        results[name] = (mean(value.detach(), world), *gradients)
    images = draw[0][rows].view(-1, 2, 4)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    permuted = permute_rows(images, order, group)
    results["permuted_rows"] = (
        gathered(permuted, world),
        gathered(permute_rows(permuted, order.argsort(), group), world),
    )
    odd = torch.nn.functional.normalize(torch.randn(21, 8, dtype=torch.float64, generator=generator), dim=1)
    torch.manual_seed(0)
    results["kmeans_of_21_rows"] = spherical_kmeans(odd, 5, group=group)
    scores = torch.rand(BATCH, 6, generator=generator)
    for name, factor in (("sinkhorn", 1), ("sinkhorn_of_distant_scores", 100)):
        results[name] = (gathered(kernels.sinkhorn(factor * scores[rows], group=group), world),)
        views = factor * torch.stack([scores[rows], scores[rows].flip(1)])
        results[f"{name}_views"] = (kernels.sinkhorn_center(views, group=group),)
    return results


def loss_gradients(world):
    """Return value, gradients of inputs and parameters, and buffers of every loss that gathers."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(BATCH, 8, dtype=torch.float64, generator=generator) for _ in range(4)]
    share = {"gather_distributed": True}
    index = torch.arange(BATCH).chunk(world.size)[world.rank]
    torch.manual_seed(0)  # the same banks on every rank
    cases = {
        "nt_xent": (losses.NTXentLoss(**share), 2),
        "nt_xent_bank": (losses.NTXentLoss(memory_bank_size=(40, 8), **share), 2),
        "info_nce": (losses.InfoNCELoss(learnable_temperature=True, **share), 2),
        "info_nce_negatives": (losses.InfoNCELoss(learnable_temperature=True, **share), 3),
        "info_nce_symmetric": (losses.InfoNCELoss(symmetric=True, learnable_temperature=True, **share), 2),
        "koleo": (losses.KoLeoLoss(**share), 1),
        "vicreg": (losses.VICRegLoss(**share), 2),
        "barlow": (losses.BarlowTwinsLoss(**share), 2),
        "siglip": (losses.SigLIPLoss(**share), 2),
        "sigreg": (losses.SIGRegLoss(num_vectors=9, **share), 1),
        "moco": (losses.MoCoLoss(memory_bank_size=(32, 8), **share), 2),
        "mocov3": (losses.MoCoV3Loss(**share), 4),
        "cmc": (losses.CMCLoss(**share), 3),
        "cmc_memory": (losses.CMCMemoryLoss(40, 8, negatives=9, **share), 2),
        "er_sphere": (losses.EntropyReconstructionLoss(leave_one_out=True, **share), 2),
        "er_discrete": (losses.EntropyReconstructionLoss(support="discrete", **share), 2),
        **prototype_losses(torch.randn(5, 8, dtype=torch.float64, generator=generator)),
    }
    results = {}
    for name, (loss, count) in cases.items():
        loss.double()
        leaves = [x.chunk(world.size)[world.rank].clone().requires_grad_() for x in draw[:count]]
        torch.manual_seed(1)
        value = loss(leaves, index) if name == "cmc_memory" else loss(leaves) if name == "cmc" else loss(*leaves)
        value.backward()
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        gradients = [z if leaf.grad is None else leaf.grad for leaf, z in zip(leaves, zeros, strict=True)]
        results[name] = (
            mean(value.detach(), world),
            *[gathered(g / world.size, world) for g in gradients],
            *[mean(p.grad, world) for p in loss.parameters()],
            *[x.double() for x in loss.buffers()],
        )
    return results


def prototype_losses(prototypes):
    """Return DINO, whose centre crosses ranks, and SwAV, whose codes do: of logits, and of features and prototypes."""

    def twice(loss, **extra):
        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.loss = loss

            def forward(self, a, b, c, d):
                return self.loss([a, b], [c, d], **extra) + self.loss([b, a], [c, d], **extra)

        return Twice(), 4

    both = {"teacher_prototypes": prototypes, "student_prototypes": prototypes.flip(0)}
    swav = {"sinkhorn_epsilon": 1.0, "sinkhorn_gather_distributed": True}
    return {
        "dino": twice(losses.DINOLoss(8)),
        "simdino": twice(losses.SimDINOLoss(gather_distributed=True)),
        "dino_features": twice(losses.DINOLoss(5), **both),
        "swav": twice(losses.SwaVLoss(**swav)),
        "swav_features": twice(losses.SwaVLoss(**swav), prototypes=prototypes),
    }


def training(method, entropy, stage, world, **options):
    """Return losses, student and teacher after a few steps of the engine."""
    # SGD, because Adam turns the rounding error of a zero gradient into a step of full length.
    extra = {
        "dino": {"clip_each": True},  # a parameter may be in the shards of both ranks
        "moco": {"bn_splits": 2 // world.size},  # its BatchNorm is not synchronised
        "swav": {"queue_length": BATCH, "epoch_queue_starts": 0, "sinkhorn_iterations": 3},
    }.get(method, {})
    engine = make(method, entropy, stage, world, optimizer="sgd", lr=4.0, **extra, **options)
    losses = train(engine, range(STEPS))
    state = full_state(engine)
    assert rank_dependent_buffers(engine.method, world) == []
    engine.close()
    return {"losses": torch.tensor(losses), **state}


def make(method, entropy, stage, world, **values):
    """Return the engine of a case. One rank always trains at stage 0."""
    values = {**values, "zero_stage": stage if world.size > 1 else 0, "warmup_epochs": 0, "min_lr": 0.1}
    config = resolve(method, {"recipe": "demo", "entropy": entropy, "deterministic": True, **values})
    config = replace(config, train=replace(config.train, batch_size_per_gpu=BATCH // world.size, clip_grad=1.0))
    torch.manual_seed(0)
    method_ = smooth(build_method(config, images=IMAGES, world_size=world.size))
    engine = Engine(config, method_, world, steps_per_epoch=STEPS)
    engine.views = config.views
    return engine


def layerwise(name, stage, world):
    """Return the weights before and after some steps of LARS or LAMB, at rates that move a weight by 0.5 % and 10 %."""
    lr = {"lars": 32.0, "lamb": 0.8}[name]
    # ZeRO-3 splits large shards and steps them one after another. One case splits all shards.
    with sub_groups(1000 if (name, stage) == ("lamb", 3) else None):
        engine = make("swav", False, stage, world, optimizer=name, lr=lr, freeze_prototypes_epochs=1 / STEPS)
    before = full_state(engine)
    losses = train(engine, range(STEPS))
    state = full_state(engine)
    engine.close()
    return {"losses": torch.tensor(losses), "before": before, "after": state}


@contextmanager
def sub_groups(size):
    """Make ZeRO-3 split its shards into groups of about ``size`` elements."""
    original = zero.deepspeed_config

    def changed(*args):
        config = original(*args)
        if size is not None:
            config["zero_optimization"]["sub_group_size"] = size
        return config

    zero.deepspeed_config = changed
    yield
    zero.deepspeed_config = original


def consolidated(world, folder):
    """Return every tensor after a few steps at stage 3, and publish its checkpoint, which has them in parts."""
    engine = make("dino", True, 3, world, drop_path_rate=0.0, norm_last_layer=False)
    train(engine, range(2))
    publish(engine, folder, Card("dino", True, "conv_small", "sgd", 2, world.size, engine.stage, "0"), keep=True)
    state = full_state(engine)
    engine.close()
    return state


def evaluation(world):
    """Return features and labels of 11 images, image k with the value 20 k. The ranks get 6 and 5 images."""
    values = np.arange(11, dtype=np.uint8)[:, None, None, None] * 20
    source = ArraySource(np.broadcast_to(values, (11, 4, 4, 1)).copy(), np.arange(11) % 3)
    recipe = ViewRecipe((View(size=4, scale=(1, 1), flip=0, center=True),), channels=1, mean=(0,), std=(1,))
    options = {"rank": world.rank, "world_size": world.size, "shuffle": False, "drop_last": False, "threads": 1}
    loader = Loader(source, recipe, 8 // world.size, **options)
    features = extract(torch.nn.Flatten(), loader, torch.device("cpu"))
    loader.close()
    return {"features": features.features, "labels": features.labels}


def smooth(module):
    """Replace ReLU by GELU. Rounding can turn a ReLU's gradient on or off, which hides how close two runs are."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ReLU):
            module.add_module(name, torch.nn.GELU())
        else:
            smooth(child)
    return module


def full_state(engine):
    """Return every tensor of the method, gathered from ZeRO-3's shards."""
    import deepspeed

    module = engine.method
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=engine.stage == 3):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def rank_dependent_buffers(module, world):
    """Return the buffers that differ between ranks. A checkpoint has only the first rank's."""
    buffers = {name: gathered(b.double()[None], world) for name, b in module.named_buffers() if b.numel()}
    return [name for name, ranks in buffers.items() if not torch.equal(ranks[0], ranks[-1])]


def gathered(x, world):
    if world.size == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(shards, x.contiguous())
    return torch.cat(shards)


def mean(x, world):
    if world.size > 1:
        dist.all_reduce(x)
        x = x / world.size
    return x


def main(path):
    from tests.checkpoint.resume_on_ranks import RESUMED, full_disk, resumed

    world = World.from_environment()
    initialise(world)
    results = {"kernels": kernel_gradients(world)}
    results["losses"] = loss_gradients(world)
    results["evaluation"] = evaluation(world)
    for case in CASES:
        results[case] = training(*case, world)
    for (stage, option), value in OPTIONS.items() if world.size > 1 else ():
        results[(stage, option)] = training("dino", True, stage, world, **{option: value})
    for case in LAYERWISE:
        results[case] = layerwise(*case, world)
    results["full disk"] = full_disk(world, Path(path).with_suffix(".full"))
    for case in RESUMED:
        results[("resumed", *case)] = resumed(case, world, Path(path).parent / "checkpoints")
    results["consolidated"] = consolidated(world, Path(path).with_suffix(".consolidated"))
    if world.is_main:
        torch.save(results, path)


if __name__ == "__main__":
    prepare_environment()
    main(sys.argv[1])
