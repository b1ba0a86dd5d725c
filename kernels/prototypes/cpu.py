"""The CPU path: chunks of rows with all prototypes, and the gradient while a chunk's probabilities are in the cache.

    s_ik = scale_s <h_i, w_k>        P = softmax_k(s)       student rows h, prototypes w [K, D]
    t_jk = scale_t <q_j, v_k> + b_k  p = softmax_k(t)       teacher rows q, prototypes v [K, D], no gradient

    loss = sum_i (c_i lse_i - sum_k Q_ik s_ik)      Q_ik: the sum of p over the teacher's rows that row i learns, times
                                                    the weight of the image;   c_i = sum_k Q_ik
    G = dloss/ds = c P - Q,   dh = scale_s G w,   dw = scale_s G^T h

A scalar loss needs the scores once: when the sums of a chunk's rows are complete, its scores become G, and both
gradients follow. The backward pass multiplies them by the incoming gradient. For equal numbers of rows this takes 4
products of rows x K x D. A pass for the sums and another one for the gradients would take 8.

The gradient g of the mean assignment m_k = mean_i P_ik, and the gradient of the rows' entropies, are known in the
backward pass only. There, the chunks are computed again, and G has one more term:

    P (u - sum_k P u),   u_ik = g_k / rows - c_i log P_ik

Few probabilities are saved instead. Everything is in base 2 with exp2, as in similarity/cpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import accumulable, accumulation_type
from ..similarity.cpu import CLAMP, LOG2E, is_bounded, spans
from .problem import Problem, Results

_AREA = 768 * 768
_ROWS = 256
"""Student's rows per chunk. Every chunk reads and writes the gradient of all prototypes once."""
_KEPT = 1 << 21


def is_kept(problem: Problem) -> bool:
    """Return whether all rows are one chunk of one tile, whose probabilities may be saved for the backward pass."""
    return problem.rows * len(problem.prototypes) <= _KEPT


def in_forward(problem: Problem) -> bool:
    """Return whether the forward pass computes the gradients."""
    return problem.teacher is not None and not problem.marginal and (problem.need_student or problem.need_prototypes)


def loss(problem: Problem) -> Results:
    """Return the loss, the mean assignment, both gradients if :func:`in_forward`, else the saved probabilities."""
    dtype = accumulation_type(problem.student)
    value = problem.student.new_zeros((), dtype=dtype)
    marginal = value.new_zeros(len(problem.prototypes) if problem.marginal else 0)
    gradients = _Gradients(problem) if in_forward(problem) else None
    kept = value.new_empty(0, 0), value.new_empty(0, 0)
    for chunk in _chunks(problem):
        value += chunk.fill()
        if gradients is not None:
            gradients.add(chunk, chunk.scores_gradient())
        elif problem.marginal:
            value += chunk.normalise(marginal)
            if problem.need_student or problem.need_prototypes:
                kept = chunk.kept()
    dh, dw = (value.new_empty(0, 0, 0), value.new_empty(0, 0)) if gradients is None else gradients.results()
    return value, marginal, dh, dw, *kept


def shapes(problem: Problem) -> Results:
    """Return new tensors like the results of :func:`loss`."""
    student, prototypes = problem.student, problem.prototypes

    def new(used: bool, *shape: int) -> Tensor:
        return student.new_empty(shape if used else (0,) * len(shape), dtype=accumulation_type(student))

    forward = in_forward(problem)
    kept = problem.marginal and (problem.need_student or problem.need_prototypes) and is_kept(problem)
    teachers = 0 if problem.teacher is None else problem.teacher.shape[0] * problem.teacher.shape[1]
    return (
        new(True),
        new(problem.marginal, prototypes.shape[0]),
        new(forward and problem.need_student, *student.shape),
        new(forward and problem.need_prototypes, *prototypes.shape),
        new(kept, problem.rows, prototypes.shape[0]),
        new(kept and teachers > 0, teachers, prototypes.shape[0]),
    )


