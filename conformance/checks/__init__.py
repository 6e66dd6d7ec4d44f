"""The promises, one check function each."""

from conformance.checks import (
    biases,
    clamp,
    configuration,
    forward,
    gradients,
    hooks,
    interventions,
    layernorm,
    precision,
)
from conformance.checks.registry import REGISTRY, Check, judge, require

__all__ = [
    "REGISTRY",
    "Check",
    "biases",
    "forward",
    "gradients",
    "hooks",
    "interventions",
    "judge",
    "layernorm",
    "require",
]
