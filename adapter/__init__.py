"""The OLMo (v1) architecture adapter for TransformerLens' TransformerBridge.

Importing this package is light: torch, transformers and transformer_lens are loaded only when one
of its names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter.clip import patch_clip, unpatch_model
    from adapter.loading import bridge, register
    from adapter.olmo import OPTIONAL_PARAMETERS, OlmoArchitectureAdapter

__all__ = [
    "OPTIONAL_PARAMETERS",
    "OlmoArchitectureAdapter",
    "bridge",
    "patch_clip",
    "register",
    "unpatch_model",
]

_HOME = {
    "OPTIONAL_PARAMETERS": "adapter.olmo",
    "OlmoArchitectureAdapter": "adapter.olmo",
    "bridge": "adapter.loading",
    "patch_clip": "adapter.clip",
    "register": "adapter.loading",
    "unpatch_model": "adapter.clip",
}


def __getattr__(name: str) -> Any:
    """Load an exported name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'adapter' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
