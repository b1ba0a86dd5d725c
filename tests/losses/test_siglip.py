import pytest
import torch
from open_clip.loss import SigLipLoss as OpenClip

from fasttrain.losses import SigLIPLoss
from tests.losses.pairs import draw, unit


def test_siglip_equals_open_clip_with_its_parameters():
    loss = SigLIPLoss(5.0, -2.0).double()
    x, y = 3 * draw(9, 4), draw(9, 4, seed=1)
    value = loss(x, y)
    expected = OpenClip()(unit(x), unit(y), loss.logit_scale.exp(), loss.logit_bias)
    torch.testing.assert_close(value, expected)
    parameters = list(loss.parameters())
    torch.testing.assert_close(torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters))
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale", "logit_bias"]


def test_invalid_argument_is_named():
    for options, match in (({"scale": 0.0}, "^scale must be positive"), ({"bias": float("nan")}, "^bias must be")):
        with pytest.raises(ValueError, match=match):
            SigLIPLoss(**options)
    with pytest.raises(ValueError, match="^x and y must have the same shape"):
        SigLIPLoss()(draw(4, 3), draw(5, 3))
