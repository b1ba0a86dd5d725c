"""Tests of all losses together: values of peers, half precision, state, backends and invalid arguments."""

import math

import pytest
import torch

from fasttrain import losses
from fasttrain.losses.base import unit_pair, unit_rows
from fasttrain.losses.compat.dino import DINOLoss as CompatDINOLoss
from fasttrain.losses.compat.info_nce import InfoNCE
from fasttrain.losses.compat.open_clip import ClipLoss
from fasttrain.losses.info_nce import symmetric_info_nce
from fasttrain.losses.views import count_pairs, stack_views
from tests.losses.pairs import draw, golden_pair, unit


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (losses.InfoNCELoss(), 3.6847536887636574),  # info-nce-pytorch 0.1.4
        (InfoNCE(), 3.6847536887636574),
        (losses.NTXentLoss(), 2.8516984563063827),  # lightly 1.6
        (losses.NTXentLoss(0.1), 4.97905201050417),
        (losses.NegativeCosineSimilarity(), 0.01726786574965613),
    ],
)
def test_loss_equals_the_value_of_the_peer(loss, value):
    result = loss(*golden_pair())
    assert result.shape == ()
    assert result.item() == pytest.approx(value, rel=1e-12)


HALF_PRECISION = {
    "info_nce": (InfoNCE, lambda: (*golden_pair(), draw(32, 16, seed=3)), {}),
    "nt_xent": (lambda: losses.NTXentLoss(0.1), golden_pair, {}),
    "nt_xent_bank": (lambda: losses.NTXentLoss(0.1, (64, 16)), golden_pair, {}),
    "simsiam": (losses.SimSiamLoss, lambda: golden_pair() * 2, {}),
    "dino": (lambda: losses.DINOLoss(1000), lambda: (_rows(2) @ _prototypes().T, _rows(4) @ _prototypes().T), {}),
    "dino_prototypes": (
        lambda: losses.DINOLoss(1000),
        lambda: (_rows(2), _rows(4)),
        {"teacher_prototypes": lambda: _prototypes(), "student_prototypes": lambda: _prototypes()},
    ),
    # Scores reach 1, and exp(1 / 0.05) is infinite in fp16.
    "swav": (losses.SwaVLoss, lambda: (_rows(2) @ _rows(2)[0].T, _rows(1) @ _rows(2)[0].T), {}),
    "swav_prototypes": (losses.SwaVLoss, lambda: (_rows(2), _rows(1)), {"prototypes": lambda: _rows(2)[0]}),
}


def _rows(views):
    return unit(draw(views, 32, 16, seed=views))


