"""The photometric end of making a view, one pass over a batch: colours, blur, solarisation, colour space, flip,
normalisation. ``reference`` is the definition, ``cpu`` NumPy in 16 bits, ``triton`` the kernel for GPUs.
"""  # noqa: D205
