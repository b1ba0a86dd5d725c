"""What every method must hold, base and twin."""

import pytest
import torch
from torch import nn

from fasttrain import methods
from fasttrain.methods.base import Branch, Step, Task, slice_views
from fasttrain.pipelines import View, ViewRecipe

_SMALL = {
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "cmc": {"out_dim": 8, "negatives": 32},
    "deepcluster": {"nmb_prototypes": 8, "hidden_dim": 16, "out_dim": 8},
    "dino": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "use_bn_in_head": True},
    "infomin": {"queue_length": 64, "out_dim": 8},
    "moco": {"queue_length": 64, "out_dim": 8},
    "mocov3": {"hidden_dim": 16, "out_dim": 8},
    "simclr": {"hidden_dim": 16, "out_dim": 8},
    "simsiam": {"dim": 16, "pred_dim": 8},
    "swav": {"nmb_prototypes": 32, "hidden_dim": 16, "out_dim": 8},
}
_IMAGES = 40


class _Backbone(nn.Module):
    num_features = 12

    def __init__(self, channels=3):
        super().__init__()
        self.linear = nn.Linear(channels, 12)
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.linear(x.mean((2, 3)))


def recipe(name="", globals_=2, **values):
    """Two global views and three local ones, or as the method needs them."""
    local = View(size=2, count=9, jigsaw=3, local=True) if name == "infomin" else View(size=4, count=3, local=True)
    values = {"color_space": "lab", **values} if name == "cmc" else values
    return ViewRecipe((View(size=8, count=globals_), local), **values)


def build(name, entropy, network=_Backbone, batch=16, views=None, **settings):
    """A small instance of a method; DeepCluster has seen its images."""
    torch.manual_seed(0)
    kind = methods.load(name)
    task = Task(entropy, recipe(name) if views is None else views, _IMAGES, batch)
    method = kind(network, kind.Settings(**{**_SMALL[name], **settings}), task)
    if method.needs_first_pass:
        for start in range(0, _IMAGES, 20):
            method.first_pass(random_views(name, 20, seed=start), torch.arange(start, start + 20))
        method.start_epoch()
    return method


def random_views(name="", batch=16, seed=1):
    """Noise in the shapes of :func:`recipe`."""
    generator = torch.Generator().manual_seed(seed)
    groups = recipe(name).groups
    return [torch.randn(count, batch, 3, size, size, generator=generator) for size, count in groups]


STEP = Step(index=0, total=100, per_epoch=10)
INDICES = torch.arange(16)


def run(method, name="", step=STEP, views=None):
    """The objective of one batch."""
    torch.manual_seed(5)
    return method(random_views(name) if views is None else views, step, INDICES)


