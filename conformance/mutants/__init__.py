"""Deliberately broken bridges, each with the check that must kill it."""

from conformance.mutants import (
    attention,
    clamp,
    derivatives,
    gradients,
    hooks,
    layernorm,
    mlp,
    modes,
    patch,
    rotary,
    sites,
    training,
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
    "derivatives",
    "gradients",
    "hooks",
    "kill",
    "layernorm",
    "mlp",
    "modes",
    "patch",
    "rotary",
    "sites",
    "training",
    "weights",
]
