"""Every method and its twin against the official loss, written out in ``official*.py``, over steps of training.

In fp64, so that nothing but rounding is left between them.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fasttrain.losses import swav
from fasttrain.methods import Step, load
from fasttrain.methods.kmeans import spherical_kmeans
from tests.methods import (
    official_clustering,
    official_contrastive,
    official_distillation,
    official_masked,
    official_regularised,
)
from tests.methods.small import build, recipe

_COUNTERPARTS = {
    "barlow": official_regularised.Barlow,
    "byol": official_distillation.BYOL,
    "cmc": official_contrastive.CMC,
    "deepcluster": official_clustering.DeepCluster,
    "dino": official_distillation.DINO,
    "dinov2": official_masked.DINOv2,
    "ibot": official_masked.IBOT,
    "infomin": official_contrastive.InfoMin,
    "lejepa": official_regularised.LeJEPA,
    "moco": official_contrastive.MoCo,
    "mocov3": official_contrastive.MoCoV3,
    "simclr": official_contrastive.SimCLR,
    "simdino": official_distillation.SimDINO,
    "simsiam": official_distillation.SimSiam,
    "swav": official_clustering.SwAV,
    "vicreg": official_regularised.VICReg,
}
_ON_PATCHES = {name for name in _COUNTERPARTS if load(name).needs_patches}
_CASES = [(n, entropy) for n in sorted(_COUNTERPARTS) for entropy in (False, True) if not entropy or load(n).space]
_PER_EPOCH, _LR, _BATCH, _IMAGES = 2, 0.2, 16, 40
_FIRST_PASS = (20, 21)  # the seeds of its batches
_EXACT = {"rtol": 1e-8, "atol": 1e-10}
_SINGLE = {"rtol": 1e-5, "atol": 1e-5}

# Averages that move within three steps, a queue that is full after two, k-means that has not converged.
_SETTINGS = {
    "byol": {"momentum_teacher": 0.9},
    "deepcluster": {"kmeans_iterations": 2},
    "dino": {"momentum_teacher": 0.9, "teacher_temp": 0.06},
    "dinov2": {"momentum_teacher": 0.9, "warmup_teacher_temp_epochs": 1.0},
    "ibot": {"momentum_teacher": 0.9, "warmup_teacher_temp_epochs": 3, "pred_ratio": (0.0, 0.4), "lambda2": 0.7},
    "infomin": {"queue_length": 32, "momentum_teacher": 0.9, "beta": 0.3},
    "moco": {"queue_length": 32, "momentum_teacher": 0.9},
    "mocov3": {"momentum_teacher": 0.9, "temperature": 0.4},
    "simdino": {"momentum_teacher": 0.9, "coeff": 0.7},
}

both = pytest.mark.parametrize("entropy", [False, True], ids=["base", "twin"])


class NormedBackbone(nn.Module):
    """With BatchNorm, so that it matters which images pass together."""

    num_features = 12

    def __init__(self, channels=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, 12), nn.BatchNorm1d(12), nn.ReLU())

    def forward(self, x):
        return self.layers(x.mean((2, 3)))


def global_views(name, count=2):
    """A recipe without local crops."""
    views = recipe(name, globals_=count)
    return replace(views, views=views.views[:1])


def noise(views, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, _BATCH, 3, size, size) for size, count in views.groups]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def some_images(seed):
    return torch.randperm(_IMAGES, generator=torch.Generator().manual_seed(seed))[:_BATCH]


def pair_up(name, entropy, views, **options):
    """A method in fp64 and its counterpart, of the same weights."""
    method = build(name, entropy, views=views, **_SETTINGS.get(name, {}) | options).double()
    if method.needs_first_pass:
        method.memory.zero_()  # of what ``build`` has shown it in fp32
    official = _COUNTERPARTS[name](method)
    if method.needs_first_pass:
        for seed in _FIRST_PASS:
            for one in (method, official):
                one.first_pass(noise(views, seed), some_images(seed))
    return method, official


def take_step(one, loss_of, views, index):
    """A step of SGD of a method or its counterpart on noise; returns its loss and all gradients."""
    torch.manual_seed(100 + index)  # of k-means, jigsaws and negatives
    if index % _PER_EPOCH == 0:
        one.start_epoch()
    # Whether the bound is measured must make no difference.
    step = Step(index, total=10, per_epoch=_PER_EPOCH, measure=index != 1)
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=_LR)
    optimizer.zero_grad()
    loss = loss_of(noise(views, index), step, some_images(index))
    loss.backward()
    optimizer.step()
    one.end_step(step)
    return loss.detach(), {name: p.grad for name, p in one.named_parameters()}


def assert_equal_training(name, entropy, *, views=None, steps=3, **options):
    """Loss and gradients are equal at every step and, at the end, all that a run must remember."""
    views = recipe(name) if views is None else views
    method, official = pair_up(name, entropy, views, **options)
    # SwAV's Sinkhorn runs in fp32 whatever the projections are: 1e-6 of a code, which the steps then carry on.
    close = _SINGLE if name == "swav" and method.settings.sinkhorn_iterations else _EXACT
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for index in range(steps):
        ours = take_step(method, lambda *batch: method(*batch).loss, views, index)
        expected = take_step(official, official.loss, views, index)
        torch.testing.assert_close(ours, expected, **close)
    torch.testing.assert_close(dict(method.state_dict()), official.state(), **close)
    assert all((p - before[name]).norm() > 1e-3 for name, p in trained.items() if p.ndim > 1), "nothing moved"


@pytest.mark.parametrize(("name", "entropy"), [case for case in _CASES if case[0] != "infomin"])
def test_two_views_train_like_the_official_code(name, entropy):
    views = global_views(name, 1 if name == "cmc" else 2)  # CMC's two views are the channels of one crop
    assert_equal_training(name, entropy, views=views)


@pytest.mark.parametrize("options", [{}, {"network": NormedBackbone}], ids=["plain", "normed"])
@pytest.mark.parametrize(("name", "entropy"), _CASES)
def test_more_views_train_like_the_official_loss_over_pairs(name, options, entropy):
    if options and name in _ON_PATCHES:
        pytest.skip("its networks have no BatchNorm")
    assert_equal_training(name, entropy, **options)


@both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cmc", {"mlp": True}),
        ("cmc", {"views": global_views("")}),
        ("deepcluster", {"views": recipe("deepcluster", globals_=1)}),
        ("dino", {"no_centering": True}),
        ("dino", {"norm_last_layer": False}),
        ("dinov2", {"centering": "centering", "separate_head": False}),
        (
            "dinov2",
            {"centering": "none", "norm_last_layer": True, "koleo_loss_weight": 0, "mask_sample_probability": 1},
        ),
        ("dinov2", {"gram_loss_weight": 2.0, "gram_update_epochs": 1.0}),
        ("ibot", {"shared_head": True, "pred_shape": "rand"}),
        ("ibot", {"shared_head_teacher": False, "patch_out_dim": 24, "norm_last_layer": False}),
        ("ibot", {"no_centering": True}),
        ("moco", {"mlp": False}),
        ("swav", {"sinkhorn_iterations": 0}),
    ],
    ids=[
        "cmc_mlp",
        "cmc_rgb",
        "deepcluster_one_view",
        "dino_no_centering",
        "dino_free_norms",
        "dinov2_short_recipe",
        "dinov2_no_centering",
        "dinov2_gram",
        "ibot_shared_head",
        "ibot_own_head",
        "ibot_no_centering",
        "moco_v1",
        "swav_no_sinkhorn",
    ],
)
def test_variants_train_like_the_official_ones(name, options, entropy):
    assert_equal_training(name, entropy, **options)


def test_lejepa_with_sigreg_added_trains_like_the_written_one():
    assert_equal_training("lejepa", False, sigreg_form="additive", knots=9)


@both
def test_moco_bn_splits_pass_apart_and_keys_are_shuffled(entropy):
    assert_equal_training("moco", entropy, network=NormedBackbone, bn_splits=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("byol", {"entropy_of": "projection"}),
        ("infomin", {"entropy_support": "queue"}),
        ("moco", {"entropy_support": "queue"}),
    ],
)
def test_twin_entropy_uses_the_chosen_variable_and_support(name, options):
    assert_equal_training(name, True, **options)


@both
def test_swav_queue_fills_from_its_epoch_and_counts_once_full(entropy):
    # Steps 2 and 3 fill it, step 4 is the first to use it.
    assert_equal_training("swav", entropy, steps=6, queue_length=2 * _BATCH, epoch_queue_starts=1.0)


@pytest.mark.parametrize("queue_length", [0, _BATCH])
def test_swav_codes_equal_the_rescaled_matrix(monkeypatch, queue_length):
    views, codes, original = recipe("swav"), [], swav.sinkhorn_center

    def spy(scores, *, epsilon, **options):
        center = original(scores, epsilon=epsilon, **options)
        codes.append(((scores - center) / epsilon).softmax(1)[:_BATCH])
        return center

    method, official = pair_up("swav", False, views, queue_length=queue_length, epoch_queue_starts=0.0)
    monkeypatch.setattr(swav, "sinkhorn_center", spy)
    for index in range(2):
        codes.clear()
        take_step(method, lambda *batch: method(*batch).loss, views, index)
        take_step(official, official.loss, views, index)
        torch.testing.assert_close(torch.stack(codes), official.codes, **_SINGLE)


def test_deepcluster_batches_include_unclustered_images():
    seen = torch.cat([some_images(seed) for seed in _FIRST_PASS])
    assert not torch.isin(some_images(0), seen).all()


def test_kmeans_keeps_the_centroid_of_an_empty_cluster():
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(27), dtype=torch.float64)  # of few such seeds
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.manual_seed(0)
    expected, nearest = official_clustering.kmeans(rows, 8, 10)
    assert len(nearest.unique()) < 8
    torch.manual_seed(0)
    torch.testing.assert_close(spherical_kmeans(rows, 8), (expected, nearest), **_EXACT)
