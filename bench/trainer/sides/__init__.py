"""The two sides of ``bench/trainer/paired.py``, each in a process of its own, and the clock that both are held to."""
