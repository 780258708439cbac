"""ssmquant: low-bit quantization of state-space vision models, for existing codebases.

prepared = ssmquant.prepare(model, ssmquant.QConfig(w_bits=2, a_bits=2))
...  # fine-tune
deployed = ssmquant.convert(prepared)
ssmquant.save(deployed, "restorer.safetensors")
"""

from ssmquant._standins import install_standins, remove_standins, standins
from ssmquant.adapter import Adapter, FunctionRole, ScanRole, register_adapter
from ssmquant.analysis import (
    HealthMonitor,
    HealthReport,
    HealthRow,
    HealthWarning,
    Sensitivity,
    SensitivityRow,
    health,
    report,
    search,
    sensitivity,
    summary,
    verify,
)
from ssmquant.config import QConfig, Rule
from ssmquant.errors import (
    CalibrationError,
    ConfigError,
    CoverageError,
    FormatError,
    InputError,
    MethodError,
    NotCalibratedError,
    SsmquantError,
    TraceError,
)
from ssmquant.io import load, load_checkpoint, save
from ssmquant.learning import learn_ranges
from ssmquant.synthetic import synthetic_batches
from ssmquant.workflow import calibrate, convert, cuda_graph, param_groups, prepare

__version__ = "0.1.0.dev0"

__all__ = [
    "Adapter",
    "CalibrationError",
    "ConfigError",
    "CoverageError",
    "FormatError",
    "FunctionRole",
    "HealthMonitor",
    "HealthReport",
    "HealthRow",
    "HealthWarning",
    "InputError",
    "MethodError",
    "NotCalibratedError",
    "QConfig",
    "Rule",
    "ScanRole",
    "Sensitivity",
    "SensitivityRow",
    "SsmquantError",
    "TraceError",
    "calibrate",
    "convert",
    "cuda_graph",
    "health",
    "install_standins",
    "learn_ranges",
    "load",
    "load_checkpoint",
    "param_groups",
    "prepare",
    "register_adapter",
    "remove_standins",
    "report",
    "save",
    "search",
    "sensitivity",
    "standins",
    "summary",
    "synthetic_batches",
    "verify",
]
