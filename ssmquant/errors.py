"""Every error that the library raises on purpose.

All derive from :class:`SsmquantError`, so ``except ssmquant.SsmquantError`` catches them; each one's text says what
was wrong, where, and what to do next. Those that stem from an argument also derive from :class:`ValueError`.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "ConfigError",
    "CoverageError",
    "FormatError",
    "InputError",
    "MethodError",
    "NotCalibratedError",
    "SsmquantError",
    "TraceError",
]


class SsmquantError(Exception):
    """Base of all errors of the library."""


class ConfigError(SsmquantError, ValueError):
    """A configuration or an argument is out of range or contradicts itself."""


class InputError(SsmquantError, ValueError):
    """A tensor, image or batch cannot be used as it is (empty, wrong rank, not finite ...)."""


class TraceError(SsmquantError):
    """The model's Python code could not be turned into a graph; names the line of the user's code."""


class CoverageError(SsmquantError):
    """Something that should be quantized is not: a parameter no site covers, or a rule that matches nothing."""


class CalibrationError(SsmquantError):
    """Calibration data were empty or not finite."""


class NotCalibratedError(SsmquantError):
    """An evaluation was asked for before activation ranges were known."""


class MethodError(SsmquantError):
    """A method other than the traced one reached a quantized module and would have run it in float."""


class FormatError(SsmquantError):
    """A file is cut short, tampered with, of another version, or made for another model."""
