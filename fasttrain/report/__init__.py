"""Looking at a run: its views before it starts, its curves when it ends."""
