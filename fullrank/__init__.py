"""Statistics of representation collapse: exact where they can be, honest about n, streaming, mergeable."""

from fullrank import measures
from fullrank.diagnosis import Verdict
from fullrank.moments import Moments, merge
from fullrank.monitor import SpectrumMonitor
from fullrank.reference import Reference

__all__ = ["Moments", "Reference", "SpectrumMonitor", "Verdict", "measures", "merge"]
