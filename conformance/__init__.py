"""olmo-conformance: is what a researcher sees through the bridge what the model computes?

Importing this package is light: torch and the rest are loaded when a name that needs them is first
used, so that the pytest plugin taxes no run that is not about conformance.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import adapter
    from adapter import OlmoArchitectureAdapter
    from conformance.run import check_adapter
    from conformance.spec import Case, ModelSpec, RunSpec
    from conformance.verdict import ConformanceError

    __version__: str

__all__ = [
    "Case",
    "ConformanceError",
    "ModelSpec",
    "OlmoArchitectureAdapter",
    "RunSpec",
    "__version__",
    "adapter",
    "check_adapter",
]

_HOME = {
    "Case": "conformance.spec",
    "ConformanceError": "conformance.verdict",
    "ModelSpec": "conformance.spec",
    "OlmoArchitectureAdapter": "adapter",
    "RunSpec": "conformance.spec",
    "check_adapter": "conformance.run",
}


def _version() -> str:
    try:
        return version("olmo-conformance")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    """Load an exported name from the module that defines it."""
    if name == "adapter":
        return import_module("adapter")
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
