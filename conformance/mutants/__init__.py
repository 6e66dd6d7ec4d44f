"""Deliberately broken bridges, each with the check that must kill it."""

from conformance.mutants import (
    accessors,
    attention,
    clamp,
    components,
    gradients,
    hooks,
    layernorm,
    mlp,
    patch,
    rotary,
    series,
    sites,
    states,
    surface,
    weights,
)
from conformance.mutants.catalogue import CATALOGUE, Mutant
from conformance.mutants.run import Kill, kill

__all__ = [
    "CATALOGUE",
    "Kill",
    "Mutant",
    "accessors",
    "attention",
    "clamp",
    "components",
    "gradients",
    "hooks",
    "kill",
    "layernorm",
    "mlp",
    "patch",
    "rotary",
    "series",
    "sites",
    "states",
    "surface",
    "weights",
]
