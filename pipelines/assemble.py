"""From what leaves the graph to finished views: crops and the photometric pass on the CPU, the kernel on a GPU."""

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
from .views.recipe import View, ViewRecipe


def make_views(
    recipe: ViewRecipe, outputs: Any, drawn: Parameters, *, device: str, pool: Executor | None = None, parts: int = 1
) -> tuple[Tensor, ...]:
    """Resolution groups, float32 [V_g, B, size, size, C], from the outputs of ``dali.build``'s pipeline.

    On the CPU each view is cut into ``parts`` that the ``pool`` works on, if there is one. The result does not depend
    on them.
    """
    count = drawn.flip.shape[1]
    shapes = [(views, count, size, size, recipe.channels) for size, views in recipe.groups]
    groups = tuple(torch.empty(shape, device=device) for shape in shapes)
    views = [view for group in groups for view in group]
    todo = [draws(view, recipe.channels, drawn, number) for number, view in enumerate(recipe.each)]
    if device == "cpu":
        _on_cpu(recipe, outputs, drawn, todo, views, pool, parts)
    else:
        _on_gpu(recipe, outputs, todo, views)
    return groups


def _on_cpu(
    recipe: ViewRecipe,
    outputs: Any,
    drawn: Parameters,
    todo: list[Draws],
    views: list[Tensor],
    pool: Executor | None,
    parts: int,
) -> None:
    rest, calls = iter(outputs), []
    inside = [dali.in_graph(view, "cpu") for view in recipe.each]
    images = [] if all(inside) else [np.asarray(image) for image in outputs[len(outputs) - 1]]
    for number, view in enumerate(recipe.each):
        pixels = np.asarray(next(rest).as_tensor()) if inside[number] else None
        one = _View(recipe, view, images, pixels, drawn.start[number], drawn.end[number])
        pieces = list(cpu.pieces(todo[number], view.size))
        calls += [(one, todo[number], pieces[part::parts], views[number].numpy()) for part in range(parts)]
    for done in [pool.submit(_make, *call) for call in calls] if pool else []:
        done.result()
    if pool is None:
        for call in calls:
            _make(*call)


class _View:
    """The 8-bit pixels of one view, cropped when they are asked for."""

    def __init__(
        self,
        recipe: ViewRecipe,
        view: View,
        images: list[NDArray[np.uint8]],
        made: NDArray[np.uint8] | None,
        start: NDArray[np.float32],
        end: NDArray[np.float32],
    ) -> None:
        self.look, self.size, self.channels = Look.of(recipe), view.size, recipe.channels
        self.interpolation = recipe.interpolation
        self.images, self.made, self.start, self.end = images, made, start, end

    def read(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write the pixels of these images to ``out`` [n, S, S, C]."""
        if self.made is not None:
            np.take(self.made, rows, 0, out=out)
            return
        for place, row in enumerate(rows):
            out[place] = crop(self.images[row], self.start[row], self.end[row], self.size, self.interpolation)


def _make(view: _View, draws: Draws, pieces: list[NDArray[np.int64]], out: NDArray[np.float32]) -> None:
    """Make the images of these pieces; runs in a thread."""
    scratch = cpu.Scratch()
    for rows in pieces:
        shape = (len(rows), view.size, view.size, view.channels)
        pixels, result = scratch("pixels", shape, np.uint8), scratch("views", shape, np.float32)
        view.read(rows, pixels)
        cpu.finish(pixels, draws.of(rows), view.look, result, scratch)
        out[rows] = result


def _on_gpu(recipe: ViewRecipe, outputs: Any, todo: list[Draws], views: list[Tensor]) -> None:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    from .photometric.launch import finish

    look = Look.of(recipe)
    for output, left, view in zip(outputs, todo, views, strict=True):
        pixels = torch.empty(view.shape, dtype=torch.uint8, device=view.device)
        feed_ndarray(output.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream(view.device))
        finish(pixels, left, look, out=view)
