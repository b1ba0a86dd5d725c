"""The loader: it chooses the images of each step, reads ahead, runs the DALI graph and returns torch tensors.

A few Python threads read files and draw parameters some batches ahead. DALI works on ``prefetch`` batches in its own
threads. On the CPU, the Python threads also make the views of another ``prefetch`` batches while the caller trains.
All waiting is on locks; nothing spins. A thread prepares whole batches, because handing over 256 small files one by
one costs more than reading them. The batches are a function of (seed, epoch, position) alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
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
from .sources.decode import Raster, as_raster, decode, is_plain, pnm, reduced, to_pixels
from .sources.headers import BadImageError, decodable, image_size, is_large, reduction
from .sources.mixture import MixtureSource
from .views.draw import Parameters, draw_parameters, epoch_order
from .views.recipe import ViewRecipe

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Views of B images. Pixels are channels-last in memory, so ``views[g].flatten(0, 1)`` needs no copy."""

    views: tuple[Tensor, ...]  # one tensor per resolution group: float32 [V_g, B, C, H, W], normalised
    labels: Tensor | None  # [B] int64
    indices: Tensor  # [B] int64, numbers of the images in the source


@dataclass(frozen=True)
class _Prepared:
    """A batch that is ready for the graph. ``actual`` differs from ``requested`` where a file is bad."""

    requested: Indices  # [B] samples, see ``Loader._order``; in an evaluation some rows may be padding
    actual: Indices  # [B] images
    valid: NDArray[np.bool_]  # [B] rows that the caller gets
    parameters: Parameters
    feed: dali.Feed


