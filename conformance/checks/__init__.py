"""The promises, one check function each."""

from conformance.checks import (
    alive,
    biases,
    clamp,
    compatibility,
    configuration,
    copies,
    forward,
    gradients,
    hooks,
    interventions,
    layernorm,
    machine,
    patch,
    precision,
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
    "copies",
    "forward",
    "gradients",
    "hooks",
    "interventions",
    "judge",
    "layernorm",
    "machine",
    "patch",
    "precision",
    "require",
]
