"""Features of every readable image, in the order of the data."""

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
    return Loader(source, views, batch, **{"shuffle": False, "drop_last": False, **options})


class _Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return self.norm(x).mean((2, 3)).double()


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 3}])
def test_extract_returns_rows_in_the_data_s_order(source, options):
    features = extract(nn.Flatten(), _loader(source, **options), _CPU)
    expected = (torch.arange(11) * 10 + 3) / 255
    torch.testing.assert_close(features.features, expected[:, None].expand(11, 16))
    assert features.labels.tolist() == [k % 3 for k in range(11)]
    assert extract(nn.Flatten(), _loader(ArraySource(source.images)), _CPU).labels is None


@pytest.mark.parametrize("training", [True, False])
def test_extract_leaves_the_backbone_unchanged(source, training):
    backbone = _Backbone().train(training)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    rows = extract(backbone, _loader(source), _CPU).features
    assert backbone.training is training
    assert set(backbone.modes) == {False}
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_extract_that_fails_restores_the_mode(source):
    backbone = _Backbone().train()
    backbone.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        extract(backbone, _loader(source), _CPU)
    assert backbone.training


def test_extract_leaves_unreadable_files_out(tmp_path):
    """Gaps in the image numbers were once taken for rows."""
    root = write_images(tmp_path / "images", train=10, val=0) / "train"
    whole = FolderSource(root)
    views = ViewRecipe((View(size=8, scale=(1, 1), flip=0, center=True),))
    expected = extract(nn.Flatten(), _loader(whole, views), _CPU)
    for i in (0, 4, 6):
        with open(whole.paths[i], "wb") as file:
            file.write(b"no image")
    features = extract(nn.Flatten(), _loader(FolderSource(root), views), _CPU)
    good = [1, 2, 3, 5, 7, 8, 9]
    assert torch.equal(features.features, expected.features[good])
    assert features.labels.tolist() == [int(i >= 5) for i in good]


def test_extract_views_does_not_depend_on_the_batch(source):
    views = ViewRecipe((View(size=4, count=3, scale=(0.2, 0.9), jitter=(0.8, 0, 0, 0)),), 1, (0,), (1,))
    rows, other = (extract_views(nn.Flatten(), _loader(source, views, batch), _CPU).features for batch in (4, 11))
    batch = next(_loader(source, views, batch=11).epoch(0))
    assert rows.shape == (11, 3, 16)
    assert torch.equal(rows, other)
    assert torch.equal(rows, batch.views[0].flatten(2).transpose(0, 1))
    assert len(rows.flatten(0, 1).unique(dim=0)) > 11
