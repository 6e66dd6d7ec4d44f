"""The promises, one check function each."""

from conformance.checks import (
    alive,
    biases,
    clamp,
    compatibility,
    configuration,
    continuation,
    copies,
    forward,
    gradients,
    hooks,
    interventions,
    layernorm,
    loading,
    patch,
    precision,
    text,
)
from conformance.checks.registry import REGISTRY, Check, judge, require

__all__ = [
    "REGISTRY",
    "Check",
    "alive",
    "biases",
    "clamp",
    "compatibility",
    "configuration",
    "continuation",
    "copies",
    "forward",
    "gradients",
    "hooks",
    "interventions",
    "judge",
    "layernorm",
    "loading",
    "patch",
    "precision",
    "require",
    "text",
]
