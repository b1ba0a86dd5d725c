"""The interfaces of DINOv2's and DINOv3's losses, in a small trainer that calls them as theirs do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fasttrain.losses.compat import dinov2, dinov3

K, D, B, TEMP = 11, 6, 4, 0.07


def _rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _balanced(logits, temp, iterations=3):
    """Sinkhorn as the authors write it, on a matrix."""
    q = (logits / temp).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


class _Head(nn.Module):
    """A head whose last layer is weight-normalised, as DINOv2's."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(5, D)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(D, K, bias=False))

    def forward(self, x):
        return self.last_layer(normalize(self.mlp(x), dim=-1))


def _heads(seed=0):
    torch.manual_seed(seed)
    student = _Head().double()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.mlp.weight.mul_(0.5)
    return student, teacher


def _official(student, teacher, targets):
    """The losses of the trainer's calls below, with matrices; ``targets`` maps logits to assignments."""
    x, masks = _batch()
    t_cls = targets(teacher(x["global"].flatten(0, 1))).view(2, B, K)
    s_global, s_local = (
        student(x["global"].flatten(0, 1)).view(2, B, K),
        student(x["local"].flatten(0, 1)).view(3, B, K),
    )

    def crossed(t, s):
        return -(t * (s / 0.1).log_softmax(-1)).sum(-1).mean()

    local = sum(crossed(t, s) for t in t_cls for s in s_local)
    # The trainer gives the student's flattened global views and the teacher's in the other order.
    whole = crossed(t_cls.flip(0).flatten(0, 1), s_global.flatten(0, 1))
    rows = x["patches"][masks]
    per_row = -(targets(teacher(rows)) * (student(rows + 0.1) / 0.1).log_softmax(-1)).sum(-1)
    weight = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
    return local, whole, (per_row * weight).sum() / len(masks)


def _batch():
    x = {"global": _rows(2, B, 5), "local": _rows(3, B, 5, seed=1), "patches": _rows(B, 7, 5, seed=2)}
    masks = torch.zeros(B, 7, dtype=torch.bool)
    masks[0, 2:5] = masks[2, 1] = True
    return x, masks


def _trainer(student, teacher, dino, ibot, centering):
    """The calls of ``ssl_meta_arch.py`` in DINOv2, with its reshapes."""
    x, masks = _batch()
    rows = x["patches"][masks]
    with torch.no_grad():
        cls = teacher(x["global"].flatten(0, 1))
        patches = teacher(rows)
        if centering == "centering":
            t_cls = dino.softmax_center_teacher(cls, teacher_temp=TEMP).view(2, -1, *cls.shape[1:])
            dino.update_center(cls)
            t_patches = ibot.softmax_center_teacher(patches.unsqueeze(0), teacher_temp=TEMP).squeeze(0)
            ibot.update_center(patches.unsqueeze(0))
        else:
            t_cls = dino.sinkhorn_knopp_teacher(cls, teacher_temp=TEMP).view(2, -1, *cls.shape[1:])
            count = torch.tensor([len(rows)])
            t_patches = ibot.sinkhorn_knopp_teacher(patches, teacher_temp=TEMP, n_masked_patches_tensor=count)
    local = dino(
        student_output_list=student(x["local"].flatten(0, 1)).chunk(3), teacher_out_softmaxed_centered_list=t_cls
    )
    whole = dino(
        student_output_list=[student(x["global"].flatten(0, 1))],
        teacher_out_softmaxed_centered_list=[_flip(t_cls).flatten(0, 1)],
    )
    patch = ibot.forward_masked(student(rows + 0.1), t_patches, student_masks_flat=masks, n_masked_patches=len(rows))
    return local, whole, patch


def _flip(views):
    if isinstance(views, torch.Tensor):
        return views.flip(0)
    return dinov2.Targets(views.features.flip(0), views.prototypes, views.center, views.temp)


def _gradients(losses, head):
    return torch.autograd.grad(sum(weight * loss for weight, loss in enumerate(losses, 1)), list(head.parameters()))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
