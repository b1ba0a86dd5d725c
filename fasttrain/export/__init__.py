"""Export a trained backbone for other programs: one module per format, each of which checks its file."""
