"""The nearest row of each row, by the inner product."""
