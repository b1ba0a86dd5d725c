"""Invariants of every method and its twin."""

import dataclasses

import pytest
import torch
from torch import nn

from fasttrain import methods
from fasttrain.losses.base import CrossRank
from fasttrain.methods import Branch, Step
from fasttrain.methods.branch import slice_views
from fasttrain.pipelines import View, ViewRecipe
from fasttrain.plan.trace import trace
from tests.methods.small import CASES, IMAGES, SMALL, STEP, TWINS, PlainBackbone, build, random_views, recipe, run

ALL = sorted(SMALL)


class NormBackbone(PlainBackbone):
    """The plain network with BatchNorm of its features."""

    def __init__(self, channels=3):
        super().__init__(channels)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.norm(super().forward(x))


both = pytest.mark.parametrize("entropy", [False, True], ids=["base", "twin"])
every = pytest.mark.parametrize("name", ALL)
every_case = pytest.mark.parametrize(("name", "entropy"), CASES)
every_twin = pytest.mark.parametrize("name", TWINS)


def test_every_built_in_method_has_a_small_configuration():
    assert list(methods.registry.BUILT_IN) == ALL


@every_case
def test_steps_lower_the_loss_and_reach_every_parameter(name, entropy):
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
    assert losses[-1] < losses[5 if "queue_length" in SMALL[name] else 0]
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@every_case
def test_autocast_differs_by_rounding_and_state_stays_fp32(name, entropy):
    expected = run(build(name, entropy), name).loss
    method = build(name, entropy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(method, name).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.05)
    state = [*method.parameters(), *method.buffers()]
    assert {x.dtype for x in state if x.is_floating_point()} == {torch.float32}


@both
@every_twin
def test_bound_is_finite_detached_and_below_its_ceiling(name, entropy):
    objective = run(build(name, entropy), name)
    bound = objective.bound
    for value in (bound.entropy, bound.reconstruction, bound.information, bound.deficit):
        assert torch.isfinite(value)
        assert not value.requires_grad
    assert bound.entropy <= bound.entropy_max + 1e-4
    assert not objective.projections.requires_grad
    torch.testing.assert_close(objective.projections.norm(dim=1), torch.ones(len(objective.projections)))


@every_twin
def test_twin_loss_is_minus_the_reported_information(name):
    objective = run(build(name, True), name)
    information = objective.bound.information.to(objective.loss.dtype)
    if "patch_information" in objective.logs:
        information += objective.logs["masked_share"] * objective.logs["patch_information"]
    torch.testing.assert_close(objective.loss.detach(), -information, rtol=1e-4, atol=1e-4)


@every_twin
def test_base_and_twin_report_the_same_bound(name):
    options = {"dino": {"no_centering": True}, "ibot": {"no_centering": True}}.get(name, {})
    base, twin = (run(build(name, entropy, **options), name).bound for entropy in (False, True))
    torch.testing.assert_close(base.information, twin.information)


@every_case
def test_bound_is_measured_only_on_request(name, entropy):
    step = Step(index=0, total=100, per_epoch=10, measure=False)
    measured, plain = run(build(name, entropy), name), run(build(name, entropy), name, step)
    assert plain.bound is None
    assert plain.projections is None
    torch.testing.assert_close(plain.loss, measured.loss)


@pytest.mark.parametrize("name", [name for name in ALL if methods.load(name).has_teacher])
def test_targets_of_the_teacher_carry_no_gradient(name):
    """Even if its parameters required a gradient, none would reach them through the targets."""
    method = build(name, False)
    method.teacher.requires_grad_(True)
    run(method, name).loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("name", ALL)
def test_teacher_exists_if_and_only_if_declared(name):
    assert (build(name, False).teacher is not None) is methods.load(name).has_teacher


@every_case
def test_state_dict_holds_everything_a_run_must_remember(name, entropy):
    method, other = build(name, entropy), build(name, entropy)
    for _ in range(2):
        run(method, name)
        method.end_step(STEP)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(run(method, name).loss, run(other, name).loss, rtol=0, atol=0)


@every
def test_group_reaches_every_loss_of_the_method(name):
    method = build(name, False)
    group = object()
    method.group = group
    losses = [module for module in method.modules() if isinstance(module, CrossRank)]
    assert all(module.group is group and not module.check_batches for module in losses)
    method.group = None
    assert all(module.process_group is None for module in losses)


@every
def test_settings_are_checked_by_name_and_class(name):
    fields = {field.name for field in dataclasses.fields(methods.load(name).Settings)}
    assert set(SMALL[name]) <= fields
    assert methods.load(name).bytes_between_epochs(build(name, False).settings, IMAGES) >= 0


@pytest.mark.parametrize("name", ["barlow", "byol", "mocov3", "simsiam", "vicreg"])
def test_views_pass_apart_as_in_the_official_code(name):
    method = build(name, False)
    run(method, name)
    apart = [(16, 3, 8, 8)] * 2
    assert method.student.backbone.calls == apart + [(16, 3, 4, 4)] * 3
    if method.teacher is not None:
        assert method.teacher.backbone.calls == apart


