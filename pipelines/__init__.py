"""From image files, shards or arrays to batches of random views: recipes, sources and the loader."""

from .dataset import source_from_dataset
from .loader import Batch, Loader
from .opening import Splits, open_source
from .sources import ArraySource, DataError, FolderSource, Source
from .views import Parameters, View, ViewRecipe, draw_parameters, evaluation_view

__all__ = [
    "ArraySource",
    "Batch",
    "DataError",
    "FolderSource",
    "Loader",
    "Parameters",
    "Source",
    "Splits",
    "View",
    "ViewRecipe",
    "draw_parameters",
    "evaluation_view",
    "open_source",
    "source_from_dataset",
]