def test_every_method_has_a_small_configuration_here():
    assert methods.names() == sorted(_SMALL)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_a_step_lowers_the_loss_and_every_trained_parameter_has_a_gradient(name, entropy):
    method = build(name, entropy)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        objective = run(method, name)
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        losses.append(objective.loss.item())
    # A queue of random rows is easy; it is full of keys after four steps.
    assert losses[-1] < losses[5 if "queue_length" in _SMALL[name] else 0]
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_a_step_in_half_precision_differs_by_rounding_only(name, entropy):
    """Autocast rounds products; what is kept from step to step stays fp32."""
    expected = run(build(name, entropy), name).loss
    method = build(name, entropy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(method, name).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.05)
    kept = [*method.parameters(), *method.buffers()]
    assert {x.dtype for x in kept if x.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_bound_is_finite_detached_and_below_its_ceiling(name, entropy):
    objective = run(build(name, entropy), name)
    bound = objective.bound
    for value in (bound.entropy, bound.reconstruction, bound.information, bound.deficit):
        assert torch.isfinite(value)
        assert not value.requires_grad
    assert bound.entropy <= bound.entropy_max + 1e-4
    assert not objective.projections.requires_grad
    torch.testing.assert_close(objective.projections.norm(dim=1), torch.ones(len(objective.projections)))


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_twin_s_loss_is_minus_the_information_it_reports(name):
    objective = run(build(name, True), name)
    information = objective.bound.information.to(objective.loss.dtype)
    torch.testing.assert_close(objective.loss.detach(), -information, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_base_and_twin_report_the_same_bound(name):
    options = {"no_centering": True} if name == "dino" else {}
    base, twin = (run(build(name, entropy, **options), name).bound for entropy in (False, True))
    torch.testing.assert_close(base.information, twin.information)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_bound_is_measured_only_when_it_is_asked_for(name, entropy):
    step = Step(index=0, total=100, per_epoch=10, measure=False)
    measured, plain = run(build(name, entropy), name), run(build(name, entropy), name, step)
    assert plain.bound is None
    assert plain.projections is None
    torch.testing.assert_close(plain.loss, measured.loss)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_what_the_teacher_gives_carries_no_gradient(name, entropy):
    method = build(name, entropy)
    run(method, name).loss.backward()
    if method.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_everything_a_run_must_remember_is_in_its_state(name, entropy):
    method, other = build(name, entropy), build(name, entropy, network=_Backbone)
    for _ in range(2):
        run(method, name)
        method.end_step(STEP)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(run(method, name).loss, run(other, name).loss, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["byol", "mocov3", "simsiam"])
def test_where_the_authors_pass_views_apart_so_do_we(name):
    method = build(name, False)
    run(method, name)
    apart = [(16, 3, 8, 8)] * 2
    assert method.student.backbone.calls == apart + [(16, 3, 4, 4)] * 3
    if method.teacher is not None:
        assert method.teacher.backbone.calls == apart


@pytest.mark.parametrize("name", ["dino", "simclr", "swav", "deepcluster"])
def test_each_resolution_is_one_forward_pass_of_each_branch(name):
    method = build(name, False)
    for branch in (method.student, method.teacher):
        if branch is not None:
            branch.backbone.calls.clear()
    run(method, name)
    assert method.student.backbone.calls == [(32, 3, 8, 8), (48, 3, 4, 4)]
    if method.teacher is not None:
        assert method.teacher.backbone.calls == [(32, 3, 8, 8)]


@pytest.mark.parametrize("name", sorted(set(_SMALL) - {"cmc", "deepcluster"}))
def test_one_global_view_is_refused(name):
    with pytest.raises(ValueError, match="needs 2 global views, the recipe has 1"):
        build(name, False, views=recipe(name, globals_=1))


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="'dinno' is unknown; choose one of byol, cmc, deepcluster, dino"):
        methods.load("dinno")


def test_views_are_cut_across_their_resolutions():
    groups = [torch.arange(4.0).view(4, 1), torch.arange(4.0, 7).view(3, 1)]
    cut = [[g.flatten().tolist() for g in slice_views(groups, a, b)] for a, b in ((0, 2), (1, 5), (5, 10), (0, 4))]
    assert cut == [[[0, 1]], [[1, 2, 3], [4]], [[5, 6]], [[0, 1, 2, 3]]]


def test_a_branch_projects_to_unit_rows_in_the_order_of_the_views():
    branch = Branch(_Backbone(), nn.Linear(12, 5))
    views = random_views(batch=4)
    z = branch(views)
    assert z.shape == (5, 4, 5)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5, 4))
    alone = branch([views[1][2:3]])
    torch.testing.assert_close(z[4], alone[0])


def test_cmc_in_rgb_takes_two_views_and_no_more():
    with pytest.raises(ValueError, match="cmc in rgb compares two views, the recipe has 5"):
        build("cmc", False, views=recipe())


def test_a_queue_that_the_batch_does_not_divide_is_refused_with_one_that_it_does():
    with pytest.raises(ValueError, match=r"--queue_length 70 is not a multiple of the batch, 16 .*; use 64"):
        build("moco", False, queue_length=70)


def test_a_queue_has_no_row_s_own_kernel_to_leave_out():
    with pytest.raises(ValueError, match="--entropy_leave_one_out: no row has a kernel in the queue"):
        build("moco", True, entropy_support="queue", entropy_leave_one_out=True)


def test_infomin_needs_its_jigsaw():
    with pytest.raises(ValueError, match="infomin needs a jigsaw view"):
        build("infomin", False, views=recipe())


def test_more_clusters_than_images_are_refused():
    with pytest.raises(ValueError, match="--nmb_prototypes 41 is more than the 32 images of an epoch"):
        build("deepcluster", False, nmb_prototypes=41)
