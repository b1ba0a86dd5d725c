"""The loader: which images, in which order, read ahead, through the DALI dali, out as torch tensors.

Files are read and parameters drawn by a few Python threads, some batches ahead; DALI works on ``prefetch`` batches in
threads of its own, and on the CPU the same few threads make the views of another ``prefetch``, while the caller trains.
All waiting is on locks, nothing spins. There is no state to save: the batches are a function of (seed, epoch, step)
alone. A thread prepares whole batches rather than files, since handing over 256 small files one by one costs more than
reading them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from . import dali
from .assemble import make_views
from .sources.bad_images import BadImages
from .sources.base import Source
from .sources.headers import BadImageError, decodable, image_size
from .views.draw import Parameters, draw_parameters, epoch_order
from .views.recipe import ViewRecipe

_LUMA = np.array([0.299, 0.587, 0.114])
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Views of B images. Pixels are channels-last in memory: ``views[g].flatten(0, 1)`` needs no copy."""

    views: tuple[Tensor, ...]  # a resolution group each: float32 [V_g, B, C, H, W], normalised
    labels: Tensor | None  # [B] int64
    indices: Tensor  # [B] int64, numbers of the images in the source


@dataclass(frozen=True)
class _Prepared:
    """A batch that is ready for the dali. ``actual`` differs from ``wanted`` where a file is bad."""

    wanted: Indices  # [B]; in evaluation some may be padding
    actual: Indices  # [B]
    kept: NDArray[np.bool_]  # [B] rows that the caller sees
    drawn: Parameters
    feed: dali.Feed


