"""The two sides of ``bench/trainer.py``, each in a process of its own, and the clock that both are held to."""
