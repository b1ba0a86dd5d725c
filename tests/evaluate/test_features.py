"""Features of every readable image, in the data's order, and a backbone that is left as it was found."""

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.evaluate.features import extract, extract_views
from fasttrain.pipelines import Loader, View, ViewRecipe
from fasttrain.pipelines.sources.base import ArraySource, FolderSource
from tests.small_runs import write_images

_CPU = torch.device("cpu")
_VIEWS = ViewRecipe((View(size=4, scale=(1, 1), flip=0, center=True),), channels=1, mean=(0,), std=(1,))


@pytest.fixture
def source():
    """11 grey images of 4 x 4, image k of value 10 k + 3."""
    values = np.arange(11, dtype=np.uint8) * 10 + 3
    images = np.broadcast_to(values[:, None, None, None], (11, 4, 4, 1)).copy()
    return ArraySource(images, np.arange(11) % 3)


def _loader(source, views=_VIEWS, batch=4, **options):
    return Loader(source, views, batch, shuffle=False, drop_last=False, **options)


class _Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return self.norm(x).mean((2, 3)).double()


def test_rows_are_the_images_in_order(source):
    found = extract(nn.Flatten(), _loader(source), _CPU)
    expected = (torch.arange(11) * 10 + 3) / 255
    torch.testing.assert_close(found.features, expected[:, None].expand(11, 16))
    assert found.labels.tolist() == [k % 3 for k in range(11)]
    assert found.features.dtype == torch.float32


def test_a_shuffled_loader_gives_the_same_rows(source):
    plain = extract(nn.Flatten(), _loader(source), _CPU)
    shuffled = extract(nn.Flatten(), Loader(source, _VIEWS, 4, seed=3, shuffle=True, drop_last=False), _CPU)
    assert torch.equal(shuffled.features, plain.features)
    assert torch.equal(shuffled.labels, plain.labels)


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_is_left_as_it_was(source, training):
    backbone = _Backbone().train(training)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    found = extract(backbone, _loader(source), _CPU)
    assert backbone.training is training
    assert set(backbone.modes) == {False}
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert found.features.dtype == torch.float32
    assert not found.features.requires_grad


def test_the_mode_is_put_back_when_it_fails(source):
    backbone = _Backbone().train()
    backbone.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        extract(backbone, _loader(source), _CPU)
    assert backbone.training


def test_without_labels(source):
    assert extract(nn.Flatten(), _loader(ArraySource(source.images)), _CPU).labels is None


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    """They leave gaps in the numbers, which once were taken for rows."""
    root = write_images(tmp_path / "images", train=10, val=0) / "train"
    whole = FolderSource(root)
    views = ViewRecipe((View(size=8, scale=(1, 1), flip=0, center=True),))
    expected = extract(nn.Flatten(), _loader(whole, views), _CPU)
    bad = [0, 4, 6]
    for i in bad:
        with open(whole.paths[i], "wb") as file:
            file.write(b"no image")
    found = extract(nn.Flatten(), _loader(FolderSource(root), views), _CPU)
    good = [i for i in range(10) if i not in bad]
    assert torch.equal(found.features, expected.features[good])
    assert found.labels.tolist() == [int(i >= 5) for i in good]


def test_all_views_of_every_image_in_order(source):
    """View v of an image is what the loader drew for it, whichever batch it came in."""
    views = ViewRecipe((View(size=4, count=3, scale=(0.2, 0.9), jitter=(0.8, 0, 0, 0)),), 1, (0,), (1,))
    found = extract_views(nn.Flatten(), _loader(source, views, batch=4), _CPU)
    other = extract_views(nn.Flatten(), _loader(source, views, batch=11), _CPU)
    batch = next(_loader(source, views, batch=11).epoch(0))
    assert found.features.shape == (11, 3, 16)
    assert torch.equal(found.features, other.features)
    assert torch.equal(found.features, batch.views[0].flatten(2).transpose(0, 1))
    assert len(found.features.flatten(0, 1).unique(dim=0)) > 11
