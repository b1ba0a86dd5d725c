"""What the index of a shard finds, for the tests of every format."""

from fasttrain.pipelines.sources.shards import Window


def index_of(format_, path):
    with Window(path) as window:
        return format_.index(window)


def contents(format_, path):
    index, data = index_of(format_, path), path.read_bytes()
    return [data[at : at + size] for at, size in zip(index.offsets, index.sizes, strict=True)]
