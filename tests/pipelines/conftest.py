import pytest

from fasttrain.pipelines import Loader

from .sources.shard_files import write_folder


@pytest.fixture
def folder(tmp_path):
    """Twelve JPEGs of 24 x 20 pixels in two classes."""
    return write_folder(tmp_path / "data", 12, "ab")


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
