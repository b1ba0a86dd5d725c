"""Labelled points around one centre per class."""

import numpy as np
import torch


def blobs(count, seed, classes=5, dim=8, spread=1.0):
    """Return rows [count, dim] and labels [count]. The centres are the same for every seed."""
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rows = centres[labels] + spread * np.random.default_rng(seed).normal(size=(count, dim))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
