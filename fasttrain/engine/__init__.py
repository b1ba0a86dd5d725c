"""The training step through DeepSpeed."""
