"""Statistics of representation collapse: exact where they can be, honest about n, streaming, mergeable."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullrank import measures
    from fullrank.moments import Moments, merge
    from fullrank.monitor import SpectrumMonitor
    from fullrank.reference import Reference
    from fullrank.verdict import Verdict

__version__ = "0.2.0"

__all__ = ["Moments", "Reference", "SpectrumMonitor", "Verdict", "__version__", "measures", "merge"]

# Each public name and the module it comes from. They are imported when first used, so that the HTTP client does not
# load torch.
_HOMES = {
    "Moments": "fullrank.moments",
    "Reference": "fullrank.reference",
    "SpectrumMonitor": "fullrank.monitor",
    "Verdict": "fullrank.verdict",
    "merge": "fullrank.moments",
}


def __getattr__(name: str) -> Any:
    if name == "measures":
        return importlib.import_module("fullrank.measures")
    if name not in _HOMES:
        raise AttributeError(f"module 'fullrank' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
