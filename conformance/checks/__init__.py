"""The promises, one check function each."""

from conformance.checks import (
    alive,
    biases,
    clamp,
    compatibility,
    configuration,
    copies,
    flag_states,
    flags,
    forward,
    gradients,
    hooks,
    interventions,
    layernorm,
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
    "flag_states",
    "flags",
    "forward",
    "gradients",
    "hooks",
    "interventions",
    "judge",
    "layernorm",
    "patch",
    "precision",
    "require",
]
