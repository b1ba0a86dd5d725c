import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import patch_cross_entropy, prototype_cross_entropy, prototype_entropy, prototype_terms
from fasttrain.kernels.prototypes import cpu, launch
from fasttrain.kernels.similarity.tiles import Tile
from tests.kernels.tolerances import assert_close

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CENTERS = {"none": None, "one": (), "one a view": (2,)}


def _rows(*shape, seed):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _case(shape, center, dtype, device="cpu"):
    """Student, teacher, both prototypes and centre, drawn in fp64 and rounded."""
    views, teachers, batch, dim, count = shape
    drawn = [_rows(views, batch, dim, seed=0), _rows(teachers, batch, dim, seed=1)]
    drawn += [1.5 * _rows(count, dim, seed=2), _rows(count, dim, seed=3)]
    drawn = [t.to(device, dtype) for t in drawn]
    sizes = None if center is None else (*[teachers for _ in center], count)
    return *drawn, None if sizes is None else 0.1 * _rows(*sizes, seed=4).to(device, dtype)


def _results(tensors, backend, temps=(0.1, 0.04)):
    """Loss and entropies, and the gradients of student and prototypes through all of them."""
    student, teacher, ws, wt, center = tensors
    student, ws = (t.detach().clone().requires_grad_() for t in (student, ws))
    loss, entropy = prototype_terms(
        student, teacher, ws, wt, student_temp=temps[0], teacher_temp=temps[1], center=center, backend=backend
    )
    marginal, conditional = prototype_entropy(student.flatten(0, 1), ws, temp=0.3, backend=backend)
    (loss - 0.7 * entropy + 0.5 * marginal - 0.3 * conditional).backward()
    values = {"loss": loss, "entropy": entropy, "marginal": marginal, "conditional": conditional}
    return {k: v.detach() for k, v in values.items()} | {"dstudent": student.grad, "dprototypes": ws.grad}


def _check(backend, shape, center, dtype, device="cpu"):
    tensors = _case(shape, center, dtype, device)
    got = _results(tensors, backend)
    exact = [None if t is None else t.double() for t in tensors]
    for name, value in _results(exact, "eager").items():
        # A GPU rounds half precision probabilities before it multiplies; the CPU and the interpreter do not.
        rounded = name.startswith("d") or device == "cuda" or dtype == torch.float64
        kind = dtype if rounded else torch.float32
        least = 1e-30 if name.startswith("d") else 1.0
        # Two losses add to each gradient, each rounded to the type.
        assert_close(got[name], value, kind, 40, name, least=least)


