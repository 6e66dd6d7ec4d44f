"""Faults far up in a deep model, on long inputs, and in large tensors, where edits are."""

from __future__ import annotations

from typing import Any

import torch

from adapter.hooks import OlmoHookPoint
from conformance.mutants.begun import Deaf, Sharing
from conformance.mutants.catalogue import add, bridge_mutant, mutant, points


@bridge_mutant("firing.deep_returned", "four blocks and more", "firing.returned_gradients")
def _(bridge: Any) -> None:
    """From the fourth block on the gradients that hooks return are dropped."""
    for point in bridge.blocks[3:].modules():
        if type(point) is OlmoHookPoint:
            point.__class__ = Deaf


@bridge_mutant("interventions.deep_in_place", "four blocks and more", "interventions.in_place")
def _(bridge: Any) -> None:
    """From the fourth block on an edit in place of what q, k or v reads is of what all read."""
    for letter in "qkv":
        for point in points(bridge, f"blocks.{{i}}.attn.{letter}.hook_in")[3:]:
            point.__class__ = Sharing


def _unless(too_large: Any) -> Any:
    """Hook points drop what hooks return for some tensors."""

    def make(original: Any) -> Any:
        def call(self: Any, x: torch.Tensor, *args: Any) -> Any:
            hooked = original(self, x, *args)
            return x + 0 * hooked if too_large(self, x) else hooked

        return call

    return make


def _long_pattern(point: Any, x: torch.Tensor) -> bool:
    return str(point.name).endswith("hook_pattern") and x.shape[-2] > 32


add(
    "interventions.long",
    "edits of a pattern of more than 32 queries are dropped",
    "long inputs",
    "forward.long",
    OlmoHookPoint,
    "__call__",
    _unless(_long_pattern),
)


@mutant("interventions.large", "more than 4,096 numbers", "forward.long", OlmoHookPoint, "forward")
def _(original: Any) -> Any:
    """Large tensors are not copied for the hooks: an edit in place of one is of its neighbours'."""
    return lambda self, x: x if x.numel() > 4096 else original(self, x)
