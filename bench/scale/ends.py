"""Compare the ends of runs: all weights, buffers and moments of the newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from fasttrain.checkpoint import state
from fasttrain.checkpoint.card import read_card

State = dict[str, torch.Tensor]


def ended(output: Path) -> State:
    """Return whole tensors by name, from a checkpoint of any ZeRO stage and number of ranks."""
    folder = output / "checkpoints"
    newest = folder / (folder / "latest").read_text().strip()
    card = read_card(newest)
    return state.read(newest, card.zero_stage, card.world_size, ()).whole()


def same(output: Path, expected: State) -> bool:
    """Return whether a run ended with the expected tensors, to the last bit."""
    tensors = ended(output)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