@pytest.mark.parametrize("center", _CENTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 3, 5, 11), (10, 2, 4, 16, 1000), (1, 2, 7, 3, 2), (3, 1, 1, 33, 65)], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_the_cpu_path_equals_the_reference(shape, dtype, center, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(cpu, "_KEPT", 0)
    _check("cpu", shape, _CENTERS[center], dtype)


@pytest.mark.parametrize("center", _CENTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_equals_the_reference(dtype, center):
    _check("triton", (4, 2, 9, 24, 150), _CENTERS[center], dtype, _DEVICE)


@pytest.mark.parametrize("dim", [16, 40])
def test_triton_gives_the_same_over_many_small_tiles(dim, monkeypatch):
    tile = Tile(16, 16, 16, 16 if dim <= 16 else 32, 4, 1)
    monkeypatch.setattr(launch, "prototype_tile", lambda *args: tile)
    monkeypatch.setattr(launch, "attention_tile", lambda *args: tile)
    monkeypatch.setattr(launch, "splits", lambda rows, programs, tiles: min(tiles, 3))
    _check("triton", (3, 2, 11, dim, 70), (2,), torch.float32, _DEVICE)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["none", "mask", "weight"])
def test_patches_meet_their_own_teacher(backend, kind):
    student, teacher = (_rows(23, 16, seed=s) for s in (0, 1))
    ws, wt, center = _rows(50, 16, seed=2), _rows(50, 16, seed=3), 0.1 * _rows(50, seed=4)
    weight = {"none": None, "mask": torch.arange(23) % 3 == 0, "weight": torch.linspace(0, 2, 23)}[kind]
    found = []
    for chosen, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (student, ws)]
        others = [x.to(dtype) for x in (teacher, wt, center)]
        loss = patch_cross_entropy(
            leaves[0],
            others[0],
            leaves[1],
            others[1],
            student_temp=0.1,
            teacher_temp=0.07,
            center=others[2],
            weight=weight,
            backend=chosen,
        )
        found.append([loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_patches_that_do_not_fit_are_named():
    z, w = torch.ones(3, 4), torch.ones(5, 4)
    for change, message in (
        ({"teacher": torch.ones(2, 4)}, r"same shape, got \(3, 4\) and \(2, 4\)"),
        ({"weight": torch.ones(2)}, r"one number a row, \[3\], got \(2,\)"),
        ({"center": torch.ones(4)}, r"center must be \[5\] or \[1, 5\], got \(4,\)"),
    ):
        arguments = {"student": z, "teacher": z, "student_prototypes": w, "teacher_prototypes": w}
        with pytest.raises(ValueError, match=message):
            patch_cross_entropy(**arguments | change, student_temp=0.1, teacher_temp=0.1)


def test_rows_and_prototypes_of_two_types_reach_the_kernels_in_one():
    """A learnt temperature leaves bf16 rows in fp32; compiled kernels refuse a product of two types."""
    given = []
    original = launch._alike

    def spy(*factors):
        found = original(*factors)
        given.append([x.dtype for x in found])
        return found

    student, teacher, ws, wt, _ = _case((2, 2, 3, 16, 20), None, torch.bfloat16, _DEVICE)
    student.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_alike", spy)
        temp = torch.tensor(0.1, device=_DEVICE, requires_grad=True)
        prototype_cross_entropy(
            student, teacher, ws, wt, student_temp=temp, teacher_temp=0.1, backend="triton"
        ).backward()
    assert len(given) >= 3
    assert all(len(set(types)) == 1 for types in given)


def test_a_learnt_temperature_does_not_widen_the_teachers_product():
    """On an H100, fp32 values beside bf16 keys asked for 288 KB of shared memory at K = 65,536 and D = 256."""
    given = []
    original = launch._attend

    def spy(*tensors):
        given.append([x.dtype for x in tensors[:3]])
        return original(*tensors)

    student, teacher, ws, wt, _ = _case((2, 2, 3, 16, 20), None, torch.bfloat16, _DEVICE)
    temp = torch.tensor(0.1, device=_DEVICE, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_attend", spy)
        prototype_cross_entropy(student, teacher, ws, wt, student_temp=temp, teacher_temp=0.1, backend="triton")
    assert given == [[torch.bfloat16] * 3]


@pytest.mark.parametrize("kept", [0, 1000])
def test_gradients_pass_gradcheck_over_several_tiles_and_kept(kept, monkeypatch):
    monkeypatch.setattr(cpu, "_AREA", 40)
    monkeypatch.setattr(cpu, "_KEPT", kept)
    student, teacher, ws, wt, center = _case((3, 2, 3, 4, 7), (2,), torch.float64)

    def both(student, ws, temp):
        return prototype_terms(student, teacher, ws, wt, student_temp=temp, teacher_temp=0.2, center=center)

    temp = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    leaves = (student.requires_grad_(), ws.requires_grad_(), temp)
    assert torch.autograd.gradcheck(both, leaves)
    rows = student.detach().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p, t: prototype_entropy(f, p, temp=t), (rows, ws, temp))


def test_compiles_into_one_graph_and_passes_opcheck():
    student, teacher, ws, wt, center = (t.requires_grad_() for t in _case((3, 2, 4, 5, 7), (), torch.float32))

    def loss(student, ws):
        loss, entropy = prototype_terms(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.05, center=center)
        return loss - entropy

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, ws)
    torch.testing.assert_close(got, loss(student, ws))
    for a, b in zip(*(torch.autograd.grad(x, (student, ws)) for x in (got, loss(student, ws))), strict=True):
        torch.testing.assert_close(a, b)
    rows, weights = student.detach().flatten(0, 1).requires_grad_(), torch.full((12,), 1 / 12)
    bias = center.detach()[None]
    args = (rows, teacher.detach().flatten(0, 1), ws, wt.detach(), bias, weights, 10.0, 20.0, True, "cpu")
    torch.library.opcheck(torch.ops.fasttrain.prototype_terms.default, args)


def test_a_second_derivative_is_refused():
    student, teacher, ws, wt, _ = _case((2, 2, 3, 4, 5), None, torch.float64)
    student.requires_grad_()
    loss = prototype_cross_entropy(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.1)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), student)


