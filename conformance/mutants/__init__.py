"""Deliberately broken bridges, each with the check that must kill it."""

from conformance.mutants import (
    attention,
    clamp,
    flags,
    gradients,
    hooks,
    layernorm,
    metamorphic,
    mlp,
    patch,
    rotary,
    sites,
    weights,
)
from conformance.mutants.catalogue import CATALOGUE, Mutant
from conformance.mutants.run import Kill, kill

__all__ = [
    "CATALOGUE",
    "Kill",
    "Mutant",
    "attention",
    "clamp",
    "flags",
    "gradients",
    "hooks",
    "kill",
    "layernorm",
    "metamorphic",
    "mlp",
    "patch",
    "rotary",
    "sites",
    "weights",
]
