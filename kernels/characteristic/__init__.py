"""The distance of sliced characteristic functions from the normal law's."""
