"""The DALI part of making views: decode once, then take each view as far as only DALI can.

A view is cropped, turned, jittered, blurred, put through RandAugment, solarised, converted, flipped and normalised. It
leaves the graph, as 8-bit pixels, after the last operator that is the graph's: RandAugment (colours and blur are in it
too then), rotation, or the crop. All the rest is ``photometric``, and large plain crops on the CPU are ``crops``. The
graph holds no random state: every parameter comes in as an argument.
What measuring taught (one core, DALI 2.4):
- One feed for each argument is as fast as it gets; packing them and slicing inside the graph was 18 % slower.
- Queues deeper than 2 and DALI's other operator concurrency policies changed nothing.
- On the CPU DALI's operators run pixel by pixel. Milliseconds an image for DINO's 2 x 224 + 8 x 96, cubic: decode 1.1,
  crops 5.9, then colours, blur, solarise and normalise together 10; ``crops`` takes 0.8 and ``photometric`` 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .photometric.draws import color_matrix, colored, radius
from .views import rand_augment
from .views.color import luma
from .views.draw import Parameters
from .views.recipe import View, ViewRecipe

_SMALL = 48  # pixels: up to this size a call of torch a crop costs more than DALI's pixels
Feed = list[Any]  # the images, then one array [B, ...] an argument, in the order of `arguments`


def in_graph(view: View, device: str) -> bool:
    """Whether a view is cropped, or more, by the graph; the others are cut from the decoded images."""
    only_there = view.rotate > 0 or view.rand_augment > 0 or view.jigsaw > 0  # a jigsaw cuts between pixels
    return device != "cpu" or view.size <= _SMALL or only_there


def arguments(recipe: ViewRecipe, device: str) -> list[tuple[int, str]]:
    """View number and name of every argument the graph takes, in the order in which it takes them."""
    views = [(number, view) for number, view in enumerate(recipe.each) if in_graph(view, device)]
    return [(number, name) for number, view in views for name in _names(view, recipe.channels)]


def feed(recipe: ViewRecipe, images: Sequence[NDArray[np.uint8]], drawn: Parameters, device: str = "cpu") -> Feed:
    """Arrange one batch for the graph: encoded bytes or pixels [H, W, C], and the parameters of their views."""
    alike = images[0].ndim == 3 and len({image.shape for image in images}) == 1
    batch = np.stack(images) if alike else list(images)  # DALI takes one array in a tenth of the time of a list
    return [batch, *(_array(recipe.each[v], drawn, v, name) for v, name in arguments(recipe, device))]


def build(
    recipe: ViewRecipe,
    batch_size: int,
    source: Callable[[], Feed],
    *,
    encoded: bool,
    device: str = "cpu",
    threads: int = 2,
    prefetch: int = 2,
) -> Any:
    """Build the pipeline of a recipe.

    Its outputs are uint8: the views that are made in it, one by one, [B, size, size, C]; and at the end, where there
    are other views, the B decoded images.

    ``source`` gives the feed of the next batch, at most ``batch_size`` images, or raises StopIteration. The images
    are the bytes of files where ``encoded``, else pixels with the recipe's channels. ``device`` is "cpu" or "cuda",
    with or without a number.
    """
    dali = require_dali()
    from nvidia.dali import fn

    names = arguments(recipe, device)
    views = [(number, view) for number, view in enumerate(recipe.each) if in_graph(view, device)]

    def define() -> tuple[Any, ...]:
        layout = ["" if encoded else "HWC"] + [""] * len(names)
        images, *fed = fn.external_source(source, num_outputs=1 + len(names), layout=layout)
        if encoded:
            images = _decode(images, recipe.channels, device)
        elif device != "cpu":
            images = images.gpu()
        given = {k: {name: fed[i] for i, (v, name) in enumerate(names) if v == k} for k, _ in views}
        made = tuple(_view(recipe, view, images, given[k]) for k, view in views)
        return made + (images,) * (len(views) < recipe.n_views)

    # With conditionals DALI rewrites this function and what it calls, so that an ``if`` may ask for a node's values.
    # It does not know all of Python: no ``zip(strict=True)`` and no ``match`` in there.
    branches = any(view.rand_augment for view in recipe.views)
    pipeline = dali.pipeline_def(define, enable_conditionals=branches)(
        batch_size=batch_size, num_threads=threads, device_id=device_number(device), prefetch_queue_depth=prefetch
    )
    pipeline.build()
    return pipeline


def rejected(files: Sequence[NDArray[np.uint8]], channels: int, device: str) -> list[int]:
    """Which of the files the decoder refuses, each decoded in a batch of its own."""
    refusals, pipeline = [], None
    for number, data in enumerate(files):
        pipeline = pipeline or _decoder(channels, device)
        pipeline.feed_input("file", [data])
        try:
            pipeline.run()
        except RuntimeError:
            refusals.append(number)
            pipeline = None  # an error makes a pipeline unusable
    return refusals


def require_dali() -> Any:
    """Import the module ``nvidia.dali``; DataError where it is not installed."""
    try:
        import nvidia.dali as dali
    except ImportError:
        raise DataError("DALI is not installed; pip install nvidia-dali-cuda130, or nvidia-dali-cuda120 for CUDA 12") from None
    return dali


def device_number(device: str) -> int | None:
    """DALI's number for a torch device name: None for "cpu", 3 for "cuda:3", torch's current one for "cuda"."""
    if device == "cpu":
        return None
    if ":" in device:
        return int(device.split(":")[1])
    import torch

    return torch.cuda.current_device()


def _decoder(channels: int, device: str) -> Any:
    dali = require_dali()
    from nvidia.dali import fn

    pipeline = dali.Pipeline(1, 1, device_number(device), prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(_decode(fn.external_source(name="file"), channels, device))
    pipeline.build()
    return pipeline


def _decode(encoded: Any, channels: int, device: str) -> Any:
    from nvidia.dali import fn, types

    kind = types.RGB if channels == 3 else types.GRAY
    return fn.decoders.image(encoded, device="cpu" if device == "cpu" else "mixed", output_type=kind)


def _names(view: View, channels: int) -> list[str]:
    """Arguments that a view needs; what is not named here is not in the graph."""
    augmented = view.rand_augment > 0
    used = {
        "start": True,
        "end": True,
        "angle": view.rotate > 0,
        "hue": augmented and channels == 3 and view.jitter_p > 0 and view.jitter[3] > 0,
        "saturation": augmented and channels == 3 and (view.grey > 0 or (view.jitter_p > 0 and view.jitter[2] > 0)),
        "gain": augmented and colored(view),
        "mean_share": augmented and colored(view),
        "sigma": augmented and view.blur > 0,
        "window": augmented and view.blur > 0,
    }
    return [name for name, wanted in used.items() if wanted] + rand_augment.names(view.rand_augment)


def _array(view: View, drawn: Parameters, number: int, name: str) -> NDArray[Any]:
    """One argument [B, ...] of view ``number`` in DALI's units."""
    sigma, color = drawn.sigma[number], drawn.color[number]
    array: NDArray[Any]
    match name:
        case "start" | "end":
            box = getattr(drawn, name)[number]
            array = box if view.jigsaw else box.astype(np.int32)
        case "angle":
            array = drawn.angle[number]
        case "sigma":
            array = np.where(sigma > 0, sigma, np.float32(1))
        case "window":  # a window of 1 leaves the image as it is
            array = 2 * radius(sigma) + 1
        case "saturation" | "hue":
            array = np.ascontiguousarray(color[:, 2 if name == "saturation" else 3])
        case "gain" | "mean_share":  # of one channel the matrix is brightness times contrast
            gain, share = color_matrix(color, 1)
            array = share if name == "mean_share" else gain[:, 0, 0]
        case _:
            operation, strength, flip = drawn.operation[number], drawn.strength[number], drawn.flip[number]
            array = rand_augment.array(name, operation, strength, flip, view.size)
    return array