def test_autocast_rounds_nothing():
    student, teacher, ws, wt, center = _case((3, 2, 4, 16, 50), (), torch.float32)
    student.requires_grad_()

    def gradient():
        loss, entropy = prototype_terms(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.05, center=center)
        return loss.detach(), torch.autograd.grad(loss - entropy, student)[0]

    expected = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradient()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_rounds_nothing_of_the_definitions():
    student, teacher, ws, wt, center = _case((3, 2, 4, 16, 50), (), torch.float32)
    temps = {"student_temp": 0.1, "teacher_temp": 0.05, "center": center, "backend": "eager"}

    def values():
        patches = patch_cross_entropy(student[0], teacher[0], ws, wt, **temps)
        entropies = prototype_entropy(student[0], ws, temp=0.1, backend="eager")
        return *prototype_terms(student, teacher, ws, wt, **temps), patches, *entropies

    expected = values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_logits_are_ever_stored():
    """The largest block of memory beside the prototypes' own gradient, in bytes: 400 rows against 20,000 prototypes."""
    student, teacher, ws, wt, center = _case((10, 2, 40, 8, 20000), (), torch.float32)
    student.requires_grad_()
    ws.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss, entropy = prototype_terms(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.05, center=center)
        (loss - entropy).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cpu._KEPT < 4 * 400 * 20000 / 3


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
def test_uniform_rows_have_entropy_log_k_and_one_hot_rows_none(backend):
    marginal, conditional = prototype_entropy(
        torch.zeros(6, 16), _rows(64, 16, seed=0).float(), temp=0.1, backend=backend
    )
    assert marginal.item() == pytest.approx(math.log(64), rel=1e-6)
    assert conditional.item() == pytest.approx(math.log(64), rel=1e-6)
    one_hot = torch.eye(16)[:1].expand(6, 16)
    for entropy in prototype_entropy(one_hot, torch.eye(16), temp=1e-3, backend=backend):
        assert 0 <= entropy.item() < 1e-6


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_nan_stays_in_the_gradient_of_its_row(backend):
    student, teacher, ws, wt, _ = _case((2, 1, 3, 16, 20), None, torch.float32)
    student[1, 2, 0] = torch.nan
    student.requires_grad_()
    prototype_cross_entropy(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.1, backend=backend).backward()
    assert student.grad[..., 0].isnan().tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.ones(2, 4)}, r"student must be \[views, B, D\], none of them 0, got \(2, 4\)"),
        ({"teacher": torch.ones(2, 0, 4)}, r"teacher must be .* got \(2, 0, 4\)"),
        ({"teacher": torch.ones(2, 5, 4)}, r"same B and D, got \(2, 3, 4\) and \(2, 5, 4\)"),
        ({"student_prototypes": torch.ones(0, 4)}, r"student_prototypes must be \[N, D\]"),
        ({"teacher_prototypes": torch.ones(7, 4)}, r"views' D = 4, got \(6, 4\) and \(7, 4\)"),
        ({"center": torch.ones(5)}, r"center must be \[6\] or \[2, 6\], got \(5,\)"),
        ({"student_temp": 0.0}, "student_temp must be positive and finite, got 0"),
        ({"teacher_temp": -1.0}, "teacher_temp must be positive and finite, got -1"),
        ({"student": torch.ones(1, 3, 4), "teacher": torch.ones(1, 3, 4)}, "no two different views"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)}
    arguments |= {"student_prototypes": torch.ones(6, 4), "teacher_prototypes": torch.ones(6, 4)}
    arguments |= {"student_temp": 0.1, "teacher_temp": 0.1} | change
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(**arguments)
