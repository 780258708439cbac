"""Looking at prepared and deployed models: what is quantized, what it costs, how exact it is, whether it is healthy."""

from ssmquant.analysis.health import HealthMonitor, HealthReport, HealthRow, HealthWarning, health
from ssmquant.analysis.report import report
from ssmquant.analysis.search import search
from ssmquant.analysis.sensitivity import Sensitivity, SensitivityRow, sensitivity
from ssmquant.analysis.summary import Summary, SummaryRow, summary
from ssmquant.analysis.verify import SiteError, VerifyReport, verify

__all__ = [
    "HealthMonitor",
    "HealthReport",
    "HealthRow",
    "HealthWarning",
    "Sensitivity",
    "SensitivityRow",
    "SiteError",
    "Summary",
    "SummaryRow",
    "VerifyReport",
    "health",
    "report",
    "search",
    "sensitivity",
    "summary",
    "verify",
]
