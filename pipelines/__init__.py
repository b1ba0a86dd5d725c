"""Batches of random views from image files, shards or arrays: recipes, sources and the loader."""

from ..errors import DataError
from .loader import Batch, Loader
from .sources.base import ArraySource, FolderSource, Source, Subset
from .sources.dataset import source_from_dataset
from .sources.listing import Listing, Summary
from .sources.open import Splits, open_source
from .views.draw import Parameters, draw_parameters
from .views.recipe import Pixels, View, ViewRecipe, evaluation_view

__all__ = [
    "ArraySource",
    "Batch",
    "DataError",
    "FolderSource",
    "Listing",
    "Loader",
    "Parameters",
    "Pixels",
    "Source",
    "Splits",
    "Subset",
    "Summary",
    "View",
    "ViewRecipe",
    "draw_parameters",
    "evaluation_view",
    "open_source",
    "source_from_dataset",
]
