"""Time the objectives with prototypes and their peers. test_similarity.py explains how to run and read it."""

from __future__ import annotations

from bench.kernels.test_similarity import grid
from bench.peers.prototypes import DINO, DINO_ER, SINKHORN


@grid(DINO)
def test_dino(race, case, name):
    race(DINO, name, case)


@grid(DINO_ER)
def test_dino_with_entropy(race, case, name):
    race(DINO_ER, name, case)


@grid(SINKHORN)
def test_sinkhorn(race, case, name):
    race(SINKHORN, name, case)
