"""The findings about a source of images, as data: counts, labels, files that are left out, and a digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from .scan import SUFFIXES

if TYPE_CHECKING:
    from .base import Source

# Pictures, videos and packed archives. Other files next to images, such as texts, are no loss.
_PICTURES = (
    ".gif .avif .ppm .pgm .pbm .pnm .pfm .jp2 .j2k .jpx .jpf .jxl .jxr .heic .heif .hif .svg .ico .icns .tga .psd .eps "
    ".dds .exr .hdr .pcx .sgi .ras .xbm .xpm .fits .dcm .dicom .nii .mha .nrrd .svs .ndpi .czi .raw .cr2 .cr3 .nef "
    ".arw .dng .orf .rw2 .npy .npz .mp4 .avi .mov .mkv .webm .gz .tgz .bz2 .xz .zst .zip .7z .rar"
)
_KNOWN = frozenset((*_PICTURES.split(), *SUFFIXES))
_SPLIT = re.compile(
    r"(train|trn|training|val|valid|validation|test|testing)([ _-]?(set|data|images))?|dev|eval|evaluation|extra"
    r"|hold[ _-]?out|held[ _-]?out|(un)?label(l)?ed([ _-]?(set|data|images))?",
    re.IGNORECASE,
)
_SAMPLED = 16  # images in memory whose content is part of the digest


@dataclass(frozen=True)
class Listing:
    """The findings about one source."""

    images: int
    classes: tuple[str, ...] = ()
    labels_from: str = ""
    """The origin of the labels, such as ``sub-folders``. Empty without labels."""
    unlabelled: str = ""
    """The reason why there are no labels, if it is known."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files with other extensions: the number by extension, in lower case. An empty text is no extension."""
    special: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """FIFOs, sockets, devices and circular links: the number, and the first path, by kind."""
    split_like: tuple[str, ...] = ()
    """Class folders named like splits, such as Training, if at least half of the classes are."""
    links_back: tuple[str, ...] = ()
    """Links to a folder that is above or was listed already. They are not followed."""
    notes: tuple[str, ...] = ()
    """Decisions about names of images or kinds of labels, a sentence each."""
    digest: str = ""
    """A hash of names, sizes in shards, labels and classes. It is the same for the same listing on another rank."""

    @property
    def pictures_left_out(self) -> dict[str, int]:
        """Files that are left out although they are pictures or videos, the most frequent format first."""
        left_out = {name: count for name, count in self.left_out.items() if _last(name) in _KNOWN}
        return dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Summary:
    """The findings about a data set: its training images and its held-out images."""

    name: str
    train: Listing
    val: Listing | None = None
    unused: tuple[str, ...] = ()
    """Content next to ``train/`` that is not read: ``test/`` or ``3 images``."""

    @property
    def held_out(self) -> int:
        """Number of held-out images."""
        return 0 if self.val is None else self.val.images

    @property
    def digest(self) -> str:
        """A hash of both listings, for ranks to compare."""
        return digest_of(self.train.digest, "" if self.val is None else self.val.digest)


def listing_of(source: Source) -> Listing:
    """Return a source's own listing, or the facts that every source has."""
    own: Any = getattr(source, "listing", None)
    if isinstance(own, Listing):
        return own
    return Listing(
        len(source),
        tuple(source.classes),
        labels_from="" if source.labels is None else "the source",
        digest=sampled_digest(source),
    )


def split_like(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes with the name of a split, if they are at least half of all classes.

    ``train`` is also a vehicle: one such class among many is none.
    """
    named = tuple(name for name in classes if _SPLIT.fullmatch(name))
    return named if 2 * len(named) >= len(classes) else ()


def digest_of(*parts: str | bytes | Iterable[str]) -> str:
    """Return a short hash of texts, bytes and lists of texts."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = part.encode(errors="surrogateescape")
        elif not isinstance(part, bytes):
            part = repr(list(part)).encode(errors="surrogateescape")
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def label_digest(source: Source) -> str:
    """Return a hash of a source's number of images, labels and classes."""
    labels = b"" if source.labels is None else source.labels.tobytes()
    return digest_of(f"{len(source)} {source.channels} {source.encoded}", labels, source.classes)


def sampled_digest(source: Source) -> str:
    """Return a hash of labels, classes and the content of a few images, for images without names."""
    contents = []
    for i in range(0, len(source), max(1, len(source) // _SAMPLED)):
        with suppress(OSError, DataError):  # an unreadable image has no content
            contents.append(digest_of(source.read(i).tobytes()))
    return digest_of(label_digest(source), contents)


def _last(extension: str) -> str:
    """Return ``.png`` of ``.seg.png``."""
    return "." + extension.rpartition(".")[2]
