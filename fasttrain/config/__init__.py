"""The configuration of a run: its settings, how they are merged, and the command line that sets them."""
