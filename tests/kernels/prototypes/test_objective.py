import math

import pytest
import torch

from fasttrain.kernels import (
    patch_cross_entropy,
    prototype_cross_entropy,
    prototype_entropy,
    prototype_terms,
    sinkhorn,
    sinkhorn_center,
)
from fasttrain.kernels.prototypes import cpu, launch
from fasttrain.kernels.similarity.tiles import Tile
from tests.kernels.prototypes import stress
from tests.kernels.prototypes.stress import unit_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.05}
# Views, teachers, images, prototypes, features.
SHAPES = [(2, 2, 3, 11, 5), (10, 2, 4, 1000, 16), (1, 2, 7, 2, 3), (3, 1, 1, 65, 33)]


def small_chunks(monkeypatch):
    """Several chunks of rows, each of several tiles."""
    for name, value in (("_KEPT", 0), ("_ROWS", 6), ("_AREA", 100)):
        monkeypatch.setattr(cpu, name, value)


def case(shape=(3, 2, 4, 50, 16), dtype=torch.float32, center="one", device="cpu"):
    """Student, teacher, student prototypes, teacher prototypes, and centre."""
    return list(stress.inputs("cross-entropy", shape, dtype, center, device).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", [*stress.TAUGHT, "entropies"])
@pytest.mark.parametrize("kept", [True, False])
def test_cpu_equals_the_reference(use, dtype, kept, monkeypatch):
    if not kept:
        small_chunks(monkeypatch)
    if use == "learnt temperature" and dtype == torch.float64:
        pytest.skip("its temperature is fp32; gradcheck tests it")
    for shape in SHAPES:
        for center in stress.CENTERS if use in stress.TAUGHT else ("none",):
            stress.reference(use, shape, dtype, center, "cpu", backend="cpu")


@pytest.mark.parametrize("dim", [16, 40])
def test_many_small_tiles_give_the_same(dim, monkeypatch):
    tile = Tile(16, 16, 16, 16 if dim <= 16 else 32, 4, 1)
    monkeypatch.setattr(launch, "prototype_tile", lambda *_: tile)
    monkeypatch.setattr(launch, "attention_tile", lambda *_: tile)
    monkeypatch.setattr(launch.similarity, "splits", lambda rows, programs, tiles: min(tiles, 3))
    for use in ("cross-entropy and entropy", "entropies"):
        stress.reference(use, (3, 2, 11, 70, dim), torch.float32, "one a view", DEVICE)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("weight", [torch.arange(23) % 3 == 0, torch.linspace(0, 2, 23)], ids=["mask", "weight"])
def test_patches_are_weighted(backend, weight):
    student, teacher, ws, wt = (unit_rows(count, 16, seed=k) for k, count in enumerate((23, 23, 50, 50)))
    losses = []
    for chosen, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (student, ws)]
        rows = leaves[0], teacher.to(dtype), leaves[1], wt.to(dtype)
        loss = patch_cross_entropy(*rows, weight=weight, backend=chosen, **TEMPS)
        losses.append([loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_entropies_are_weighted(backend):
    rows, prototypes = (unit_rows(count, 16, seed=k) for k, count in enumerate((23, 50)))
    weight, results = torch.linspace(0, 0.1, 23), []
    for chosen, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (rows, prototypes)]
        entropies = prototype_entropy(*leaves, temp=0.3, weight=weight, backend=chosen)
        gradients = torch.autograd.grad(0.5 * entropies[0] - 0.3 * entropies[1], leaves)
        results.append([x.detach().double() for x in (*entropies, *gradients)])
        none = prototype_entropy(*leaves, temp=0.3, weight=0 * weight, backend=chosen)
        assert [x.item() for x in none] == [0, 0]
        assert all(x.isfinite().all() for x in torch.autograd.grad(none[0] + none[1], leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    p = (rows @ prototypes.T / 0.3).softmax(1)
    mean = (weight.double()[:, None] * p).sum(0) / weight.sum()
    torch.testing.assert_close(results[1][0], -(mean * mean.log()).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
@pytest.mark.parametrize(("count", "weight"), [(0, None), (0, 1.0), (3, 0.0)])
def test_no_masked_patch_gives_0_with_zero_gradients(count, weight, backend):
    student, teacher, ws, wt = (torch.ones(n, 4, device=DEVICE).requires_grad_() for n in (count, count, 5, 5))
    temp = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    weight = weight if weight is None else torch.full((count,), weight, device=DEVICE)
    options = {"student_temp": temp, "teacher_temp": 0.1, "weight": weight, "backend": backend}
    loss = patch_cross_entropy(student, teacher, ws, wt, center=wt[:, 0], **options)
    assert loss.item() == 0
    for gradient, leaf in zip(torch.autograd.grad(loss, (student, ws, temp)), (student, ws, temp), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("frozen", ["student", "prototypes"])
def test_frozen_argument_costs_no_gradient(frozen, backend, monkeypatch):
    module, name, place = {"cpu": (cpu, "loss", slice(2, 4)), "triton": (launch, "backward", slice(0, 2))}[backend]
    original, sizes = getattr(module, name), []

    def spy(*args):
        results = original(*args)
        sizes.append([g.numel() for g in results[place]])
        return results

    monkeypatch.setattr(module, name, spy)
    student, teacher, ws, wt, _ = case((2, 2, 3, 20, 16), center="none", device=DEVICE)
    leaves = [student.requires_grad_(), ws.requires_grad_()]
    options = TEMPS | {"backend": backend}
    both = torch.autograd.grad(prototype_cross_entropy(student, teacher, ws, wt, **options), leaves)
    position = 1 if frozen == "student" else 0
    leaves[1 - position].requires_grad_(False)
    loss = prototype_cross_entropy(student, teacher, ws, wt, **options)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[position])[0], both[position])
    assert sizes == [[student.numel(), ws.numel()], [0, ws.numel()] if position else [student.numel(), 0]]


@pytest.mark.parametrize("entropy", [False, True])
def test_no_gradient_is_computed_unless_it_is_required(entropy, monkeypatch):
    monkeypatch.setattr(cpu, "_Gradients", None)
    student, teacher, ws, wt, center = (x.requires_grad_() for x in case())
    options = TEMPS | {"center": center, "entropy": entropy}
    with torch.no_grad():
        prototype_terms(student, teacher, ws, wt, **options)
    prototype_terms(student.detach(), teacher, ws.detach(), wt, **options)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_backward_passes_scale_and_repeat(kept, entropy, monkeypatch):
    """Every backward pass gives the gradient times its factor, and the same bits in another forward pass."""
    if not kept:
        small_chunks(monkeypatch)
    student, teacher, ws, wt, center = case()
    leaves = [student.requires_grad_(), ws.requires_grad_()]

    def loss():
        return prototype_terms(student, teacher, ws, wt, center=center, entropy=entropy, **TEMPS)[0]

    value = loss()
    first, tripled, again = (torch.autograd.grad(f * value, leaves, retain_graph=True) for f in (1, 3, 1))
    for a, b, c, d in zip(first, tripled, again, torch.autograd.grad(loss(), leaves), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(a, d)
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_results_that_are_not_needed_do_not_alias(taught, marginal, needs, backend):
    student, teacher, ws, wt, _ = case((2, 2, 3, 7, 5), center="none")
    of_teacher = (teacher, ws, wt) if taught else (None, ws, None)
    if taught or marginal:
        student.requires_grad_(needs[0])
        ws.requires_grad_(needs[1])
        args = (student, *of_teacher, None, None, 10.0, 20.0, False, marginal, *needs, backend)
        torch.library.opcheck(torch.ops.fasttrain.prototype_loss.default, args)


def test_learnt_temperature_does_not_mix_types(monkeypatch):
    """A learnt temperature makes bf16 rows fp32, and compiled kernels reject a product of two types.

    Regression: on an H100, fp32 values with bf16 keys needed 288 KB of shared memory at K = 65,536 and D = 256. So the
    teacher's product stays in bf16.
    """
    alike, attend, types, attended = launch._alike, launch._attend, [], []

    def spy_alike(*factors):
        types.append({x.dtype for x in alike(*factors)})
        return alike(*factors)

    def spy_attend(*tensors):
        attended.extend(x.dtype for x in tensors[:3])
        return attend(*tensors)

    monkeypatch.setattr(launch, "_alike", spy_alike)
    monkeypatch.setattr(launch, "_attend", spy_attend)
    student, *others, _ = case((2, 2, 3, 20, 16), torch.bfloat16, "none", DEVICE)
    temp = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    options = {"student_temp": temp, "teacher_temp": 0.1, "backend": "triton"}
    prototype_cross_entropy(student.requires_grad_(), *others, **options).backward()
    assert {len(kinds) for kinds in types} == {1}
    assert attended == [torch.bfloat16] * 3


@pytest.mark.parametrize("kept", [0, 1000])
def test_gradients_over_several_tiles_pass_gradcheck(kept, monkeypatch):
    small_chunks(monkeypatch)
    monkeypatch.setattr(cpu, "_KEPT", kept)
    student, teacher, ws, wt, center = case((3, 2, 3, 7, 4), torch.float64, "one a view")

    def both(student, ws, temp):
        return prototype_terms(student, teacher, ws, wt, student_temp=temp, teacher_temp=0.2, center=center)

    temp = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(both, (student.requires_grad_(), ws.requires_grad_(), temp))
    rows = student.detach().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p, t: prototype_entropy(f, p, temp=t), (rows, ws, temp))


def test_loss_compiles_into_one_graph_and_passes_opcheck():
    student, teacher, ws, wt, center = (x.requires_grad_() for x in case((3, 2, 4, 7, 5)))

    def loss(student, ws):
        loss, entropy = prototype_terms(student, teacher, ws, wt, center=center, **TEMPS)
        return loss - entropy

    losses = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, ws), loss(student, ws)
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(x, (student, ws)) for x in losses), strict=True):
        torch.testing.assert_close(a, b)
    args = (student, teacher.detach(), ws, wt.detach(), center.detach()[None], None, 10.0, 20.0, False)
    for marginal in (False, True):
        torch.library.opcheck(torch.ops.fasttrain.prototype_loss.default, (*args, marginal, True, True, "cpu"))


