"""A run: the loop, its guard, its monitors and its records."""