def _prototypes():
    return unit(draw(1000, 16, seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_half_precision_sums_in_fp32(name, dtype):
    build, inputs, prototypes = HALF_PRECISION[name]
    leaves = [x.to(dtype).requires_grad_() for x in inputs()]
    extra = {key: draw_prototypes().to(dtype) for key, draw_prototypes in prototypes.items()}
    torch.manual_seed(0)
    loss, exact = build(), build().double()
    exact.load_state_dict(loss.state_dict())
    result = loss(*(list(x) if x.ndim == 3 else x for x in leaves), **extra)
    result.backward()
    expected = exact(
        *(list(x.detach().double()) if x.ndim == 3 else x.detach().double() for x in leaves),
        **{key: x.double() for key, x in extra.items()},
    )
    assert result.dtype == torch.float32
    # bf16 has 8 bits: a peer that rounds the logits is 0.4 % off here.
    assert result.item() == pytest.approx(expected.item(), rel=5e-3)
    gradients = [x.grad for x in leaves if x.grad is not None]
    assert gradients
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


def test_logits_beyond_the_range_of_fp16_are_finite():
    logits = [torch.full((2, 4), 300.0).half().index_fill(1, torch.tensor([1]), -300.0)] * 2
    assert losses.DINOLoss(4)(logits, logits).isfinite()  # 300 / 0.04 is no number of fp16


VIEWS = [draw(8, 16, seed=seed) for seed in range(2)]
STATES = {
    "moco": (lambda: losses.MoCoLoss(memory_bank_size=(16, 16)), VIEWS, {"memory_bank.bank", "memory_bank.bank_ptr"}),
    "nt_xent": (
        lambda: losses.NTXentLoss(memory_bank_size=(24, 16)),
        VIEWS,
        {"memory_bank.bank", "memory_bank.bank_ptr"},
    ),
    "nt_xent_without_bank": (losses.NTXentLoss, VIEWS, set()),
    "cmc": (lambda: losses.CMCMemoryLoss(40, 16, negatives=11), [VIEWS, torch.arange(8)], {"memory.bank"}),
    "dino": (lambda: losses.DINOLoss(16), [VIEWS, VIEWS], {"center"}),
    "dino_compat": (lambda: CompatDINOLoss(16, 2, 0.04, 0.04, 0, 1), [*VIEWS, 0], {"center"}),
    "info_nce": (losses.InfoNCELoss, VIEWS, set()),
    "info_nce_learnt": (lambda: losses.InfoNCELoss(0.07, learnable_temperature=True), VIEWS, {"logit_scale"}),
    "swav": (losses.SwaVLoss, [VIEWS, []], set()),
    "moco_v3": (losses.MoCoV3Loss, VIEWS * 2, set()),
}


@pytest.mark.parametrize("name", STATES)
def test_loss_resumes_from_its_state_dict(name, tmp_path):
    build, inputs, names = STATES[name]
    loss, fresh = build(), build()
    first = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    loss(*first)
    assert loss.state_dict().keys() == names
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    fresh.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    values = []
    for one in (loss, fresh):
        torch.manual_seed(1)
        values.append(one(*inputs))
    assert torch.equal(*values)


def test_bank_refuses_a_state_dict_without_it():
    with pytest.raises(RuntimeError, match="bank_ptr"):
        losses.MemoryBankModule((10, 3)).load_state_dict({})


@pytest.mark.parametrize(
    ("kind", "options", "inputs"),
    [
        (losses.NTXentLoss, {}, 2),
        (losses.NTXentLoss, {"memory_bank_size": (8, 3)}, 2),
        (losses.InfoNCELoss, {}, 2),
        (losses.InfoNCELoss, {}, 3),
        (losses.InfoNCELoss, {"symmetric": True}, 2),
        (losses.MoCoLoss, {"memory_bank_size": (8, 3)}, 2),
        (losses.MoCoV3Loss, {}, 4),
        (losses.EntropyReconstructionLoss, {}, 2),
        (losses.CMCLoss, {}, None),
        (losses.CMCMemoryLoss, {"num_images": 8, "dim": 3}, None),
    ],
)
def test_loss_passes_its_backend_to_the_kernels(kind, options, inputs):
    x = draw(4, 3)
    index = [torch.arange(4)] if kind is losses.CMCMemoryLoss else []
    arguments = [[x, x], *index] if inputs is None else [x] * inputs
    kind(**options)(*arguments)
    with pytest.raises(ValueError, match=r"backend must be one of .*'cuda'"):
        kind(**options, backend="cuda")(*arguments)


def _dino(student_output, teacher_output, epoch):
    return CompatDINOLoss(6, 3, 0.04, 0.04, 0, 2)(student_output, teacher_output, epoch)


def _paired(*shapes):
    return InfoNCE(negative_mode="paired")(*(draw(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.InfoNCELoss(0), "temperature must be positive and finite"),
        (lambda: losses.InfoNCELoss(math.inf), "temperature must be positive and finite"),
        (lambda: losses.InfoNCELoss(0.005, learnable_temperature=True), r"temperature: .*1/100.*0\.005"),
        (lambda: symmetric_info_nce(draw(4, 3), draw(4, 3), temperature=0), "temperature must be positive"),
        (lambda: losses.NTXentLoss(1e-9), "Illegal temperature"),
        (lambda: losses.NTXentLoss(math.nan), "Illegal temperature"),
        (lambda: losses.NTXentLoss(memory_bank_size=4096), "lacks the feature dimension"),
        (lambda: losses.MoCoLoss(memory_bank_size=0), "MoCoLoss needs a queue"),
        (lambda: losses.MoCoLoss(memory_bank_size=4096), "lacks the feature dimension"),
        (lambda: losses.MoCoLoss(0), "temperature must be positive"),
        (lambda: losses.MoCoV3Loss(0), "temperature must be positive"),
        (lambda: losses.MemoryBankModule(-1), "size -1, all entries must be non-negative"),
        (lambda: losses.MemoryBankModule((8, -2)), r"size \(8, -2\), all entries must be non-negative"),
        (lambda: losses.MemoryBankModule((8,)), r"size \(8,\): pass \(num_features, dim\)"),
        (lambda: losses.MemoryBankModule((8, 2, 2)), r"size \(8, 2, 2\): pass"),
        (lambda: losses.InstanceBank(0, 4), "above 0, got 0, 4 and 2"),
        (lambda: losses.InstanceBank(4, 4, momentum=-0.1), "momentum must be in"),
        (lambda: losses.InstanceBank(4, 4, momentum=1.0), "momentum must be in"),
        (lambda: losses.CMCLoss(graph="ring"), "graph must be 'full' or 'core', got 'ring'"),
        (lambda: losses.CMCLoss(0), "temperature must be positive"),
        (lambda: losses.CMCMemoryLoss(40, 5, negatives=0), "at least 2 views and 1 negative, got 2 and 0"),
        (lambda: losses.EntropyReconstructionLoss(0), "kappa must be positive"),
        (lambda: losses.EntropyReconstructionLoss(support="torus"), "support must be one of sphere, discrete"),
        (lambda: losses.EntropyReconstructionLoss(estimator="joe"), "estimator must be one of average, expectation"),
        (lambda: losses.EntropyReconstructionLoss(support="discrete", leave_one_out=True), "leave_one_out"),
        (lambda: losses.SwaVLoss(0), "temperature must be positive"),
        (lambda: losses.SwaVLoss(sinkhorn_epsilon=-1), "sinkhorn_epsilon must be positive"),
        (lambda: losses.SwaVLoss(sinkhorn_iterations=-1), "sinkhorn_iterations must be at least 0, got -1"),
        (lambda: losses.DINOLoss(4, student_temp=0), "student_temp must be positive"),
        (lambda: losses.DINOLoss(4, teacher_temp=-0.1), "teacher_temp must be positive"),
        (lambda: losses.DINOLoss(4, warmup_teacher_temp=math.nan), "warmup_teacher_temp must be positive"),
        (lambda: losses.DINOLoss(4, center_momentum=1.1), r"center_momentum must be in \[0, 1\], got 1.1"),
        (lambda: losses.DINOLoss(4, center_mode="median"), "Unknown mode 'median'"),
        (lambda: CompatDINOLoss(6, 1, 0.04, 0.04, 0, 1), "ncrops must be at least 2, got 1"),
        (lambda: CompatDINOLoss(6, 2, 0.04, 0.04, 5, 4), "warmup_teacher_temp_epochs must be from 0 to nepochs = 4"),
        (lambda: CompatDINOLoss(6, 2, 0.0, 0.04, 0, 1), "warmup_teacher_temp must be positive"),
        (lambda: CompatDINOLoss(6, 2, 0.04, 0.0, 0, 1), "teacher_temp must be positive"),
        (lambda: InfoNCE(0), "temperature must be positive"),
        (lambda: InfoNCE(reduction="average"), "reduction must be one of none, sum, mean, got 'average'"),
        (lambda: InfoNCE(negative_mode="both"), "negative_mode must be one of unpaired, paired, got 'both'"),
        (lambda: ClipLoss(use_horovod=True), "use_horovod=True is not supported"),
    ],
)
def test_invalid_option_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


X = draw(4, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: unit_rows(torch.zeros(4), "query"), r"query must be \[N, D\].*\(4,\)"),
        (lambda: unit_rows(torch.ones(2, 2, dtype=torch.long), "key"), r"key must be floating point, got torch\.int64"),
        (lambda: unit_pair(X, draw(2, 3), "out0", "out1"), r"out0 and out1 must have the same shape, got \(4, 3\)"),
        (lambda: losses.InfoNCELoss()(X, draw(5, 3)), "query and positive_key must have the same shape"),
        (lambda: losses.InfoNCELoss()(X, X, draw(8, 3, 16)), r"negative_keys must be \[N, D\]"),
        (lambda: losses.InfoNCELoss()(X, X, draw(8, 15)), "query and negative_keys must have the same D"),
        (lambda: losses.InfoNCELoss(symmetric=True)(X, X, X), "negative_keys: "),
        (lambda: losses.NTXentLoss()(X, draw(5, 3)), r"out0 and out1 must have the same shape"),
        (lambda: losses.MoCoLoss(memory_bank_size=(8, 3))(X, draw(3, 3)), "query and key must have the same shape"),
        (lambda: losses.MoCoV3Loss()(X, X, draw(3, 3), X), "query1 and key0 must have the same shape"),
        (lambda: losses.CMCLoss()([X]), "at least 2 views, got 1"),
        (lambda: losses.CMCLoss()([X, draw(5, 3)]), "view 0 and view 1 must have the same shape"),
        (lambda: losses.CMCMemoryLoss(40, 3)([X] * 3, torch.arange(4)), "the memory holds 2 views, got 3"),
        (lambda: losses.CMCMemoryLoss(40, 3)([X] * 2, torch.arange(6)), r"index must be int64 \[4\], got torch.int64"),
        (lambda: losses.CMCMemoryLoss(40, 3)([X] * 2, torch.arange(4.0)), "index must be int64"),
        (lambda: losses.EntropyReconstructionLoss()(X, draw(5, 3)), "z0 and z1 must have the same shape"),
        (lambda: losses.EntropyReconstructionLoss(support="discrete")(X, draw(5, 3)), "z0 and z1 must have the same"),
        (lambda: losses.EntropyReconstructionLoss(leave_one_out=True)(X[:1], X[:1]), "at least 2 rows"),
        (lambda: losses.EntropyReconstructionLoss().terms(X, X, normalizer="none"), "normalizer must be 'exact' or"),
        (lambda: losses.SimSiamLoss()(X, X, X, X[:2]), r"prediction0.*projection1"),
        (lambda: stack_views([], "x"), "x must hold at least one view"),
        (lambda: stack_views([X, X, draw(3, 5)], "x"), r"x\[0\] and x\[2\] must have the same shape"),
        (lambda: stack_views([X, X.half()], "x"), r"x\[0\] and x\[1\] must have one type"),
        (lambda: stack_views([draw(3, 2, 2)], "x"), r"x\[0\] must be \[N, D\]"),
        (lambda: stack_views([torch.zeros(3, 2, dtype=torch.long)], "x"), "must be floating point"),
        (lambda: count_pairs(X[None], X[None], "a", "b"), "at least two views are needed.*1 in a and 1 in b"),
        (lambda: count_pairs(draw(2, 4, 3), draw(2, 5, 3), "a", "b"), "views of a and b must have the same shape"),
        (lambda: losses.SwaVLoss()([], [X]), "high_resolution_outputs must hold at least one view"),
        (lambda: losses.SwaVLoss()([X], []), "at least two views are needed"),
        (lambda: losses.SwaVLoss()([X], [draw(5, 3)]), r"high_resolution_outputs\[0\] and low_resolution_outputs\[0\]"),
        (lambda: losses.SwaVLoss()([X] * 2, [], [draw(7, 3)]), "queue_outputs: .*2 tensors.*got 1"),
        (lambda: losses.SwaVLoss()([X] * 2, [], [X, draw(7, 2)]), r"outputs\[1\] and queue_outputs\[1\]"),
        (
            lambda: losses.SwaVLoss()([X] * 2, [], prototypes=draw(7, 4)),
            r"prototypes must be \[K, D = 3\], got \(7, 4\)",
        ),
        (lambda: losses.SwaVLoss(sinkhorn_iterations=0)([X] * 2, [], prototypes=X), "sinkhorn_iterations: "),
        (lambda: _dino(draw(7, 6), draw(4, 6), 0), "student_output must be 3 views of one batch, got 7 rows"),
        (lambda: _dino(draw(6, 6), draw(5, 6), 0), "teacher_output must be 2 views of one batch, got 5 rows"),
        (lambda: _dino(draw(6, 6), draw(6, 6), 0), "must have the same shape"),
        (lambda: _dino(draw(6, 6), draw(4, 6), 2), "epoch must be from 0 to 1, got 2"),
        (lambda: InfoNCE()(X, draw(5, 3)), "query and positive_key must have the same shape"),
        (lambda: InfoNCE()(draw(4, 3, 1), X), r"query must be \[N, D\]"),
        (lambda: InfoNCE()(X, X, draw(4, 7, 3)), r"negative_keys must be \[N, D\]"),
        (lambda: _paired((4, 3), (4, 3), (7, 3)), r"paired negative_keys must be \[N, M, D\] = \(4, M > 0, 3\)"),
        (lambda: _paired((4, 3), (4, 3), (5, 7, 3)), r"paired negative_keys must be \[N, M, D\]"),
        (lambda: _paired((4, 3), (4, 3), (4, 0, 3)), "M > 0"),
    ],
)
def test_invalid_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("teacher", "student", "extra", "match"),
    [
        ((1, 3, 4), (1, 3, 4), {}, "at least two views are needed"),
        ((2, 3, 4), (2, 5, 4), {}, "views of the teacher and the student must have the same shape"),
        ((2, 3, 5), (2, 3, 5), {}, "logits must have the centre's K = 4, got 5; if these are features"),
        ((2, 3, 4), (2, 3, 4), {"teacher_temp": 0.0}, "teacher_temp must be positive"),
        ((2, 3, 5), (2, 3, 5), {"teacher_prototypes": draw(4, 5)}, "give both"),
        ((2, 3, 5), (2, 3, 5), {"teacher_prototypes": draw(6, 5), "student_prototypes": draw(4, 5)}, r"\(4, 5\), got"),
    ],
)
def test_dino_with_invalid_input_keeps_its_center(teacher, student, extra, match):
    loss = losses.DINOLoss(4).double()
    with pytest.raises(ValueError, match=match):
        loss(list(draw(*teacher)), list(draw(*student)), **extra)
    assert not loss.center.any()
