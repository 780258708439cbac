"""Looking at prepared and deployed models: what is quantized, what it costs, how exact it is."""

from ssmquant.analysis.summary import Summary, SummaryRow, summary
from ssmquant.analysis.verify import SiteError, VerifyReport, verify

__all__ = ["SiteError", "Summary", "SummaryRow", "VerifyReport", "summary", "verify"]
