"""Batches of random views from image files, shards or arrays: recipes, sources and the loader."""

from ..errors import DataError
from .loader import Batch, Loader
from .sources.base import ArraySource, FolderSource, Source, Subset
from .sources.dataset import source_from_dataset
from .sources.listing import Listing, Summary
from .sources.measure import measured
from .sources.mixture import MixtureSource
from .sources.open import Splits, open_source
from .views.draw import Parameters, draw_parameters
from .views.recipe import Pixels, Size, View, ViewRecipe, evaluation_view, sides, size_text

__all__ = [
    "ArraySource",
    "Batch",
    "DataError",
    "FolderSource",
    "Listing",
    "Loader",
    "MixtureSource",
    "Parameters",
    "Pixels",
    "Size",
    "Source",
    "Splits",
    "Subset",
    "Summary",
    "View",
    "ViewRecipe",
    "draw_parameters",
    "evaluation_view",
    "measured",
    "open_source",
    "sides",
    "size_text",
    "source_from_dataset",
]