def test_second_derivative_is_an_error():
    student, *others, _ = case((2, 2, 3, 5, 4), torch.float64, "none")
    loss = prototype_cross_entropy(student.requires_grad_(), *others, **TEMPS)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), student)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_autocast_changes_no_bit(backend):
    student, teacher, ws, wt, center = case()
    options = TEMPS | {"center": center, "backend": backend}

    def results():
        rows = student.detach().requires_grad_()
        terms = prototype_terms(rows, teacher, ws, wt, **options)
        patches = patch_cross_entropy(rows[0], teacher[0], ws, wt, **options)
        terms = [*terms, patches, *prototype_entropy(rows[0], ws, temp=0.1, backend=backend)]
        return *terms, *torch.autograd.grad(sum(terms), rows)

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward = results()[:-1] if backend == "eager" else results()
    assert all(torch.equal(a, b) for a, b in zip(forward, expected, strict=backend != "eager"))


@pytest.mark.parametrize("entropy", [False, True])
def test_no_logits_are_stored(entropy):
    """Checks the largest allocation apart from the prototypes' gradient: 2,000 rows, 4,000 prototypes."""
    student, teacher, ws, wt, center = (x.requires_grad_() for x in case((10, 2, 200, 4000, 8)))
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = prototype_terms(student, teacher, ws, wt, center=center, entropy=entropy, **TEMPS)
        sum(x.sum() for x in loss).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cpu._ROWS * 4000 < 4 * 2000 * 4000 / 7


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
def test_entropies_have_their_known_extremes(backend):
    """Uniform rows, equal one-hot rows, and distinct one-hot rows."""
    prototypes = unit_rows(64, 16, seed=0).float()
    for rows, columns, temp, expected in (
        (torch.zeros(6, 16), prototypes, 0.1, (math.log(64), math.log(64))),
        (torch.eye(16)[:1].expand(6, 16), torch.eye(16), 1e-3, (0, 0)),
        (torch.eye(16), torch.eye(16), 1e-3, (math.log(16), 0)),
    ):
        for entropy, value in zip(prototype_entropy(rows, columns, temp=temp, backend=backend), expected, strict=True):
            assert entropy.item() >= 0
            assert entropy.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
    features = torch.eye(16)[:2].requires_grad_()
    marginal, _ = prototype_entropy(features, torch.eye(16) * 1000, temp=0.1, backend=backend)  # most are never chosen
    assert marginal.isfinite()
    assert torch.autograd.grad(marginal, features)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nan_stays_in_the_gradient_of_its_row(backend):
    student, *others, _ = case((2, 1, 3, 20, 16), center="none")
    student[1, 2, 0] = torch.nan
    prototype_cross_entropy(student.requires_grad_(), *others, backend=backend, **TEMPS).backward()
    assert student.grad[..., 0].isnan().tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (6, 2), (3, 1)])
