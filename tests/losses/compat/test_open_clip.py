"""ClipLoss and SigLipLoss do what open_clip's do: values and gradients, on one process and on two in all modes."""

import pytest
import torch
import torch.multiprocessing
from open_clip.loss import ClipLoss as Theirs
from open_clip.loss import SigLipLoss as TheirSigLip
from torch.nn.functional import normalize

from fasttrain.distributed.world import _free_port
from fasttrain.losses.compat.open_clip import ClipLoss, SigLipLoss

_MODES = [(local, grad) for local in (False, True) for grad in (False, True)]


def _rows(seed, count=6, dim=8, norm=1.0):
    generator = torch.Generator().manual_seed(seed)
    return norm * normalize(torch.randn(count, dim, dtype=torch.float64, generator=generator), dim=1)


def _value_and_gradients(loss, x, y, scale, **options):
    leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(scale, dtype=torch.float64))]
    value = loss(*leaves, **options)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("norm", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_one_process(scale, norm):
    x, y = _rows(0, norm=norm), _rows(1, norm=norm)
    for ours, theirs in zip(
        _value_and_gradients(ClipLoss(), x, y, scale), _value_and_gradients(Theirs(), x, y, scale), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_bias_of_all_logits_and_a_dictionary():
    x, y = _rows(0), _rows(1)
    bias = torch.tensor(-10.0, dtype=torch.float64)
    ours, theirs = (loss(x, y, 10.0, logit_bias=bias, output_dict=True) for loss in (ClipLoss(), Theirs()))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"])


def _sigmoid_loss(kind, x, y, **options):
    """Return value and gradients, of a bias too."""
    leaves = [x, y, *(torch.tensor(value, dtype=torch.float64) for value in (10.0, -5.0))]
    leaves = [t.clone().requires_grad_() for t in leaves]
    value = kind(**options)(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def test_sigmoid_loss_of_one_process():
    x, y = _rows(0), _rows(1)
    torch.testing.assert_close(_sigmoid_loss(SigLipLoss, x, y), _sigmoid_loss(TheirSigLip, x, y))
    assert SigLipLoss()(x, y, 10.0, None, output_dict=True).keys() == {"contrastive_loss"}
    with pytest.raises(ValueError, match="^dist_impl must be one of bidir, shift"):
        SigLipLoss(dist_impl="ring")


def _rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, y = (_rows(seed, 12).chunk(2)[rank] for seed in (0, 1))
    actual = {}
    for local, grad in _MODES:
        options = {"local_loss": local, "gather_with_grad": grad, "rank": rank, "world_size": 2}
        actual[local, grad] = [_value_and_gradients(kind(**options), x, y, 14.0) for kind in (ClipLoss, Theirs)]
    options = {"rank": rank, "world_size": 2}
    actual["sigmoid"] = [_sigmoid_loss(kind, x, y, **options) for kind in (SigLipLoss, TheirSigLip)]
    torch.save(actual, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.multiprocessing.spawn(_rank, (_free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("local", "grad"), _MODES)
def test_two_processes(two_ranks, local, grad):
    for actual in two_ranks:
        ours, theirs = actual[local, grad]
        for one, other in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    # The scale's gradient is averaged by the trainer: only the mean over ranks counts.
    ours, theirs = (sum(actual[local, grad][kind][3] for actual in two_ranks) for kind in (0, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_sigmoid_loss_of_two_processes(two_ranks):
    for actual in two_ranks:
        ours, theirs = actual["sigmoid"]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
