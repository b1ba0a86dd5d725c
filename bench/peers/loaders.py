"""Contestants of the loader's benchmark: ours, and the peers' transforms in torch's DataLoader, with the same views.

A contestant is ``make(case, folder, threads) -> batches``. It iterates without end over the number of images per batch;
the views of the batch exist as fp32 tensors then. The images of one folder repeat, so that no side waits at the end of
an epoch. Peers get ``threads`` worker processes of one thread each. Ours gets ``threads`` threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import OURS, NotRun

_MANY = 10**6  # images per epoch


@dataclass(frozen=True)
class Case:
    """A recipe of ours with its data set."""

    name: str
    method: str
    recipe: str
    batch: int
    folder: str  # the command's option

    def views(self) -> Any:
        """Return the recipe's ViewRecipe."""
        from fasttrain.config.resolve import resolve

        return resolve(self.method, {"recipe": self.recipe, "data_path": "-"}).views


CASES = (
    Case("CIFAR-10, SimCLR 2 x 32", "simclr", "cifar", 256, "cifar10"),
    Case("ImageNet, DINO 2 x 224 + 8 x 96", "dino", "imagenet", 32, "imagenet"),
)
Make = Callable[[Case, Path, int], Iterator[int]]


def ours(case: Case, folder: Path, threads: int) -> Iterator[int]:
    from fasttrain.pipelines import FolderSource, Loader

    class Endless(FolderSource):
        """The folder's images, repeated."""

        def __len__(self) -> int:
            return _MANY

        def read(self, i: int) -> Any:
            return super().read(i % len(self.paths))

    source = Endless(folder)
    source.labels = None
    loader = Loader(source, case.views(), case.batch, threads=threads)
    epoch = 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.indices)
        epoch += 1


def lightly(case: Case, folder: Path, threads: int) -> Iterator[int]:
    """Use lightly's transforms as in its examples, with the recipe's settings."""
    from lightly.data import LightlyDataset
    from lightly.transforms import DINOTransform, SimCLRTransform

    recipe = case.views()
    normalize = {"mean": list(recipe.mean), "std": list(recipe.std)}
    if case.method == "simclr":
        transform: Any = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize)
    else:
        transform = DINOTransform(n_local_views=8, normalize=normalize)
    return _loaded(LightlyDataset(str(folder), transform=transform), case, threads)


def torchvision(case: Case, folder: Path, threads: int) -> Iterator[int]:
    """Use torchvision's transforms v2 on 8-bit tensors, their fastest form."""
    import torch
    from torchvision.transforms import v2

    recipe = case.views()
    mode = v2.InterpolationMode.BICUBIC if recipe.interpolation == "cubic" else v2.InterpolationMode.BILINEAR

    def transform(view: Any) -> Any:
        steps = [
            v2.RandomResizedCrop(view.size, view.scale, view.ratio, mode, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
            v2.RandomGrayscale(view.grey),
        ]
        if view.blur:
            window = 2 * int(-(-3 * view.blur_sigma[1] // 1)) + 1
            steps.append(v2.RandomApply([v2.GaussianBlur(window, view.blur_sigma)], view.blur))
        if view.solarize:
            steps.append(v2.RandomSolarize(128, view.solarize))
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(recipe.mean, recipe.std)])

    return _loaded(_Decoded(folder, [transform(view) for view in recipe.each]), case, threads)


def kornia(case: Case, folder: Path, threads: int) -> Iterator[int]:
    """Use kornia's augmentations on whole batches. Image by image they took 20 times as long.

    Kornia crops images of one size, without antialiasing, which its crop does not have. Images of several sizes cannot
    form a batch before the crop, so torchvision crops them.
    """
    try:
        import kornia.augmentation as K
    except ModuleNotFoundError as error:
        raise NotRun(f"{error.name} is not installed") from error
    import torch
    from torchvision.transforms import v2

    recipe = case.views()
    cubic = recipe.interpolation == "cubic"

    def transform(view: Any) -> Any:
        crop = v2.RandomResizedCrop(
            view.size, view.scale, view.ratio, v2.InterpolationMode["BICUBIC" if cubic else "BILINEAR"], antialias=True
        )
        steps = [
            K.RandomHorizontalFlip(p=view.flip),
            K.ColorJitter(*view.jitter, p=view.jitter_p),
            K.RandomGrayscale(p=view.grey),
        ]
        if view.blur:
            window = 2 * int(-(-3 * view.blur_sigma[1] // 1)) + 1
            steps.append(K.RandomGaussianBlur((window, window), view.blur_sigma, p=view.blur))
        if view.solarize:
            steps.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=view.solarize))
        after = K.ImageSequential(*steps, K.Normalize(torch.tensor(recipe.mean), torch.tensor(recipe.std)))
        mode = "BICUBIC" if cubic else "BILINEAR"
        batched = K.RandomResizedCrop((view.size, view.size), view.scale, view.ratio, mode, cropping_mode="resample")

        def apply(images: list[Any]) -> Any:
            alike = len({image.shape for image in images}) == 1
            batch = torch.stack(images if alike else [crop(image) for image in images]).float() / 255
            return after(batched(batch) if alike else batch)

        return apply

    return _loaded(_DecodedBatches(folder, [transform(view) for view in recipe.each]), case, threads, list)


CONTESTANTS: dict[str, Make] = {OURS: ours, "lightly": lightly, "torchvision": torchvision, "kornia": kornia}


class _Decoded:
    """A data set of image files. torchvision decodes an image, and each transform makes a view of it."""

    def __init__(self, folder: Path, transforms: list[Any]) -> None:
        self.paths = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Any]:
        image = self.decode(i)
        return [transform(image) for transform in self.transforms]

    def decode(self, i: int) -> Any:
        from torchvision.io import ImageReadMode, decode_image

        return decode_image(self.paths[i], ImageReadMode.RGB)


class _DecodedBatches(_Decoded):
    """A data set for transforms of a whole batch; a worker requests all indices of a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        images = [self.decode(i) for i in indices]
        return [transform(images) for transform in self.transforms]


def _loaded(dataset: Any, case: Case, workers: int, collate: Any = None) -> Iterator[int]:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=_MANY)
    loader = DataLoader(dataset, case.batch, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=collate)
    for batch in loader:
        views = batch[0] if isinstance(batch[0], list) else batch  # lightly also returns labels and names
        yield len(views[0])
