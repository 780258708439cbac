"""Rounding of weights that keeps the outputs of their layers (``QConfig.rounding="gptq"``).

``gptq`` is the arithmetic, ``inputs`` measures what weights multiply, ``weights`` rounds those of a model.
"""