def backward(problem: Problem, saved: list[Tensor], loss_grad: Tensor, marginal_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's rows [S, B, D] and prototypes [K, D], in the type of accumulation.

    Those not needed are empty.
    """
    if in_forward(problem):
        return saved[0] * loss_grad, saved[1] * loss_grad
    gradients = _Gradients(problem)
    for chunk in _chunks(problem, saved[2:]):
        if not is_kept(problem):
            chunk.fill()
            chunk.normalise()
        gradients.add(chunk, chunk.later_gradient(loss_grad, marginal_grad))
    return gradients.results()


Tile = tuple[slice, Tensor]
"""A range of the prototypes, and a number for each of a chunk's rows and these prototypes."""


class _Softmax:
    """The softmax of some rows over all prototypes, tile by tile: scores, then exponentials, then probabilities."""

    def __init__(
        self, rows: Tensor, prototypes: Tensor, bias: Tensor | None, scale: float, bounded: bool, tiles: list[Tile]
    ) -> None:
        self._scaled, self._prototypes, self._bias, self.tiles = rows * (scale * LOG2E), prototypes, bias, tiles
        self._total = rows.new_zeros(len(rows), 1)
        self._top = None if bounded else rows.new_full((len(rows), 1), -torch.inf)
        self._tops: list[Tensor] = []

    def scores(self) -> Iterator[Tile]:
        """Yield the scores in base 2. Afterwards each tile is the exponentials relative to the largest one so far."""
        for k, tile in self.tiles:
            torch.mm(self._scaled, accumulable(self._prototypes[k]).T, out=tile)
            if self._bias is not None:
                parts = tile.view(len(self._bias), -1, tile.shape[1])
                parts += self._bias[:, None, k] * LOG2E
            yield k, tile
            if self._top is not None:
                top = torch.maximum(self._top, tile.amax(1, keepdim=True))
                self._total *= (self._top - top).exp2_()
                self._top = top
                self._tops.append(top)
                tile.sub_(top).clamp_min_(CLAMP)
            self._total += tile.exp2_().sum(1, keepdim=True)

    def lse(self) -> Tensor:
        """Return the log of each row's sum, in base 2."""
        total = self._total.log2()
        return total if self._top is None else total.add_(self._top)

    def normalise(self, weights: Tensor) -> Iterator[Tile]:
        """Turn the exponentials into probabilities times the weight of the row [N, 1], and yield them."""
        factor = weights / self._total
        for number, (k, tile) in enumerate(self.tiles):
            yield k, tile.mul_(factor if self._top is None else factor * (self._tops[number] - self._top).exp2_())


class _Chunk:
    """Some images of a problem: their rows, and tiles of the student and of the teacher."""

    def __init__(self, problem: Problem, images: slice, bounded: list[bool], tiles: list[list[Tile]]) -> None:
        self.problem, self.images = problem, images
        self.rows = accumulable(problem.student[:, images]).flatten(0, 1)
        self._weights = problem.row_weights(self.rows.dtype)[:, images].reshape(-1, 1)
        self._mean_weights = problem.mean_weights(self.rows.dtype)[:, images].reshape(-1, 1)
        self._student = _Softmax(self.rows, problem.prototypes, None, problem.student_scale, bounded[0], tiles[0])
        self._teacher = None
        if problem.teacher is not None and problem.teacher_prototypes is not None:
            rows = accumulable(problem.teacher[:, images]).flatten(0, 1)
            options = problem.bias, problem.teacher_scale, bounded[1], tiles[1]
            self._teacher = _Softmax(rows, problem.teacher_prototypes, *options)
            each = problem.weighted(rows.new_ones(*problem.teacher.shape[:2], 1))
            self._teacher_weights = each[:, images].reshape(-1, 1)

    def fill(self) -> Tensor:
        """Compute Q and the exponentials of the student's scores. Return the chunk's part of the cross-entropy."""
        if self._teacher is None:
            for _ in self._student.scores():
                pass
            return self.rows.new_zeros(())
        for _ in self._teacher.scores():
            pass
        crossed = self.rows.new_zeros(())
        targets = self._teacher.normalise(self._teacher_weights)
        for (_, scores), (_, target) in zip(self._student.scores(), targets, strict=True):
            crossed += self._crossed(self._views(scores), self._views(target))
        return (self._weights * self._student.lse()).sum().sub_(crossed).mul_(math.log(2))

    def normalise(self, marginal: Tensor | None = None) -> Tensor:
        """Compute P, and add to the mean assignment. Without a teacher, return the sum of the weighted entropies."""
        entropy = self.rows.new_zeros(())
        for k, p in self._student.normalise(torch.ones_like(self._weights)):
            if marginal is not None:
                marginal[k] += torch.mv(p.T, self._mean_weights[:, 0])
            if self._teacher is None:
                entropy -= ((_log2(p) * p).sum(1) * self._weights[:, 0]).sum()
        return entropy.mul_(math.log(2))

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return P and Q of a single tile."""
        nothing = self.rows.new_empty(0, 0)
        if not is_kept(self.problem):
            return nothing, nothing.clone()
        return self._student.tiles[0][1], nothing if self._teacher is None else self._teacher.tiles[0][1]

    def scores_gradient(self) -> Iterator[Tile]:
        """Yield G = c P - Q after :meth:`fill`."""
        assert self._teacher is not None
        for (k, grad), (_, target) in zip(self._student.normalise(self._weights), self._teacher.tiles, strict=True):
            self._subtract(self._views(grad), self._views(target))
            yield k, grad

    def later_gradient(self, loss_grad: Tensor, marginal_grad: Tensor) -> Iterator[Tile]:
        """Yield G of both results for their gradients, after :meth:`normalise`."""
        of_rows, each = loss_grad * self._weights, self._mean_weights
        taught = self._teacher is not None
        mean = torch.zeros_like(of_rows)
        for k, p in self._student.tiles:
            mean.addcmul_(each, torch.mv(p, marginal_grad[k])[:, None])
            if not taught:
                mean -= of_rows * math.log(2) * (_log2(p) * p).sum(1, keepdim=True)
        for number, (k, p) in enumerate(self._student.tiles):
            # P itself may be saved, so G is a new tile.
            if self._teacher is None:
                grad = _log2(p).mul_(-of_rows * math.log(2)).addcmul_(each, marginal_grad[k]).sub_(mean).mul_(p)
            else:
                grad = torch.addcmul(of_rows - mean, each, marginal_grad[k]).mul_(p)
                target = self._teacher.tiles[number][1] * loss_grad
                self._subtract(self._views(grad), self._views(target))
            yield k, grad

    def _views(self, tile: Tensor) -> Tensor:
        return tile.view(-1, self.images.stop - self.images.start, tile.shape[1])

    def _crossed(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of Q s, for the scores [S, b, k] and weighted probabilities [T, b, k] of a tile."""
        if self.problem.own:
            return (scores * targets).sum(2).sum()
        crossed = (scores.sum(0) * targets.sum(0)).sum(1).sum()
        for score, own in zip(scores, targets, strict=False):
            crossed -= (score * own).sum(1).sum()
        return crossed

    def _subtract(self, grad: Tensor, targets: Tensor) -> None:
        """Subtract Q from a tile [S, b, k], for the weighted probabilities [T, b, k]."""
        if self.problem.own:
            grad -= targets
            return
        grad -= targets.sum(0)
        for view, own in zip(grad, targets, strict=False):
            view += own


class _Gradients:
    """The gradients of the student's rows and of the prototypes, chunk by chunk."""

    def __init__(self, problem: Problem) -> None:
        self._problem, like = problem, accumulable(problem.student[:0, :0, :0])
        self._dh = like.new_empty(problem.student.shape if problem.need_student else (0, 0, 0))
        self._dw = like.new_empty(problem.prototypes.shape if problem.need_prototypes else (0, 0))
        self._first = True

    def add(self, chunk: _Chunk, gradients: Iterator[Tile]) -> None:
        """Add a chunk's products with G."""
        scale, dh = self._problem.student_scale, torch.zeros_like(chunk.rows)
        for k, grad in gradients:
            if self._problem.need_student:
                dh.addmm_(grad, accumulable(self._problem.prototypes[k]), alpha=scale)
            if self._problem.need_prototypes:
                self._dw[k].addmm_(grad.T, chunk.rows, beta=0 if self._first else 1, alpha=scale)
        if self._problem.need_student:
            of_images = self._dh[:, chunk.images]
            of_images.copy_(dh.view_as(of_images))
        self._first = False

    def results(self) -> tuple[Tensor, Tensor]:
        return self._dh, self._dw


def _chunks(problem: Problem, kept: list[Tensor] | None = None) -> Iterator[_Chunk]:
    """Yield the chunks of images one after another, in the same memory, or in the saved tiles."""
    views, images, _ = problem.student.shape
    count, single = len(problem.prototypes), is_kept(problem)
    parts = spans(images, images if single else max(1, _ROWS // views))
    columns = spans(count, count if single else max(1, _AREA // (views * parts[0].stop)))
    sides: list[tuple[Tensor, Tensor, Tensor | None, float]] = [
        (problem.student, problem.prototypes, None, problem.student_scale)
    ]
    if problem.teacher is not None and problem.teacher_prototypes is not None:
        sides.append((problem.teacher, problem.teacher_prototypes, problem.bias, problem.teacher_scale))
    # One tile needs a maximum anyway, and norms would cost more.
    bounded = [not single and is_bounded(rows.flatten(0, 1), w, bias, scale) for rows, w, bias, scale in sides]
    memory = (
        kept
        if kept and single
        else [rows.new_empty(len(rows) * parts[0].stop * count, dtype=accumulation_type(rows)) for rows, *_ in sides]
    )
    for part in parts:
        tiles = [
            list(_tiles(memory[side].view(-1), len(rows) * (part.stop - part.start), columns))
            for side, (rows, *_) in enumerate(sides)
        ]
        yield _Chunk(problem, part, bounded, tiles)


def _tiles(memory: Tensor, rows: int, columns: list[slice]) -> Iterator[Tile]:
    for k in columns:
        yield k, memory[rows * k.start : rows * k.stop].view(rows, k.stop - k.start)


def _log2(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log2_()