def test_cross_entropy_equals_the_loop_of_dino(views, teachers, backend):
    """DINO's official code: a double loop over views that skips equal ones. The teacher has no gradient."""
    student, teacher, ws, wt, center = case((views, teachers, 4, 7, 5), torch.float64)
    leaves = [x.requires_grad_() for x in (student, ws, teacher)]
    loss = prototype_cross_entropy(student, teacher, ws, wt, center=center, backend=backend, **TEMPS)
    terms = []
    for t in range(teachers):
        target = ((teacher[t] @ wt.T - center) / 0.05).softmax(-1).detach()
        predictions = [(student[s] @ ws.T / 0.1).log_softmax(-1) for s in range(views) if s != t]
        terms += [(-target * prediction).sum(-1).mean() for prediction in predictions]
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (loss, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_sinkhorn_codes_equal_a_softmax_with_centre():
    """SwAV's loss with codes equals the prototype cross-entropy with the column potential as centre."""
    z, w = unit_rows(4, 16, 5, seed=0).float(), unit_rows(7, 5, seed=1).float()
    losses = []
    for i in range(2):
        codes = sinkhorn(z[i] @ w.T, epsilon=0.05)
        losses += [-(codes * (z[v] @ w.T / 0.1).log_softmax(-1)).sum(-1).mean() for v in range(4) if v != i]
    center = torch.stack([sinkhorn_center(z[i] @ w.T, epsilon=0.05) for i in range(2)])
    loss = prototype_cross_entropy(z, z[:2], w, w, center=center, **TEMPS)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


VIEWS = {"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)}
ROWS = {"student": torch.ones(3, 4), "teacher": torch.ones(3, 4)}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (prototype_cross_entropy, VIEWS | {"student": torch.ones(2, 4)}, r"^student .*\(2, 4\)"),
        (prototype_cross_entropy, VIEWS | {"teacher": torch.ones(2, 0, 4)}, r"^teacher .*\(2, 0, 4\)"),
        (
            prototype_cross_entropy,
            VIEWS | {"teacher": torch.ones(2, 5, 4)},
            r"B and D, got \(2, 3, 4\) and \(2, 5, 4\)",
        ),
        (prototype_cross_entropy, VIEWS | {"student_prototypes": torch.ones(0, 4)}, "^student_prototypes "),
        (prototype_cross_entropy, VIEWS | {"teacher_prototypes": torch.ones(7, 4)}, r"got \(6, 4\) and \(7, 4\)"),
        (prototype_cross_entropy, VIEWS | {"center": torch.ones(5)}, r"^center .*\(5,\)"),
        (prototype_cross_entropy, VIEWS | {"student_temp": 0.0}, "^student_temp .*got 0"),
        (prototype_cross_entropy, VIEWS | {"teacher_temp": -1.0}, "^teacher_temp .*got -1"),
        (prototype_cross_entropy, {name: x[:1] for name, x in VIEWS.items()}, "no two different views"),
        (patch_cross_entropy, ROWS | {"teacher": torch.ones(2, 4)}, r"same shape, got \(3, 4\) and \(2, 4\)"),
        (patch_cross_entropy, ROWS | {"weight": torch.ones(2)}, r"^weight .*\[3\], got \(2,\)"),
    ],
)
def test_invalid_argument_is_named(function, change, message, backend):
    prototypes = {f"{name}_prototypes": torch.ones(6, 4) for name in VIEWS}
    with pytest.raises(ValueError, match=message):
        function(**prototypes | TEMPS | change, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", stress.KINDS)
@pytest.mark.parametrize("use", stress.USES)
def test_check_for_gpus_accepts_the_kernels(use, kind, dtype, monkeypatch):
    if use.startswith("sinkhorn") and kind == "strided rows":
        pytest.skip("it takes scores, not rows")
    monkeypatch.setattr(stress, "REPEATS", 2)
    stress.KINDS[kind](use, (3, 2, 3, 21, 20), dtype, "one a view", DEVICE)


@pytest.mark.parametrize("center", stress.CENTERS)
@pytest.mark.parametrize("shape", [(1, 2, 5, 3, 17), (4, 2, 9, 150, 24)])
def test_triton_equals_the_reference_for_other_shapes(shape, center):
    for use in ("cross-entropy and entropy", "entropies"):
        stress.reference(use, shape, torch.float32, center, DEVICE)


@pytest.mark.parametrize("use", stress.USES)
def test_check_for_gpus_detects_a_wrong_result(use):
    drawn = stress.inputs(use, (3, 2, 3, 21, 20), torch.float32)
    expected = stress.results(use, "eager", stress.exact(drawn))
    stress.compare(expected, expected, torch.float32, use)
    for part, value in expected.items():
        with pytest.raises(AssertionError, match=f"{use}, {part}: RMS ratio"):
            stress.compare(expected | {part: 1.001 * value}, expected, torch.float32, use)
