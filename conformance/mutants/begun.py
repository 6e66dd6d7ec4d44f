"""Faults of bridges that are not new: in a mode, copied, unpickled, used before, thawed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, mutant, points

of_bridge = partial(mutant, owner=OlmoTransformerBridge)
of_attention = partial(mutant, owner=OlmoAttentionBridge)


def _after(
    attribute: str, name: str, trigger: str, killer: str
) -> Callable[[Callable[[Any], None]], None]:
    """Register a mutant that breaks a bridge when one of its methods has run."""

    def register(fault: Callable[[Any], None]) -> None:
        def make(original: Any) -> Any:
            def call(self: Any, *args: Any, **named: Any) -> Any:
                result = original(self, *args, **named)
                fault(self)
                return result

            return call

        said = " ".join((fault.__doc__ or "").split()).rstrip(".")
        add(name, said, trigger, killer, OlmoTransformerBridge, attribute, make)

    return register


class Sharing(OlmoHookPoint):
    """Hands its hooks the tensor that its neighbours read too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """No copy."""
        return x


class Deaf(OlmoHookPoint):
    """Drops what backward hooks return."""

    def add_hook(self, hook: Any, dir: Any = "fwd", *args: Any, **named: Any) -> Any:
        """Put on, of a backward hook, one that only looks."""

        def looking(gradient: torch.Tensor, hook: Any, inner: Any = hook) -> None:
            inner(gradient, hook=hook)

        return super().add_hook(looking if dir == "bwd" else hook, dir, *args, **named)


IN_MODE = "enable_compatibility_mode"


@_after(
    IN_MODE,
    "begun.mode_returned_gradient",
    "compatibility mode, a gradient that is returned",
    "begun.firing_returned_gradients",
)
def _(bridge: Any) -> None:
    """In compatibility mode gradients that hooks inside of blocks return are dropped."""
    for point in bridge.blocks.modules():
        if type(point) is OlmoHookPoint:
            point.__class__ = Deaf


@_after(
    IN_MODE,
    "begun.mode_in_place",
    "compatibility mode, an edit in place of what q, k, v read",
    "begun.interventions_in_place",
)
def _(bridge: Any) -> None:
    """In compatibility mode q, k and v read one tensor, and an edit in place of one is of all."""
    for letter in "qkv":
        for point in points(bridge, f"blocks.{{i}}.attn.{letter}.hook_in"):
            point.__class__ = Sharing


@of_bridge(
    "begun.mode_embeddings",
    "compatibility mode, embeddings, a mask",
    "begun.calls_embeddings",
    attribute="forward",
)
def _(original: Any) -> Any:
    """In compatibility mode embeddings have the positions that tokens without a mask have."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        given = named.get("inputs_embeds", input)
        if self.compatibility_mode and given is not None and given.is_floating_point():
            named.setdefault("position_ids", torch.arange(given.shape[1])[None])
        return original(self, input, *args, **named)

    return forward


@of_attention(
    "begun.mode_biases",
    "compatibility mode, a mask of biases",
    "begun.calls_masks",
    attribute="_masked",
)
def _(original: Any) -> Any:
    """In compatibility mode a mask hides keys or does not: biases are lost."""

    def masked(self: Any, scores: torch.Tensor, mask: Any) -> Any:
        if self.compatibility_mode and mask is not None and mask.is_floating_point():
            mask = torch.where(mask > -1e4, 0.0, mask).to(mask.dtype)
        return original(self, scores, mask)

    return masked


@of_attention(
    "begun.mode_unclipped",
    "compatibility mode, inference mode, a clip",
    "begun.modes_inference",
    attribute="_clip",
)
def _(original: Any) -> Any:
    """In compatibility mode nothing is clamped under torch.inference_mode."""

    def clip(self: Any, *projections: torch.Tensor) -> Any:
        if self.compatibility_mode and torch.is_inference_mode_enabled():
            return projections
        return original(self, *projections)

    return clip


@_after(
    "__setstate__",
    "begun.copied_points",
    "a copy, or pickle, an edit in place",
    "begun.interventions_in_place",
)
def _(bridge: Any) -> None:
    """The hook points of a copy, or of an unpickled bridge, are TransformerLens' own."""
    for point in bridge.modules():
        if type(point) is OlmoHookPoint:
            point.__class__ = HookPoint


@_after(
    "generate",
    "begun.used",
    "a generation before, an edit in place",
    "begun.interventions_in_place",
)
def _(bridge: Any) -> None:
    """Once it has generated, an edit in place in the residual stream reaches what was before it."""
    for site in ("ln1.hook_in", "ln2.hook_in", "attn.hook_in", "hook_in", "mlp.hook_in"):
        for point in points(bridge, f"blocks.{{i}}.{site}"):
            point.__class__ = Sharing


@of_bridge(
    "begun.thawed",
    "frozen and trained again",
    "begun.interventions_returned",
    attribute="requires_grad_",
)
def _(original: Any) -> Any:
    """What was frozen stays so in the last block."""

    def requires_grad(self: Any, requires_grad: bool = True) -> Any:
        original(self, requires_grad)
        self.blocks[-1].mlp.requires_grad_(False)
        return self

    return requires_grad
