"""From a view recipe to a DALI graph: decode once, then make each view.

A view is cropped, turned, jittered, blurred, put through RandAugment, solarised, converted, flipped and normalised.
The same definition runs on CPU and GPU. The graph holds no random state: every parameter comes in as an argument.
What measuring taught (2 cores, DALI 2.4, 32-pixel views):
- One feed for each argument is as fast as it gets; packing them and slicing inside the graph was 18 % slower.
- Queues deeper than 2 and DALI's other operator concurrency policies changed nothing.
- An operator costs a pass over the pixels, so a view has none that it does not use. Microseconds an image: rotate 43,
  resize 31 (cubic; linear 21), colour 26, decode 23, blur 37 (16 where it only copies), solarise and normalise 10 each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import color, rand_augment
from .sources import DataError
from .views import Parameters, View, ViewRecipe

_COLORS = ("brightness", "contrast", "saturation", "hue")
_NEVER = 256  # solarisation threshold that no 8-bit value reaches
Feed = list[Any]  # the images, then one array [B, ...] an argument, in the order of `arguments`


def arguments(recipe: ViewRecipe) -> list[tuple[int, str]]:
    """View number and name of every argument the graph takes, in the order in which it takes them."""
    return [(number, name) for number, view in enumerate(recipe.each) for name in _names(view, recipe.channels)]


def feed(recipe: ViewRecipe, images: Sequence[NDArray[np.uint8]], drawn: Parameters) -> Feed:
    """Arrange one batch for the graph: encoded bytes or pixels [H, W, C], and the parameters of their views."""
    alike = images[0].ndim == 3 and len({image.shape for image in images}) == 1
    batch = np.stack(images) if alike else list(images)  # DALI takes one array in a tenth of the time of a list
    return [batch, *(_array(recipe.each[v], drawn, v, name) for v, name in arguments(recipe))]


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
    """Build the pipeline. Its outputs are the views one by one, float32 [B, size, size, C].

    ``source`` gives the feed of the next batch, at most ``batch_size`` images, or raises StopIteration. The images
    are the bytes of files where ``encoded``, else pixels with the recipe's channels. ``device`` is "cpu" or "cuda",
    with or without a number.
    """
    dali = require_dali()
    from nvidia.dali import fn

    names = arguments(recipe)

    def define() -> tuple[Any, ...]:
        layout = ["" if encoded else "HWC"] + [""] * len(names)
        images, *fed = fn.external_source(source, num_outputs=1 + len(names), layout=layout)
        if encoded:
            images = _decode(images, recipe.channels, device)
        elif device != "cpu":
            images = images.gpu()
        given = [{name: fed[i] for i, (v, name) in enumerate(names) if v == k} for k in range(recipe.n_views)]
        return tuple(_view(recipe, view, images, given[k]) for k, view in enumerate(recipe.each))

    # With conditionals DALI rewrites this function and what it calls, so that an ``if`` may ask for a node's values.
    # It does not know all of Python: no ``zip(strict=True)`` and no ``match`` in there.
    branches = any(view.rand_augment for view in recipe.views)
    pipeline = dali.pipeline_def(define, enable_conditionals=branches)(
        batch_size=batch_size, num_threads=threads, device_id=device_number(device), prefetch_queue_depth=prefetch
    )
    pipeline.build()
    return pipeline


def refused(files: Sequence[NDArray[np.uint8]], channels: int, device: str) -> list[int]:
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
        raise DataError("DALI is not installed; pip install 'fasttrain[train]'") from None
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
    brightness, contrast, saturation, hue = (strength > 0 and view.jitter_p > 0 for strength in view.jitter)
    used = {
        "start": True,
        "end": True,
        "angle": view.rotate > 0,
        "brightness": brightness,
        "contrast": contrast,
        "saturation": channels == 3 and (saturation or view.grey > 0),
        "hue": channels == 3 and hue,
        "sigma": view.blur > 0,
        "window": view.blur > 0,
        "threshold": view.solarize > 0,
        "mirror": view.flip > 0,
    }
    return [name for name, wanted in used.items() if wanted] + rand_augment.names(view.rand_augment)


def _array(view: View, drawn: Parameters, number: int, name: str) -> NDArray[Any]:
    """One argument [B, ...] of view ``number`` in DALI's units."""
    sigma = drawn.sigma[number]
    array: NDArray[Any]
    match name:
        case "start" | "end" | "angle":
            array = getattr(drawn, name)[number]
        case "sigma":
            array = np.where(sigma > 0, sigma, np.float32(1))
        case "window":  # three sigmas to either side; a window of 1 leaves the image as it is
            array = (2 * np.ceil(3 * sigma) + 1).astype(np.int32)
        case "threshold":
            array = np.where(drawn.solarize[number], 128, _NEVER).astype(np.int32)
        case "mirror":
            array = drawn.flip[number].astype(np.int32)
        case "brightness" | "contrast" | "saturation" | "hue":
            column = drawn.color[number, :, _COLORS.index(name)]
            array = np.ascontiguousarray(column * np.float32(360 if name == "hue" else 1))  # turns to degrees
        case _:
            operation, strength, flip = drawn.operation[number], drawn.strength[number], drawn.flip[number]
            array = rand_augment.array(name, operation, strength, flip, view.size)
    return array


def _view(recipe: ViewRecipe, view: View, images: Any, given: dict[str, Any]) -> Any:
    """One view from the decoded images."""
    from nvidia.dali import fn, types

    kind = types.INTERP_CUBIC if recipe.interpolation == "cubic" else types.INTERP_LINEAR
    size = [view.size, view.size]
    # Anti-aliasing as PIL does it; without, users of DALI lost 1 to 1.5 % accuracy (DALI issues 1507, 2559).
    x = fn.resize(images, size=size, roi_start=given["start"], roi_end=given["end"], interp_type=kind, antialias=True)
    if "angle" in given:
        x = fn.rotate(x, angle=given["angle"], keep_size=True, fill_value=0)
    jitter = {name: given[name] for name in _COLORS if name in given}
    if "saturation" in jitter or "hue" in jitter:
        x = fn.color_twist(x, **jitter)
    elif jitter:
        x = fn.brightness_contrast(x, **jitter)
    if "sigma" in given:
        x = fn.gaussian_blur(x, sigma=given["sigma"], window_size=given["window"])
    x = rand_augment.graph(x, given, view.rand_augment, view.size, recipe.channels)
    if "threshold" in given:
        x = color.solarize(x, given["threshold"])
    unit = color.unit(recipe.color_space)
    return fn.crop_mirror_normalize(
        color.convert(x, recipe.color_space),
        mirror=given.get("mirror", 0),
        mean=[unit * value for value in recipe.mean],
        std=[unit * value for value in recipe.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )
