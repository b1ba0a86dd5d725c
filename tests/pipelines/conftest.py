import pytest

from fasttrain.pipelines import Loader

from .sources.shard_files import jpeg


@pytest.fixture
def folder(tmp_path):
    """Twelve JPEGs of 24 x 20 pixels in two classes."""
    for k in range(12):
        path = tmp_path / f"data/{'ab'[k % 2]}/{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(k))
    return tmp_path / "data"


@pytest.fixture
def open_loader():
    """Make loaders that are closed at the end of the test."""
    opened = []

    def make(source, recipe, batch_size, **options):
        opened.append(Loader(source, recipe, batch_size, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()
