"""The promises, one check function each."""

from conformance.checks import (
    alive,
    biases,
    calls,
    clamp,
    compatibility,
    configuration,
    copies,
    forward,
    gradients,
    hooks,
    interventions,
    layernorm,
    patch,
    precision,
    returns,
)
from conformance.checks.registry import REGISTRY, Check, judge, require

__all__ = [
    "REGISTRY",
    "Check",
    "alive",
    "biases",
    "calls",
    "clamp",
    "compatibility",
    "configuration",
    "copies",
    "forward",
    "gradients",
    "hooks",
    "interventions",
    "judge",
    "layernorm",
    "patch",
    "precision",
    "require",
    "returns",
]