def _view(recipe: ViewRecipe, view: View, images: Any, given: dict[str, Any]) -> Any:
    """One view from the decoded images, 8-bit pixels."""
    from nvidia.dali import fn, types

    kind = types.INTERP_CUBIC if recipe.interpolation == "cubic" else types.INTERP_LINEAR
    size = [view.size, view.size]
    # Anti-aliasing as PIL does it; without, users of DALI lost 1 to 1.5 % accuracy (DALI issues 1507, 2559).
    resized = {"size": size, "interp_type": kind, "antialias": True}
    if view.jigsaw:  # its boxes end between pixels
        x = fn.resize(images, roi_start=given["start"], roi_end=given["end"], **resized)
    else:  # a region of interest would let pixels beyond the crop into its edges
        x = fn.resize(fn.slice(images, start=given["start"], end=given["end"], axes=[0, 1]), **resized)
    if "angle" in given:
        x = fn.rotate(x, angle=given["angle"], keep_size=True, fill_value=0)
    if "hue" in given:
        x = _turn(x, given["hue"])
    if "gain" in given:
        x = _mix(x, given, recipe.channels)
    if "sigma" in given:
        x = fn.gaussian_blur(x, sigma=given["sigma"], window_size=given["window"])
    return rand_augment.graph(x, given, view.rand_augment, view.size, recipe.channels)


def _mix(x: Any, given: dict[str, Any], channels: int) -> Any:
    """Give 8-bit pixels their colours but for hue, as ``photometric.draws.color_matrix`` says; 8 bits again."""
    from nvidia.dali import fn, types

    grey = fn.coord_transform(x, M=[float(weight) for weight in luma(channels)], dtype=types.FLOAT)
    mean = fn.reductions.mean(grey, axis_names="HW", keep_dims=True)
    gain = {"brightness": given["gain"], "dtype": types.FLOAT}
    if "saturation" in given:
        mixed = fn.color_twist(x, saturation=given["saturation"], **gain)
    else:
        mixed = fn.brightness_contrast(x, **gain)
    return rand_augment.floor(mixed + rand_augment.beside(x, given["mean_share"]) * mean + 0.5)


def _turn(x: Any, hue: Any) -> Any:
    """Turn the hue in HSV of 8-bit pixels, as ``photometric.reference.turn``; DALI's own turns in YIQ."""
    from nvidia.dali import fn, math, types

    red, green, blue = (fn.cast(x[:, :, k : k + 1], dtype=types.FLOAT) for k in range(3))
    high = math.max(math.max(red, green), blue)
    chroma = high - math.min(math.min(red, green), blue)
    apart, below = green - blue, high - red
    distance = below + math.abs(apart) + 2.0 * math.min(below, chroma - math.abs(apart))
    at = distance * (1.0 - 2.0 * (apart < 0.0)) + 6.0 * rand_augment.beside(x, hue) * chroma
    channels = []
    for color in (0.0, 2.0, 4.0):
        way = math.abs(at - color * chroma)
        way = math.min(way, math.abs(6.0 * chroma - way))
        channels.append(high - math.min(math.max(way - chroma, 0.0), chroma))
    return rand_augment.floor(fn.cat(*channels, axis=2) + 0.5)
