"""From image files or arrays to batches of random views: recipes, sources and the loader. DALI comes with a Loader."""

from .loader import Batch, Loader
from .sources import ArraySource, DataError, FolderSource, Source, Splits, open_source
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
]