class Loader:
    """Batches of views from a source.

    In training every global batch of ``batch_size * world_size`` images is full, and rank r has its r-th part. With
    ``drop_last=False`` every image comes once over all ranks: the last batches are shorter and may even be empty, but
    each rank yields ``steps_per_epoch`` of them, so that collective operations stay in step.

    A file that cannot be read or decoded is logged once, kept in ``bad``, and replaced by a good one (with
    ``drop_last=False`` it is left out). Raises DataError where no good one remains, or where more than
    ``max_bad_fraction`` are bad, see ``BadImages``.
    """

    def __init__(
        self,
        source: Source,
        recipe: ViewRecipe,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        threads: int = 2,
        prefetch: int = 2,
        shuffle: bool = True,
        drop_last: bool = True,
        max_bad_fraction: float = 1.0,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or threads < 1 or prefetch < 1:
            given = f"batch_size {batch_size}, rank {rank} of {world_size}, threads {threads}, prefetch {prefetch}"
            raise DataError(f"loader: {given}; use 1 or more of each, and a rank below the number of ranks")
        total = batch_size * world_size
        if drop_last and total > len(source):
            raise DataError(
                f"{source.name}: a batch of {total} images over {world_size} rank(s) is larger than the data, "
                f"{len(source)} images; use a smaller batch size"
            )
        dali.require_dali()
        self.source, self.recipe, self.batch_size = source, recipe, batch_size
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, str(device)
        self.threads, self.prefetch, self.shuffle, self.drop_last = threads, prefetch, shuffle, drop_last
        self.steps_per_epoch = len(source) // total if drop_last else -(-len(source) // total)
        self._bad = BadImages(source, max_bad_fraction, None if shuffle else -(-len(source) // world_size))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fasttrain-read")
        # On a GPU a batch is made by the caller: it only starts kernels, on the stream that will use their results.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="fasttrain-make") if self.device == "cpu" else None
        self._pipeline: Any = None
        self._steps: Iterator[tuple[int, Indices]] = iter(())
        self._ahead: deque[tuple[int, Future[_Prepared]]] = deque()  # being read
        self._running: deque[tuple[int, _Prepared]] = deque()  # in the graph
        self._made: deque[Future[Batch]] = deque()  # views that are being made
        self._active: Generator[Batch, None, None] | None = None

    @property
    def bad(self) -> dict[str, str]:
        """Images that proved bad, by name, and why."""
        return self._bad.reasons

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches ``start_step``, ``start_step + 1``, ... of an epoch; ends the epoch that was under way, if any."""
        self._end_epoch()
        self._active = batches = self._epoch(epoch, start_step)
        return batches

    def close(self) -> None:
        """Stop the threads and let go of the graph's memory."""
        self._end_epoch()
        if self._maker is not None:
            self._maker.shutdown()
        self._pool.shutdown(cancel_futures=True)
        self._pipeline = None

    def _epoch(self, epoch: int, start_step: int) -> Generator[Batch, None, None]:
        self._steps = iter([(epoch, wanted) for wanted in self._plan(epoch)[start_step:]])
        try:
            self._read_ahead()
            self._schedule()
            for step in range(start_step, self.steps_per_epoch):
                yield self._take(self.steps_per_epoch - step)
        finally:
            self._drain()

    def _plan(self, epoch: int) -> list[Indices]:
        """List the images of each step that this rank sees."""
        count, total = len(self.source), self.batch_size * self.world_size
        order = epoch_order(self.seed, epoch, count) if self.shuffle else np.arange(count)
        steps = [order[step * total : (step + 1) * total] for step in range(self.steps_per_epoch)]
        return [np.array_split(step, self.world_size)[self.rank] for step in steps]

    def _take(self, left: int) -> Batch:
        """Return the next batch of ``left``; some more are being made meanwhile."""
        if self._maker is None:
            return self._next()
        while len(self._made) < min(left, self.prefetch):
            self._made.append(self._maker.submit(self._next))
        batch = self._made.popleft().result()
        if left > self.prefetch:
            self._made.append(self._maker.submit(self._next))
        return batch

    def _next(self) -> Batch:
        """Take the oldest batch out of the graph and put a new one in, so that it works on while the caller trains."""
        while True:
            try:
                outputs = self._pipeline.share_outputs(self._stream())
                break
            except RuntimeError as error:
                self._recover(error)
        _, prepared = self._running.popleft()
        batch = self._batch(prepared, outputs)
        self._pipeline.release_outputs()
        self._schedule()
        return batch

    def _schedule(self) -> None:
        """Start the graph on further batches, as far as there are any; it asks ``_feed`` for them."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.schedule_run()
        except RuntimeError as error:
            self._recover(error)

    def _build(self) -> Any:
        return dali.build(
            self.recipe,
            self.batch_size,
            self._feed,
            encoded=self.source.encoded,
            device=self.device,
            threads=self.threads,
            prefetch=self.prefetch,
        )

    def _feed(self) -> dali.Feed:
        """Next batch for the graph; StopIteration at the end of the epoch."""
        if not self._ahead:
            raise StopIteration
        epoch, future = self._ahead.popleft()
        self._read_ahead()
        prepared = future.result()
        if self._bad.numbers.intersection(prepared.actual.tolist()):  # found out since it was read
            prepared = self._prepare(epoch, prepared.wanted)
        self._running.append((epoch, prepared))
        return prepared.feed

    def _read_ahead(self) -> None:
        """Keep every thread busy with a batch, beside those that wait for the dali."""
        while len(self._ahead) < self.prefetch + self.threads:
            step = next(self._steps, None)
            if step is None:
                return
            self._ahead.append((step[0], self._pool.submit(self._prepare, *step)))

    def _prepare(self, epoch: int, wanted: Indices) -> _Prepared:
        """Read the images and draw their parameters; runs in a thread."""
        padded = wanted if len(wanted) else np.zeros(1, np.int64)  # the graph cannot run on nothing
        indices, images, sizes = zip(*(self._read_good(int(i)) for i in padded), strict=True)
        actual = np.array(indices, np.int64)
        kept = np.full(len(actual), True) if self.drop_last else (actual == padded) & (len(wanted) > 0)
        heights, widths = np.array(sizes).T
        drawn = draw_parameters(self.recipe, self.seed, epoch, actual, heights, widths)
        return _Prepared(wanted, actual, kept, drawn, dali.feed(self.recipe, images, drawn, self.device))

    def _read_good(self, i: int) -> tuple[int, NDArray[np.uint8], tuple[int, int]]:
        """Read image ``i``, or another that is not bad: its number, content, and (height, width)."""
        for j in self._bad.candidates(i):
            try:
                return j, *self._read(j)
            except (OSError, BadImageError) as error:
                self._bad.add(j, str(getattr(error, "strerror", None) or error))
        raise AssertionError("the candidates end by an error")

    def _read(self, i: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        data = self.source.read(i)
        if self.source.encoded:
            content = data.tobytes()
            size = image_size(content)
            usable = decodable(content)
            return data if usable is content else np.frombuffer(usable, np.uint8), size
        return _with_channels(data, self.recipe.channels), (data.shape[0], data.shape[1])

    def _recover(self, error: RuntimeError) -> None:
        """Find the files that the decoder refused, then run the batches of the broken graph again in a new one."""
        running = list(self._running)
        self._running.clear()
        self._pipeline = None
        if not (self.source.encoded and any(self._mark_refused(prepared) for _, prepared in running)):
            raise error
        again = [(epoch, self._pool.submit(self._prepare, epoch, prepared.wanted)) for epoch, prepared in running]
        self._ahead.extendleft(reversed(again))
        self._schedule()

    def _mark_refused(self, prepared: _Prepared) -> bool:
        refused = dali.refused(prepared.feed[0], self.recipe.channels, self.device)
        for row in refused:
            self._bad.add(int(prepared.actual[row]), "corrupt: the decoder refuses it")
        return bool(refused)

    def _batch(self, prepared: _Prepared, outputs: Any) -> Batch:
        """Make tensors that live on from the graph's outputs."""
        made = make_views(self.recipe, outputs, prepared.drawn, device=self.device, pool=self._pool, parts=self.threads)
        groups = [self._keep(prepared, group, 1).permute(0, 1, 4, 2, 3) for group in made]
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[prepared.actual])
        indices = torch.from_numpy(prepared.actual).to(self.device)
        labels = None if labels is None else self._keep(prepared, labels.to(self.device), 0)
        return Batch(tuple(groups), labels, self._keep(prepared, indices, 0))

    def _stream(self) -> torch.cuda.Stream | None:
        """Stream that consumes the outputs; bound to it, they need no waiting for the device on the host's side."""
        return None if self.device == "cpu" else torch.cuda.current_stream(self.device)

    def _keep(self, prepared: _Prepared, rows: Tensor, dim: int) -> Tensor:
        if prepared.kept.all():
            return rows
        return rows.index_select(dim, torch.from_numpy(np.flatnonzero(prepared.kept)).to(self.device))

    def _drain(self) -> None:
        """Let the graph finish what it has begun, so that it can start on another epoch."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        for batch in self._made:
            batch.cancel()
        wait(self._made)
        self._made.clear()
        try:
            while self._pipeline is not None:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
                self._pipeline.schedule_run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:
            self._pipeline = None  # broken by a bad file that no one will see; built anew when needed
        self._running.clear()

    def _end_epoch(self) -> None:
        if self._active is not None:
            self._active.close()
        self._active = None


def _with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Convert pixels [H, W, C] between grey and RGB."""
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    grey: NDArray[np.uint8] = np.rint(image @ _LUMA)[..., None].astype(np.uint8)
    return grey
