"""The part of making views that only DALI can do: decode once, then take each view up to its last DALI operator.

A view is cropped, rotated, jittered, blurred, passed through RandAugment, solarised, converted, flipped and normalised.
It leaves the graph as 8-bit pixels after the last of these operators: RandAugment, rotation, or the crop. With
RandAugment, colours and blur are also in the graph. ``photometric`` does the rest, and ``crops`` cuts large plain
crops on the CPU. The graph holds no random state: every parameter is an argument.

Measurements (one core, DALI 2.4):
- One feed per argument is fastest. Packing the arguments and slicing them inside the graph was 18 % slower.
- Queues deeper than 2 and DALI's other operator concurrency policies changed nothing.
- On the CPU DALI's operators work pixel by pixel. Per image, with DINO's 2 x 224 + 8 x 96 cubic views, decoding
  takes 1.1 ms and the crops 5.9 ms. Colours, blur, solarisation and normalisation take 10 ms. ``crops`` takes 0.8 ms
  instead, and ``photometric`` 1.2 ms.
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
from .views.recipe import View, ViewRecipe, sides

_SMALL = 48  # pixels: up to this size, one call of torch per crop costs more than DALI's work on the pixels
Feed = list[Any]  # the images, then one array [B, ...] per argument, in the order of `arguments`


def in_graph(view: View, device: str) -> bool:
    """Return whether the graph crops a view. Other views are cropped from the decoded images."""
    needs_dali = view.rotate > 0 or view.rand_augment > 0 or view.jigsaw > 0  # a jigsaw cuts between pixels
    return device != "cpu" or max(sides(view.size)) <= _SMALL or needs_dali


def arguments(recipe: ViewRecipe, device: str) -> list[tuple[int, str]]:
    """Return view number and name of every argument of the graph, in order."""
    views = [(number, view) for number, view in enumerate(recipe.each) if in_graph(view, device)]
    return [(number, name) for number, view in views for name in _names(view, recipe.channels)]


def feed(recipe: ViewRecipe, images: Sequence[NDArray[np.uint8]], parameters: Parameters, device: str = "cpu") -> Feed:
    """Arrange one batch for the graph: encoded bytes or pixels [H, W, C], and the parameters of their views."""
    same_shape = images[0].ndim == 3 and len({image.shape for image in images}) == 1
    batch = np.stack(images) if same_shape else list(images)  # DALI takes one array in a tenth of the time of a list
    return [batch, *(_array(recipe.each[v], parameters, v, name) for v, name in arguments(recipe, device))]


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

    Its outputs are uint8: each view that the graph crops, [B, H, W, C]. If there are other views, the last
    output is the B decoded images.

    ``source`` returns the feed of the next batch of at most ``batch_size`` images, or raises StopIteration. The images
    are the bytes of files if ``encoded``, else pixels with the recipe's channels. ``device`` is "cpu" or "cuda", with
    or without a number. Raises DataError if DALI is not installed.
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
        nodes = {k: {name: fed[i] for i, (v, name) in enumerate(names) if v == k} for k, _ in views}
        outputs = tuple(_view(recipe, view, images, nodes[k]) for k, view in views)
        return outputs + (images,) * (len(views) < recipe.n_views)

    # With conditionals, DALI rewrites this function and the functions that it calls, so that an ``if`` may test a
    # node. DALI does not know all of Python: these functions must not use ``zip(strict=True)`` or ``match``.
    branches = any(view.rand_augment for view in recipe.views)
    pipeline = dali.pipeline_def(define, enable_conditionals=branches)(
        batch_size=batch_size, num_threads=threads, device_id=device_number(device), prefetch_queue_depth=prefetch
    )
    pipeline.build()
    return pipeline


def rejected(files: Sequence[NDArray[np.uint8]], channels: int, device: str) -> list[int]:
    """Return the numbers of the files that the decoder rejects. Each one is decoded in a batch of its own."""
    rejections, pipeline = [], None
    for number, data in enumerate(files):
        pipeline = pipeline or _decoder(channels, device)
        pipeline.feed_input("file", [data])
        try:
            pipeline.run()
        except RuntimeError:
            rejections.append(number)
            pipeline = None  # an error makes a pipeline unusable
    return rejections


def require_dali() -> Any:
    """Return the module ``nvidia.dali``. Raise DataError if it is not installed."""
    try:
        import nvidia.dali as dali
    except ImportError:
        package = "nvidia-dali-cuda130 (for CUDA 12: nvidia-dali-cuda120)"
        raise DataError(f"DALI is not installed; pip install {package}") from None
    return dali


def device_number(device: str) -> int | None:
    """Return DALI's number of a torch device: None for "cpu", 3 for "cuda:3", torch's current device for "cuda"."""
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
    """Return the arguments that a view needs. An operator without arguments is not in the graph."""
    augmented = view.rand_augment > 0
    needed = {
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
    return [name for name, used in needed.items() if used] + rand_augment.names(view.rand_augment)


def _array(view: View, parameters: Parameters, number: int, name: str) -> NDArray[Any]:
    """Return one argument [B, ...] of view ``number`` in DALI's units."""
    sigma, color = parameters.sigma[number], parameters.color[number]
    array: NDArray[Any]
    match name:
        case "start" | "end":
            box = getattr(parameters, name)[number]
            array = box if view.jigsaw else box.astype(np.int32)
        case "angle":
            array = parameters.angle[number]
        case "sigma":
            array = np.where(sigma > 0, sigma, np.float32(1))
        case "window":  # a window of 1 leaves the image unchanged
            array = 2 * radius(sigma) + 1
        case "saturation" | "hue":
            array = np.ascontiguousarray(color[:, 2 if name == "saturation" else 3])
        case "gain" | "mean_share":  # with one channel, the matrix is brightness times contrast
            gain, share = color_matrix(color, 1)
            array = share if name == "mean_share" else gain[:, 0, 0]
        case _:
            operation, strength = parameters.operation[number], parameters.strength[number]
            array = rand_augment.array(name, operation, strength, parameters.flip[number], *sides(view.size))
    return array


