import pytest
import torch
from lightly.loss import KoLeoLoss as Theirs

from fasttrain.losses import KoLeoLoss
from tests.losses.pairs import draw, gradients


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("options", [{}, {"p": 3.0, "eps": 1e-4}])
def test_koleo_equals_lightly_in_value_and_gradient(options, backend):
    x = 3 * draw(30, 6)
    ours, theirs = gradients(KoLeoLoss(**options, backend=backend), x), gradients(Theirs(**options), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equal_rows_give_a_finite_loss_and_no_gradient(dtype):
    """lightly's gradient is 1e7 there, beyond fp16; in half precision 1e-8 is 0, and the gradient of log 0 infinite."""
    x = draw(6, 5)[torch.tensor([0, 0, 0, 3, 4, 5])].to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert 0.01 < x.grad.abs().max() < 10  # of the other rows


def test_invalid_options_are_named():
    for options, match in (({"p": 0}, "^p must"), ({"eps": 0.0}, "^eps must")):
        with pytest.raises(ValueError, match=match):
            KoLeoLoss(**options)
    with pytest.raises(ValueError, match="at least 2 rows"):
        KoLeoLoss()(draw(1, 4))
