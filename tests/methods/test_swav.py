import torch

from tests.methods.small import build, random_views


def test_autocast_does_not_change_the_codes():
    """Scores in bf16 once moved a column's share by 4 %."""
    method = build("swav", False)
    codes = method.student(random_views()).detach()[:2]
    prototypes = method.student.prototypes().detach()
    expected = method.loss.centers(codes, prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.loss.centers(codes, prototypes), expected)
