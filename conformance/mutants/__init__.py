"""Deliberately broken bridges, each with the check that must kill it."""

from conformance.mutants import (
    attention,
    clamp,
    gradients,
    hooks,
    layernorm,
    loading,
    mlp,
    patch,
    rotary,
    sites,
    text,
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
    "gradients",
    "hooks",
    "kill",
    "layernorm",
    "loading",
    "mlp",
    "patch",
    "rotary",
    "sites",
    "text",
    "weights",
]
