import torch

from fasttrain.kernels import sinkhorn
from fasttrain.methods import Step
from tests.methods.small import INDICES, STEP, build, random_views


def _official_loss(z, prototypes, queue=None, epsilon=0.05, temperature=0.1):
    """SwAV's loss as its official code writes it: codes of each global view against all other views."""
    total = 0.0
    for i in range(2):
        rows = z[i] if queue is None else torch.cat([z[i], queue[i]])
        codes = sinkhorn(rows.detach() @ prototypes.detach().T, epsilon=epsilon)[: z.shape[1]]
        others = [v for v in range(len(z)) if v != i]
        terms = [-(codes * (z[v] @ prototypes.T / temperature).log_softmax(-1)).sum(-1).mean() for v in others]
        total = total + sum(terms) / len(terms)
    return total / 2


def test_equals_the_official_loss():
    method = build("swav", False)
    views = random_views()
    expected = _official_loss(method.student(views), method.student.prototypes())
    torch.testing.assert_close(method(views, STEP, INDICES).loss, expected, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_change_the_codes():
    """Scores in bf16 once moved a column's share by 4 %."""
    method = build("swav", False)
    codes = method.student(random_views()).detach()[:2]
    prototypes = method.student.prototypes().detach()
    expected = method.loss.centers(codes, prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.loss.centers(codes, prototypes), expected)


def test_queue_counts_once_full_and_holds_the_newest_rows():
    method = build("swav", False, queue_length=32, epoch_queue_starts=1.0)
    views = random_views(batch=16)
    late = Step(index=10, total=100, per_epoch=10)
    method(views, STEP, INDICES)
    assert int(method.queue_filled) == 0
    z = method.student(views).detach()
    for filled in (16, 32):
        method(views, late, INDICES)
        assert int(method.queue_filled) == filled
        torch.testing.assert_close(method.queue[:, :16], z[:2])
    queue = method.queue.clone()
    expected = _official_loss(method.student(views), method.student.prototypes(), queue)
    torch.testing.assert_close(method(views, late, INDICES).loss, expected, rtol=1e-5, atol=1e-5)
    assert "queue" in method.state_dict()
