"""Sources of images: folders, shards and data sets."""