class Loader:
    """Batches of views of the images of a source.

    In training every global batch has ``batch_size * world_size`` images, and rank r gets its r-th part. With
    ``drop_last=False`` every image comes once per epoch, over all ranks. The last batches are then smaller and may be
    empty, but each rank yields ``steps_per_epoch`` batches, so that collective operations stay in step.

    A file that cannot be read or decoded is logged once, listed in ``bad``, and replaced by a good one. With
    ``drop_last=False`` it is left out instead. Raises DataError if no good image remains, or if more than the fraction
    ``max_bad_fraction`` is bad, see ``BadImages``. With ``labels=False`` the batches have no labels.

    :meth:`epoch` gives the batches of a certain epoch. Any trainer can also use the loader like a stateful
    ``DataLoader``: each loop over it is the next epoch, and a saved state continues on any number of ranks, at the
    next image of the same order::

        loader = Loader(open_source("images").train, recipe, batch_size=64, rank=rank, world_size=world_size)
        if os.path.exists("last.pt"):
            checkpoint = torch.load("last.pt")
            model.load_state_dict(checkpoint["model"])
            loader.load_state_dict(checkpoint["loader"])  # of this rank or of any other
        while loader.state_dict()["epoch"] < 100:
            for batch in loader:
                train_step(model, batch.views, batch.labels)
                if signal_arrived():
                    torch.save({"model": model.state_dict(), "loader": loader.state_dict()}, "last.pt")
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
        labels: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("threads", threads), ("prefetch", prefetch)):
            if value < 1:
                raise DataError(f"{name}: must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank: must be between 0 and {world_size - 1} of {world_size} rank(s), got {rank}")
        if drop_last and batch_size * world_size > len(source):
            raise DataError(
                f"{source.name}: a batch of {batch_size * world_size} images over {world_size} rank(s) is larger than "
                f"the data, {len(source)} images; use a smaller batch size"
            )
        dali.require_dali()
        self.source, self.recipe, self.batch_size = source, recipe, batch_size
        self._encoded = source.encoded and recipe.channels in (1, 3)  # DALI's decoder knows grey and RGB
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, str(device)
        self.threads, self.prefetch, self.shuffle, self.drop_last = threads, prefetch, shuffle, drop_last
        self._labels = source.labels if labels else None
        self.steps_per_epoch = self._steps_from(0)
        self._bad = BadImages(source, max_bad_fraction, None if shuffle else -(-len(source) // world_size))
        # Large images are decoded one by one: each thread that did so would also keep the freed memory.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="fasttrain-large")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fasttrain-read")
        # On a GPU the caller makes the batch: this only starts kernels, on the stream that will use their results.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="fasttrain-make") if self.device == "cpu" else None
        self._pipeline: Any = None
        self._steps: Iterator[tuple[int, Indices]] = iter(())
        self._ahead: deque[tuple[int, Future[_Prepared]]] = deque()  # batches that the threads read
        self._running: deque[tuple[int, _Prepared]] = deque()  # batches in the graph
        self._made: deque[Future[Batch]] = deque()  # batches whose views are being made
        self._active: Generator[Batch, None, None] | None = None
        self._next_image = (0, 0)  # epoch and position in its order
        self._resume = False  # whether the next loop starts at that image, not at an epoch's first image

    @property
    def bad(self) -> dict[str, str]:
        """Names of the images that proved bad, with the reasons."""
        return self._bad.reasons

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Generator[Batch, None, None]:
        """Return the batches of the next epoch, or after :meth:`load_state_dict` the rest of the saved one.

        A loop that was left early does not continue: as with a ``DataLoader``, the next loop is a new epoch.
        """
        epoch, position = self._next_image
        if position and not self._resume:
            epoch, position = epoch + 1, 0
        return self._start(epoch, position)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Return the batches ``start_step``, ``start_step + 1``, ... of an epoch. End the current epoch, if any."""
        return self._start(epoch, start_step * self.batch_size * self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, as plain numbers and strings. It is the same on every rank.

        ``position`` counts the images of the epoch's order that all ranks have had together.
        """
        epoch, position = self._next_image
        return {"epoch": epoch, "position": position, "seed": self.seed} | self._identity()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`, also of a loader with another batch size or number of ranks.

        The loader takes the state's seed. The order of the images and their views stay the same. Raises ValueError
        if the state is of other data (by the number of images, classes and labels), other views or another
        ``shuffle``.
        """
        missing = sorted({"epoch", "position", "seed", *self._identity()} - set(state))
        if missing:
            raise ValueError(f"state: must come from Loader.state_dict(), got no {', '.join(missing)}")
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"state: must have {name} {value} as this loader, got {state[name]}. "
                    "Use the source, the recipe and the shuffle of the loader that saved it."
                )
        self._end_epoch()
        self.seed, self._next_image, self._resume = state["seed"], (state["epoch"], state["position"]), True

    def close(self) -> None:
        """Stop the threads and free the graph's memory."""
        self._end_epoch()
        if self._maker is not None:
            self._maker.shutdown()
        self._pool.shutdown(cancel_futures=True)
        self._large.shutdown()
        self._pipeline = None

    def _identity(self) -> dict[str, Any]:
        """Return the part of the state that must be the same where it is loaded."""
        return {"images": len(self.source), "data": self._data, "views": self._views, "shuffle": self.shuffle}

    @cached_property
    def _data(self) -> str:
        """Hash of the kind of images, the classes and the labels. Paths may differ between machines."""
        source = self.source
        digest = hashlib.sha256(repr((source.channels, source.encoded, source.classes)).encode())
        digest.update(b"" if source.labels is None else source.labels.tobytes())
        digest.update(repr(source.quotas).encode() if isinstance(source, MixtureSource) else b"")
        return digest.hexdigest()[:16]

    @cached_property
    def _views(self) -> str:
        return hashlib.sha256(repr(self.recipe).encode()).hexdigest()[:16]

    def _start(self, epoch: int, position: int) -> Generator[Batch, None, None]:
        self._end_epoch()
        self._active = batches = self._batches(epoch, position)
        return batches

    def _batches(self, epoch: int, position: int) -> Generator[Batch, None, None]:
        self._steps = iter([(epoch, indices) for indices in self._plan(epoch, position)])
        count = self._steps_from(position)
        try:
            self._read_ahead()
            self._schedule()
            for step in range(count):
                batch = self._take(count - step)
                position += self.batch_size * self.world_size
                self._next_image = (epoch, position) if step + 1 < count else (epoch + 1, 0)
                self._resume = False
                yield batch
        finally:
            self._drain()
        self._next_image = (epoch + 1, 0)

    def _steps_from(self, position: int) -> int:
        """Return the number of steps from a position to the end of the epoch."""
        images, total = max(0, len(self.source) - position), self.batch_size * self.world_size
        return images // total if self.drop_last else -(-images // total)

    def _plan(self, epoch: int, position: int) -> list[Indices]:
        """List the images of this rank at each step."""
        total = self.batch_size * self.world_size
        order = self._order(epoch)[position:]
        steps = [order[step * total : (step + 1) * total] for step in range(self._steps_from(position))]
        return [np.array_split(step, self.world_size)[self.rank] for step in steps]

    def _order(self, epoch: int) -> Indices:
        """Return the samples of an epoch. Sample ``i + r * N`` is image ``i`` of N after it came ``r`` times before."""
        count = len(self.source)
        if not self.shuffle:
            return np.arange(count)
        if isinstance(self.source, MixtureSource):
            order = self.source.order(self.seed, epoch)
            return order.images + order.rounds * count
        return epoch_order(self.seed, epoch, count)

    def _take(self, left: int) -> Batch:
        """Return the next batch of the ``left`` remaining ones, and have others made meanwhile."""
        if self._maker is None:
            return self._next()
        while len(self._made) < min(left, self.prefetch):
            self._made.append(self._maker.submit(self._next))
        batch = self._made.popleft().result()
        if left > self.prefetch:
            self._made.append(self._maker.submit(self._next))
        return batch

    def _next(self) -> Batch:
        """Take the oldest batch out of the graph, and put in a new one to work on while the caller trains."""
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
        """Start the graph on further batches, if there are any. The graph takes them from ``_feed``."""
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
            encoded=self._encoded,
            device=self.device,
            threads=self.threads,
            prefetch=self.prefetch,
        )

    def _feed(self) -> dali.Feed:
        """Return the next batch for the graph. Raise StopIteration at the end of the epoch."""
        if not self._ahead:
            raise StopIteration
        epoch, future = self._ahead.popleft()
        self._read_ahead()
        prepared = future.result()
        if self._bad.numbers.intersection(prepared.actual.tolist()):  # an image proved bad after it was read
            prepared = self._prepare(epoch, prepared.requested)
        self._running.append((epoch, prepared))
        return prepared.feed

    def _read_ahead(self) -> None:
        """Keep every thread busy with a batch, in addition to the batches that wait for the graph."""
        while len(self._ahead) < self.prefetch + self.threads:
            step = next(self._steps, None)
            if step is None:
                return
            self._ahead.append((step[0], self._pool.submit(self._prepare, *step)))

    def _prepare(self, epoch: int, requested: Indices) -> _Prepared:
        """Read the images and draw their parameters. Runs in a thread."""
        samples = requested if len(requested) else np.zeros(1, np.int64)  # the graph needs at least one image
        rounds, padded = np.divmod(samples, len(self.source))
        indices, images, sizes = zip(*(self._read_good(int(i)) for i in padded), strict=True)
        actual = np.array(indices, np.int64)
        valid = np.full(len(actual), True) if self.drop_last else (actual == padded) & (len(requested) > 0)
        heights, widths = np.array(sizes).T
        drawn = actual + rounds * len(self.source)  # an image that comes again has other views
        parameters = draw_parameters(self.recipe, self.seed, epoch, drawn, heights, widths)
        return _Prepared(requested, actual, valid, parameters, dali.feed(self.recipe, images, parameters, self.device))

    def _read_good(self, i: int) -> tuple[int, NDArray[np.uint8], tuple[int, int]]:
        """Read image ``i``, or a good one instead. Return its number, content, and (height, width)."""
        for j in self._bad.candidates(i):
            try:
                return j, *self._read(j)
            except (OSError, BadImageError) as error:
                self._bad.add(j, str(getattr(error, "strerror", None) or error))
        raise AssertionError("candidates() raises at its end")

    def _read(self, i: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        data = self.source.read(i)
        content = data.tobytes() if self.source.encoded else b""
        if plain := self._encoded and is_plain(content):
            size = image_size(content)
            if reduction(*size) == (1, 1):
                usable = decodable(content)
                return data if usable is content else np.frombuffer(usable, np.uint8), size
        if plain or is_large(content):
            raster = self._large.submit(self._raster, data, content).result()
        else:
            raster = self._raster(data, content)
        pixels = to_pixels(raster, self.recipe.channels, self.recipe.pixel_range)
        return pnm(pixels) if self._encoded else pixels, (pixels.shape[0], pixels.shape[1])

    def _raster(self, data: NDArray[Any], content: bytes) -> Raster:
        return reduced(decode(content) if self.source.encoded else as_raster(data))

    def _recover(self, error: RuntimeError) -> None:
        """Identify the files that the decoder rejected, and run the batches of the failed graph in a new one."""
        running = list(self._running)
        self._running.clear()
        self._pipeline = None
        if not (self._encoded and any(self._mark_rejected(prepared) for _, prepared in running)):
            raise error
        again = [(epoch, self._pool.submit(self._prepare, epoch, prepared.requested)) for epoch, prepared in running]
        self._ahead.extendleft(reversed(again))
        self._schedule()

    def _mark_rejected(self, prepared: _Prepared) -> bool:
        rejected = dali.rejected(prepared.feed[0], self.recipe.channels, self.device)
        for row in rejected:
            self._bad.add(int(prepared.actual[row]), "corrupt: the decoder rejects it")
        return bool(rejected)

    def _batch(self, prepared: _Prepared, outputs: Any) -> Batch:
        """Copy the graph's outputs to tensors that outlive it."""
        groups = make_views(
            self.recipe, outputs, prepared.parameters, device=self.device, pool=self._pool, parts=self.threads
        )
        views = tuple(self._select(prepared, group, 1).permute(0, 1, 4, 2, 3) for group in groups)
        indices = prepared.actual[prepared.valid]
        labels = None if self._labels is None else self._to_device(self._labels[indices])
        return Batch(views, labels, self._to_device(indices))

    def _to_device(self, values: Indices) -> Tensor:
        """Copy to the device. The host does not wait, which it would for the work of the step before."""
        tensor = torch.from_numpy(values)
        return tensor if self.device == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _stream(self) -> torch.cuda.Stream | None:
        """Return the stream that uses the outputs. With it, the host need not wait for the device."""
        return None if self.device == "cpu" else torch.cuda.current_stream(self.device)

    def _select(self, prepared: _Prepared, rows: Tensor, dim: int) -> Tensor:
        if prepared.valid.all():
            return rows
        return rows.index_select(dim, self._to_device(np.flatnonzero(prepared.valid)))

    def _drain(self) -> None:
        """Let the graph finish its work, so that it can start another epoch."""
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
            self._pipeline = None  # a bad file that no caller will see broke it; it is built again when needed
        self._running.clear()

    def _end_epoch(self) -> None:
        if self._active is not None:
            self._active.close()
        self._active = None
