"""The promises, one check function each."""

from conformance.checks import biases, forward, gradients, hooks
from conformance.checks.registry import REGISTRY, Check, judge, require

__all__ = ["REGISTRY", "Check", "biases", "forward", "gradients", "hooks", "judge", "require"]
