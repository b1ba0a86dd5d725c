"""Show a run: its views before it starts, and a page about it at any time."""
