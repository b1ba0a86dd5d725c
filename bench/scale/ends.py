"""Where a run ended: every weight, buffer and moment of its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from fasttrain.checkpoint import state
from fasttrain.checkpoint.card import read_card

State = dict[str, torch.Tensor]


def ended(output: Path) -> State:
    """Tensors by name, whole, whatever the stage and the number of ranks that wrote them."""
    folder = output / "checkpoints"
    newest = folder / (folder / "latest").read_text().strip()
    card = read_card(newest)
    return state.read(newest, card.zero_stage, card.world_size, ()).whole()


def same(output: Path, expected: State) -> bool:
    """Whether a run ended where another did, to the last bit."""
    found = ended(output)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
