"""Deliberately broken bridges, each with the check that must kill it."""

from conformance.mutants import (
    accessors,
    attention,
    clamp,
    components,
    derivatives,
    gradients,
    hooks,
    layernorm,
    mlp,
    modes,
    patch,
    rotary,
    series,
    sites,
    states,
    surface,
    training,
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
    "derivatives",
    "gradients",
    "hooks",
    "kill",
    "layernorm",
    "mlp",
    "modes",
    "patch",
    "rotary",
    "series",
    "sites",
    "states",
    "surface",
    "training",
    "weights",
]
