"""Shards written by other libraries (tarfile, TensorBoard's record writer, protobuf), and their index."""

import io
import json
import tarfile

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from fasttrain.pipelines.sources.shards import Window


def picture(k, size=(24, 20)):
    """Return smooth picture number ``k``."""
    coarse = np.random.default_rng(k).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def jpeg(k):
    return encode(picture(k))


def write_folder(path, count, classes):
    """Write JPEGs with the classes in turn."""
    for k in range(count):
        file = path / f"{classes[k % len(classes)]}/{k:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(k))
    return path


def write_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    """Write a tar file of (name, bytes) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(numbers, label="cls"):
    """Yield the members of one sample per number: a picture, and unless label is None its label, modulo 3."""
    for k in numbers:
        yield f"{k:04}.jpg", jpeg(k)
        if label == "cls":
            yield f"{k:04}.cls", str(k % 3).encode()
        elif label == "json":
            yield f"{k:04}.json", json.dumps({"label": k % 3, "caption": "ä"}).encode()


def _messages():
    """Return the message class of tensorflow/core/example/example.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tests", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        descriptor = file.message_type.add(name=name)
        for number, (field, kind, repeated, of) in enumerate(fields, 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            descriptor.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".tests.{of}")
        return descriptor

    message("BytesList", ("value", kinds.TYPE_BYTES, True, None))
    message("FloatList", ("value", kinds.TYPE_FLOAT, True, None))
    message("Int64List", ("value", kinds.TYPE_INT64, True, None))
    lists = [(f"{kind.lower()}_list", kinds.TYPE_MESSAGE, False, f"{kind}List") for kind in ("Bytes", "Float", "Int64")]
    message("Feature", *lists)
    features = message("Features", ("feature", kinds.TYPE_MESSAGE, True, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_OPTIONAL, type_name=".tests.Feature"
    )
    message("Example", ("features", kinds.TYPE_MESSAGE, False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tests.Example"))


Example = _messages()


def example(**features):
    """Return a serialised tf.train.Example. __ in a name becomes a slash."""
    made = Example()
    for name, value in features.items():
        feature = made.features.feature[name.replace("__", "/")]
        values = value if isinstance(value, list) else [value]
        kind = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}[type(values[0])]
        kind.value.extend(values)
    return made.SerializeToString()


def write_tfrecord(path, records):
    """Write a TFRecord file of serialised examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
    return path


def imagenet_records(numbers, first=1):
    """Yield examples like TensorFlow's ImageNet scripts. Labels begin with ``first``."""
    for k in numbers:
        yield example(
            image__height=20,
            image__object__bbox__xmin=[0.25, 0.5],
            image__colorspace=b"RGB",
            image__class__label=k % 3 + first,
            image__class__text=b"a fish, a bird " * 9,
            image__encoded=jpeg(k),
            image__filename=f"{k}.JPEG".encode(),
        )


def index_of(format_, path):
    with Window(path) as window:
        return format_.index(window)


def contents(format_, path):
    """Return the images that the index of a shard locates."""
    index, data = index_of(format_, path), path.read_bytes()
    return [data[at : at + size] for at, size in zip(index.offsets, index.sizes, strict=True)]
