"""The photometric part of making a view: colours, blur, solarisation, colour space, flip and normalisation.

It reads a batch once. ``reference`` is the definition, ``cpu`` is NumPy in 16 bits, and ``triton`` is the kernel
for GPUs.
"""
