"""Where images come from: folders, shards and data sets."""
