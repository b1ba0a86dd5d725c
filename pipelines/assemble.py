"""Make finished views from the outputs of the DALI graph.

On the CPU, these are crops and the photometric pass in NumPy. On a GPU, it is the photometric kernel.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import dali
from .photometric import cpu
from .photometric.draws import Draws, Look, draws
from .views.crops import crop
from .views.draw import Parameters
from .views.recipe import View, ViewRecipe, sides


def make_views(
    recipe: ViewRecipe,
    outputs: Any,
    parameters: Parameters,
    *,
    device: str,
    pool: Executor | None = None,
    parts: int = 1,
) -> tuple[Tensor, ...]:
    """Return the resolution groups, float32 [V_g, B, H, W, C], from the outputs of ``dali.build``'s pipeline.

    On the CPU, the images of each view are split into ``parts``, which the ``pool`` works on if there is one. The
    result does not depend on the split.
    """
    count = parameters.flip.shape[1]
    shapes = [(views, count, *sides(size), recipe.channels) for size, views in recipe.groups]
    groups = tuple(torch.empty(shape, device=device) for shape in shapes)
    views = [view for group in groups for view in group]
    steps = [draws(view, recipe.channels, parameters, number) for number, view in enumerate(recipe.each)]
    if device == "cpu":
        _on_cpu(recipe, outputs, parameters, steps, views, pool, parts)
    else:
        _on_gpu(recipe, outputs, steps, views)
    return groups


def _on_cpu(
    recipe: ViewRecipe,
    outputs: Any,
    parameters: Parameters,
    steps: list[Draws],
    views: list[Tensor],
    pool: Executor | None,
    parts: int,
) -> None:
    remaining, calls = iter(outputs), []
    inside = [dali.in_graph(view, "cpu") for view in recipe.each]
    images = [] if all(inside) else [np.asarray(image) for image in outputs[len(outputs) - 1]]
    for number, view in enumerate(recipe.each):
        cropped = np.asarray(next(remaining).as_tensor()) if inside[number] else None
        one = _View(recipe, view, images, cropped, parameters.start[number], parameters.end[number])
        pieces = list(cpu.pieces(steps[number], view.size))
        calls += [(one, steps[number], pieces[part::parts], views[number].numpy()) for part in range(parts)]
    for future in [pool.submit(_make, *call) for call in calls] if pool else []:
        future.result()
    if pool is None:
        for call in calls:
            _make(*call)


class _View:
    """The 8-bit pixels of one view. They are cropped when they are read, unless the graph has cropped them."""

    def __init__(
        self,
        recipe: ViewRecipe,
        view: View,
        images: list[NDArray[np.uint8]],
        cropped: NDArray[np.uint8] | None,
        start: NDArray[np.float32],
        end: NDArray[np.float32],
    ) -> None:
        self.look, self.size, self.channels = Look.of(recipe), view.size, recipe.channels
        self.interpolation = recipe.interpolation
        self.images, self.cropped, self.start, self.end = images, cropped, start, end

    def read(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write the pixels of the images ``rows`` to ``out`` [n, H, W, C]."""
        if self.cropped is not None:
            np.take(self.cropped, rows, 0, out=out)
            return
        for i, row in enumerate(rows):
            out[i] = crop(self.images[row], self.start[row], self.end[row], self.size, self.interpolation)


def _make(view: _View, draws: Draws, pieces: list[NDArray[np.int64]], out: NDArray[np.float32]) -> None:
    """Make the views of the images in these pieces. Runs in a thread."""
    scratch = cpu.Scratch()
    for rows in pieces:
        shape = (len(rows), *sides(view.size), view.channels)
        pixels, result = scratch("pixels", shape, np.uint8), scratch("views", shape, np.float32)
        view.read(rows, pixels)
        cpu.finish(pixels, draws.of(rows), view.look, result, scratch)
        out[rows] = result


def _on_gpu(recipe: ViewRecipe, outputs: Any, steps: list[Draws], views: list[Tensor]) -> None:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    from .photometric.launch import finish

    look = Look.of(recipe)
    for output, step, view in zip(outputs, steps, views, strict=True):
        pixels = torch.empty(view.shape, dtype=torch.uint8, device=view.device)
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream(view.device))
        finish(pixels, step, look, out=view)
