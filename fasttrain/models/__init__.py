"""Backbones, heads, teachers, and the files their weights come from."""