@pytest.mark.parametrize("name", ["dino", "lejepa", "simclr", "swav", "deepcluster"])
def test_each_resolution_is_one_forward_pass_per_branch(name):
    method = build(name, False)
    for branch in (method.student, method.teacher):
        if branch is not None:
            branch.backbone.calls.clear()
    run(method, name)
    assert method.student.backbone.calls == [(32, 3, 8, 8), (48, 3, 4, 4)]
    if method.teacher is not None:
        assert method.teacher.backbone.calls == [(32, 3, 8, 8)]


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"cmc", "deepcluster"}))
def test_one_global_view_is_refused(name):
    with pytest.raises(ValueError, match="--recipe: .*2 global views, got 1"):
        build(name, False, views=recipe(name, globals_=1))


def test_views_are_sliced_across_resolutions():
    groups = [torch.arange(4.0).view(4, 1), torch.arange(4.0, 7).view(3, 1)]
    slices = [(0, 2), (1, 5), (5, 10), (0, 4), (5, None)]
    parts = [[g.flatten().tolist() for g in slice_views(groups, a, b)] for a, b in slices]
    assert parts == [[[0, 1]], [[1, 2, 3], [4]], [[5, 6]], [[0, 1, 2, 3]], [[5, 6]]]


def test_branch_projects_to_unit_rows_in_the_order_of_views():
    branch = Branch(PlainBackbone(), nn.Linear(12, 5))
    views = random_views(batch=4)
    z = branch(views)
    assert z.shape == (5, 4, 5)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5, 4))
    torch.testing.assert_close(z[4], branch([views[1][2:3]])[0])


def test_branch_with_several_heads_projects_with_each():
    heads = {"cls": nn.Linear(12, 5), "patch": nn.Linear(12, 7)}
    branch = Branch(PlainBackbone(), heads)
    views = random_views(batch=4)
    assert branch.projections(views, "cls").shape == (5, 4, 5)
    assert branch.projections(views, "patch").shape == (5, 4, 7)


REFUSED = [
    ("cmc", False, {"views": recipe()}, "--recipe"),
    ("moco", False, {"queue_length": 70}, r"--queue_length.*\(16\).*Use 64"),
    ("swav", False, {"queue_length": 16, "sinkhorn_iterations": 0}, "--queue_length"),
    ("moco", True, {"entropy_support": "queue", "entropy_leave_one_out": True}, "--entropy_leave_one_out"),
    ("simclr", True, {"entropy_leave_one_out": True, "batch": 1}, "--entropy_leave_one_out"),
    ("infomin", False, {"views": recipe()}, "--recipe"),
    ("vicreg", False, {"batch": 1}, "--batch_size_per_gpu"),
    ("deepcluster", False, {"nmb_prototypes": 41}, "--nmb_prototypes.* 32 .*got 41"),
]


@pytest.mark.parametrize(("name", "entropy", "options", "flag"), REFUSED)
def test_impossible_settings_are_refused_by_flag(name, entropy, options, flag):
    with pytest.raises(ValueError, match=flag):
        build(name, entropy, **options)


WARNINGS = [
    ("simclr", True, {}, 1000, 16, ["--batch_size_per_gpu"]),
    ("simclr", True, {}, 1000, 64, []),
    ("simclr", False, {}, 1000, 16, []),
    ("moco", True, {"entropy_support": "queue"}, 1000, 16, []),
    ("dino", True, {}, 1000, 16, ["--batch_size_per_gpu"]),
    ("dino", False, {}, 31, 64, ["32 prototypes"]),
    ("swav", False, {}, 31, 64, ["32 prototypes"]),
]


@pytest.mark.parametrize(("name", "entropy", "options", "images", "batch", "expected"), WARNINGS)
def test_warnings_name_the_setting(name, entropy, options, images, batch, expected):
    lines = build(name, entropy, **options).warnings_for(images, batch)
    assert len(lines) == len(expected)
    assert all(text in line for line, text in zip(lines, expected, strict=True))


def test_keys_are_shuffled_for_batch_norm_only():
    """A plain network encodes the images where they are: every rank once received the images of all ranks."""
    views, step = random_views(), Step(3, 100, 10)
    for backbone in (PlainBackbone, NormBackbone):
        method = build("moco", False, network=backbone)
        traced = trace(method, recipe(), 4, precision="fp32", world=2)
        exchanged = [m for m in traced.messages if m.kind == "all_to_all"]
        assert len(exchanged) == (0 if backbone is PlainBackbone else 2)
        with torch.no_grad():
            torch.testing.assert_close(method.keys(views[:1], step), method.teacher.projections([views[0][:1]])[0])


@pytest.mark.parametrize(
    ("name", "entropy"), [c for c in CASES if c[0] not in ("cmc", "deepcluster", "dino", "infomin")]
)
def test_messages_of_the_loss_do_not_grow_with_the_views(name, entropy):
    """Ten crops once sent each view's rows and numbers one by one: 74 messages for SimCLR's twin."""
    views = ViewRecipe((View(size=8, count=2), View(size=4, count=8, local=True)))
    traced = trace(build(name, entropy, views=views), views, 4, precision="fp32", world=2)
    most = {"barlow": 7, "moco": 7, "ibot": 7, "dinov2": 17}.get(name, 6)  # Sinkhorn of two variables takes 12
    assert len([m for m in traced.messages if m.about == "loss and centre"]) <= most
