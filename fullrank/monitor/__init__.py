"""The monitor: recent traffic as blocks of rows, their windows, and what they say."""

from fullrank.monitor.monitor import SpectrumMonitor

__all__ = ["SpectrumMonitor"]
