"""See a transformer's training crash coming, understand it, and stop it while the run is alive.

Names are loaded when first used: reading a run (`open_run`, `assess`) never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diagnostics.version import __version__

if TYPE_CHECKING:
    from diagnostics.control.controller import Controller
    from diagnostics.record.recorder import Recorder
    from diagnostics.remedies.spectral_bound import SpectralBound
    from diagnostics.report import assess
    from diagnostics.store.read import open_run

__all__ = ["Controller", "Recorder", "SpectralBound", "__version__", "assess", "open_run"]

_HOME = {
    "Controller": "diagnostics.control.controller",
    "Recorder": "diagnostics.record.recorder",
    "SpectralBound": "diagnostics.remedies.spectral_bound",
    "assess": "diagnostics.report",
    "open_run": "diagnostics.store.read",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the names above
    if name not in _HOME:
        raise AttributeError(f"module 'diagnostics' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
