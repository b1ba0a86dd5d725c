"""The two sides of ``bench/trainer/paired.py`` and the clock that measures both. Each side is a process."""