def test_unchanged_trainer_has_the_official_losses(centering, features):
    student, teacher = _heads()
    dino, ibot = dinov2.DINOLoss(K).double(), dinov2.iBOTPatchLoss(K).double()
    dino.center.copy_(_rows(1, K, seed=3) / 10)
    ibot.center.copy_(_rows(1, 1, K, seed=4) / 10)
    before = (dino.center.flatten().clone(), ibot.center.flatten().clone())
    expected_student, expected_teacher = copy.deepcopy(student), copy.deepcopy(teacher)

    def targets(logits):
        if centering == "sinkhorn_knopp":
            return _balanced(logits.detach(), TEMP)
        center = before[0] if len(logits) == 2 * B else before[1]
        return ((logits.detach() - center) / TEMP).softmax(-1)

    if features:
        for loss in (dino, ibot):
            dinov2.without_logits(loss, student, teacher)
    losses = _trainer(student, teacher, dino, ibot, centering)
    expected = _official(expected_student, expected_teacher, targets)
    for actual, official in zip(losses, expected, strict=True):
        torch.testing.assert_close(actual, official, rtol=1e-5, atol=1e-6)
    for actual, official in zip(_gradients(losses, student), _gradients(expected, expected_student), strict=True):
        torch.testing.assert_close(actual, official, rtol=1e-4, atol=1e-6)
    if centering == "centering":
        x, masks = _batch()
        for loss, rows, old in ((dino, x["global"].flatten(0, 1), before[0]), (ibot, x["patches"][masks], before[1])):
            moved = 0.9 * old + 0.1 * expected_teacher(rows).mean(0)
            torch.testing.assert_close(loss.center.flatten(), moved)


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("ignore", [False, True])
def test_dinov3_averages_over_pairs(ignore, features):
    student, teacher = _rows(3, B, D), _rows(2, B, D, seed=1)
    weights = _rows(K, D, seed=2), _rows(K, D, seed=3)
    probabilities = (teacher @ weights[1].T / TEMP).softmax(-1)
    log_p = (student @ weights[0].T / 0.1).log_softmax(-1)
    pairs = [(s, t) for s in range(3) for t in range(2) if not (ignore and s == t)]
    expected = -sum((probabilities[t] * log_p[s]).sum(-1).mean() for s, t in pairs) / len(pairs)
    loss = dinov3.DINOLoss(K).double()
    loss.init_weights()
    if features:
        targets = loss.softmax_center_teacher(teacher, TEMP, teacher_prototypes=weights[1])
        actual = loss(student, targets, ignore, student_prototypes=weights[0])
    else:
        actual = loss(student @ weights[0].T, probabilities, ignore)
    torch.testing.assert_close(actual, expected)


def test_whole_images_equal_their_masked_rows():
    student, teacher, masks = _rows(B, 7, K), _rows(B, 7, K, seed=1).softmax(-1), _batch()[1]
    loss = dinov2.iBOTPatchLoss(K).double()
    torch.testing.assert_close(
        loss(student, teacher, masks), loss.forward_masked(student[masks], teacher[masks], masks)
    )


def test_changed_head_keeps_its_parameters_and_can_be_copied():
    student, teacher = _heads()
    loss = dinov2.DINOLoss(K)
    count = len(list(student.parameters()))
    dinov2.without_logits(loss, student, teacher)
    dinov2.without_logits(dinov2.iBOTPatchLoss(K), student, teacher)
    assert student(_rows(3, 5)).shape == (3, D)
    assert len(list(copy.deepcopy(student).parameters())) == count
    assert all("last_layer" in name or "mlp" in name for name in student.state_dict())
    assert list(loss.state_dict()) == ["center"]


def test_one_kind_of_prototypes_alone_is_refused():
    loss = dinov2.DINOLoss(K).double()
    targets = loss.softmax_center_teacher(_rows(B, D), TEMP, teacher_prototypes=_rows(K, D))
    with pytest.raises(ValueError, match="neither"):
        loss([_rows(B, D)], [targets])
    biased = _Head()
    biased.last_layer = nn.Linear(D, K)
    with pytest.raises(ValueError, match="last_layer: must have no bias"):
        dinov2.without_logits(loss, biased, _Head())
