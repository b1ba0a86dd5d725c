"""A contact sheet of the views that a training would see, with their parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..config.fit import fit_to_data
from ..config.resolve import Config
from ..errors import ConfigError
from ..pipelines import Loader, Source, Subset, View, evaluation_view, open_source, sides, size_text
from ..pipelines.sources.decode import decode, is_plain
from ..pipelines.sources.headers import image_size, reduction
from ..pipelines.views.draw import Parameters, draw_parameters
from ..pipelines.views.rand_augment import OPERATIONS
from ..training.pixels import settled
from .pictures import in_rgb, to_image

_CELL = 168  # side of a picture in pixels
_GAP = 12
_LINE = 13
_LINES = 6  # lines of text below a picture
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def contact_sheet(config: Config, count: int, note: Callable[[str], None] = print) -> Image.Image:
    """Draw a row per image: the evaluation's view, then every view of epoch 0 with its parameters.

    The pixels are the network's inputs before normalisation, in RGB. The headline names another colour space. ``note``
    gets lines about a measured pixel format. Raise ConfigError if the data has fewer images, and DataError if it cannot
    be read.
    """
    t = config.train
    source = open_source(t.data_path, t.val_path, weights=t.data_weights).train
    config, lines = settled(fit_to_data(config, len(source)).config, source)
    for line in lines:
        note(line)
    if count > len(source):
        raise ConfigError(f"--images: must be at most the {len(source)} images of the data, got {count}.")
    shown = in_rgb(config.views)
    whole = evaluation_view(shown, max((view.size for view in shown.views), key=sides))
    seed = config.train.seed
    loader = Loader(source, shown, count, seed=seed, threads=1)
    batch = next(loader.epoch(0))
    loader.close()
    plain = Loader(Subset(source, batch.indices.tolist()), whole, count, shuffle=False, drop_last=False, threads=1)
    originals = next(plain.epoch(0)).views[0][0]
    plain.close()
    views = [view for group in batch.views for view in group]
    sizes = [_size(source, int(i)) for i in batch.indices]
    heights, widths = np.array(sizes).T
    drawn = draw_parameters(config.views, seed, 0, batch.indices.numpy(), heights, widths)
    rows = []
    for b in range(count):
        labels = [[source.describe(int(batch.indices[b]))[-26:], f"{sizes[b][1]} x {sizes[b][0]} pixels"]]
        labels += [describe(view, drawn, v, b, sizes[b]) for v, view in enumerate(config.views.each)]
        pictures = [originals[b], *(view[b] for view in views)]
        rows.append([(_enlarged(p.numpy()), label) for p, label in zip(pictures, labels, strict=True)])
    space = "" if config.views.color_space == "rgb" else f", shown in RGB, trained in {config.views.color_space}"
    return _draw(f"{config.method}, recipe {config.recipe}, seed {seed}, epoch 0{space}", rows)


def describe(view: View, drawn: Parameters, v: int, b: int, size: tuple[int, int]) -> list[str]:
    """Return a few lines with the parameters of view ``v`` of image ``b``, whose (height, width) is ``size``."""
    (y0, x0), (y1, x1) = drawn.start[v, b].tolist(), drawn.end[v, b].tolist()
    area = (y1 - y0) * (x1 - x0) / (size[0] * size[1])
    lines = [f"{'local' if view.local else 'global'} {size_text(view.size)} px, {100 * area:.0f} % of the area"]
    lines.append(f"{x1 - x0:.0f} x {y1 - y0:.0f} at ({x0:.0f}, {y0:.0f}){', flipped' if drawn.flip[v, b] else ''}")
    brightness, contrast, saturation, hue = drawn.color[v, b].tolist()
    if (brightness, contrast, hue) != (1, 1, 0) or saturation not in (0, 1):
        lines.append(f"b {brightness:.2f} c {contrast:.2f} s {saturation:.2f} h {360 * hue:+.0f}°")
    elif saturation == 0:
        lines.append("grey")
    tail = [f"blur {drawn.sigma[v, b]:.1f} px"] if drawn.sigma[v, b] > 0 else []
    tail += ["solarised"] if drawn.solarize[v, b] else []
    tail += [f"rotated {drawn.angle[v, b]:+.0f}°"] if drawn.angle[v, b] else []
    names = [OPERATIONS[number - 1] for number in drawn.operation[v, b].tolist() if number]
    return lines + [", ".join(part) for part in (tail, names) if part]


def _size(source: Source, index: int) -> tuple[int, int]:
    data = source.read(index)
    if not source.encoded:
        return data.shape[0], data.shape[1]
    content = data.tobytes()
    height, width = image_size(content) if is_plain(content) else decode(content).values.shape[:2]
    rows, columns = reduction(height, width)
    return height // rows, width // columns


def _enlarged(view: NDArray[np.float32]) -> Image.Image:
    """Return a picture of [C, H, W] in 0..1. Small views are enlarged without smoothing, so every pixel is visible."""
    picture = to_image(view)
    longer = max(picture.size)
    how = Image.Resampling.NEAREST if longer <= _CELL else Image.Resampling.LANCZOS
    return picture.resize([max(1, round(side * _CELL / longer)) for side in picture.size], how)


def _draw(title: str, rows: Sequence[Sequence[tuple[Image.Image, list[str]]]]) -> Image.Image:
    columns = max(map(len, rows))
    width, height = _GAP + columns * (_CELL + _GAP), _CELL + _LINES * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (width, 3 * _GAP + len(rows) * height), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pen.text((_GAP, _GAP // 2), title, _INK, ImageFont.load_default(14))
    for r, row in enumerate(rows):
        for c, (picture, lines) in enumerate(row):
            x, y = _GAP + c * (_CELL + _GAP), 3 * _GAP + r * height
            sheet.paste(picture, (x, y))
            for n, line in enumerate(lines[:_LINES]):
                pen.text((x, y + _CELL + 3 + n * _LINE), line, _INK if n == 0 else _FAINT, font)
    return sheet
