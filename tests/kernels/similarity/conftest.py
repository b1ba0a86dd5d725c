"""Fresh memory holds NaN here, so that reading what was never written shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """``new_empty`` of floating point tensors is filled with NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made = empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() and not torch.compiler.is_compiling() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
