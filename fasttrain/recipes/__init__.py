"""Published and tried settings, ``<recipe>/<method>.yaml``."""