def _view(recipe: ViewRecipe, view: View, images: Any, nodes: dict[str, Any]) -> Any:
    """Return one view of the decoded images, in 8-bit pixels. ``nodes`` are its arguments by name."""
    from nvidia.dali import fn, types

    kind = types.INTERP_CUBIC if recipe.interpolation == "cubic" else types.INTERP_LINEAR
    size = list(sides(view.size))
    # Anti-aliased like PIL. Without it, users of DALI lost 1 to 1.5 % accuracy (DALI issues 1507, 2559).
    resized = {"size": size, "interp_type": kind, "antialias": True}
    if view.jigsaw:  # its boxes end between pixels
        x = fn.resize(images, roi_start=nodes["start"], roi_end=nodes["end"], **resized)
    else:  # with a region of interest, pixels outside of the crop would blend into its edges
        x = fn.resize(fn.slice(images, start=nodes["start"], end=nodes["end"], axes=[0, 1]), **resized)
    if "angle" in nodes:
        x = fn.rotate(x, angle=nodes["angle"], keep_size=True, fill_value=0)
    if "hue" in nodes:
        x = _turn(x, nodes["hue"])
    if "gain" in nodes:
        x = _mix(x, nodes, recipe.channels)
    if "sigma" in nodes:
        x = fn.gaussian_blur(x, sigma=nodes["sigma"], window_size=nodes["window"])
    return rand_augment.graph(x, nodes, view.rand_augment, *sides(view.size), recipe.channels)


def _mix(x: Any, nodes: dict[str, Any], channels: int) -> Any:
    """Change brightness, contrast and saturation of 8-bit pixels, see ``photometric.draws.color_matrix``."""
    from nvidia.dali import fn, types

    grey = x  # without RGB, each channel is its own grey
    if channels in (1, 3):
        grey = fn.coord_transform(x, M=[float(weight) for weight in luma(channels)], dtype=types.FLOAT)
    mean = fn.reductions.mean(grey, axis_names="HW", keep_dims=True)
    gain = {"brightness": nodes["gain"], "dtype": types.FLOAT}
    if "saturation" in nodes:
        mixed = fn.color_twist(x, saturation=nodes["saturation"], **gain)
    else:
        mixed = fn.brightness_contrast(x, **gain)
    return rand_augment.floor(mixed + rand_augment.to_device_of(x, nodes["mean_share"]) * mean + 0.5)


def _turn(x: Any, hue: Any) -> Any:
    """Turn the hue of 8-bit pixels in HSV, like ``photometric.reference.turn``. DALI's own operator turns it in YIQ."""
    from nvidia.dali import fn, math, types

    red, green, blue = (fn.cast(x[:, :, k : k + 1], dtype=types.FLOAT) for k in range(3))
    high = math.max(math.max(red, green), blue)
    chroma = high - math.min(math.min(red, green), blue)
    apart, below = green - blue, high - red
    distance = below + math.abs(apart) + 2.0 * math.min(below, chroma - math.abs(apart))
    at = distance * (1.0 - 2.0 * (apart < 0.0)) + 6.0 * rand_augment.to_device_of(x, hue) * chroma
    channels = []
    for color in (0.0, 2.0, 4.0):
        way = math.abs(at - color * chroma)
        way = math.min(way, math.abs(6.0 * chroma - way))
        channels.append(high - math.min(math.max(way - chroma, 0.0), chroma))
    return rand_augment.floor(fn.cat(*channels, axis=2) + 0.5)
