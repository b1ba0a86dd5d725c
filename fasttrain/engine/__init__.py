"""The step through DeepSpeed."""
