"""Faults of bridges that are not new: in a mode, copied, unpickled, used before, thawed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, mutant, points
from conformance.mutants.modes import in_a_backward

of_bridge = partial(mutant, owner=OlmoTransformerBridge)
of_attention = partial(mutant, owner=OlmoAttentionBridge)


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


class Lossy(OlmoHookPoint):
    """Drops what forward hooks return."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as it was."""
        super().__call__(x.clone())
        return x


class Forgetful(OlmoHookPoint):
    """Has no hooks where a backward computes something again."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as hooks leave it the first time."""
        return x if in_a_backward() else super().__call__(x)


class Beheaded(OlmoHookPoint):
    """Takes the axis of its heads for that of its positions."""

    def __getattribute__(self, name: str) -> Any:
        """What it has, but for its pos_dim."""
        return 2 if name == "pos_dim" else super().__getattribute__(name)


def become(kind: type[HookPoint], sites: Sequence[str], bridge: Any) -> None:
    """Change the class of hook points: those of the sites, or all in blocks if none is named."""
    every = [point for point in bridge.blocks.modules() if type(point) is OlmoHookPoint]
    named = [point for site in sites for point in points(bridge, f"blocks.{{i}}.{site}")]
    for point in named if sites else every:
        setattr(point, "__class__", kind)  # noqa: B010 - mypy takes it for another type's


def _after(
    attribute: str, name: str, breaks: str, trigger: str, killer: str, fault: Callable[[Any], None]
) -> None:
    """Register a mutant that breaks a bridge when one of its methods has run."""

    def make(original: Any) -> Any:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            result = original(self, *args, **named)
            fault(self)
            return result

        return call

    add(f"begun.{name}", breaks, trigger, f"begun.{killer}", OlmoTransformerBridge, attribute, make)


READ = tuple(f"attn.{letter}.hook_in" for letter in "qkv")
STREAM = ("hook_in", "ln1.hook_in", "attn.hook_in", "ln2.hook_in", "mlp.hook_in")
MODE, COPY, USE = "enable_compatibility_mode", "__setstate__", "generate"
IN_MODE, COPIED, USED = "compatibility mode", "a copy, or pickle", "a generation before"

for attribute, name, breaks, trigger, killer, kind, sites in (
    (
        *(MODE, "mode_returned_gradient", "gradients that hooks return in blocks are dropped"),
        *(IN_MODE, "firing_returned_gradients", Deaf, ()),
    ),
    (
        *(MODE, "mode_in_place", "an edit in place of what q reads is of what k and v read"),
        *(IN_MODE, "interventions_in_place", Sharing, READ),
    ),
    (
        *(MODE, "mode_recomputed", "edits are missing from what checkpointing computes again"),
        *(IN_MODE, "firing_recomputed", Forgetful, ()),
    ),
    (
        *(MODE, "mode_results", "edits of what heads write are dropped"),
        *(IN_MODE, "flags_edits", Lossy, ("attn.hook_result",)),
    ),
    (
        *(MODE, "mode_scales", "edits of a block's hook_scale are dropped"),
        *(IN_MODE, "layernorm_edits", Lossy, ("ln1.hook_scale", "ln2.hook_scale")),
    ),
    (
        *(COPY, "copied_points", "the hook points of a copy are TransformerLens' own"),
        *(COPIED, "interventions_in_place", HookPoint, ()),
    ),
    (
        *(COPY, "copied_slices", "a pos_slice picks heads of rotated queries and keys"),
        *(COPIED, "caching_values", Beheaded, ("attn.hook_rot_q", "attn.hook_rot_k")),
    ),
    (
        *(USE, "used", "an edit in place in the residual stream reaches what was before it"),
        *(USED, "interventions_in_place", Sharing, STREAM),
    ),
    (
        *(USE, "used_generation", "a later generation is without edits within blocks"),
        *(USED, "generation_hooks", Lossy, ()),
    ),
):
    _after(attribute, name, breaks, trigger, killer, partial(become, kind, sites))


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


@of_bridge(
    "begun.mode_chunks",
    "compatibility mode, a later chunk",
    "begun.chunks_edits",
    attribute="forward",
)
def _(original: Any) -> Any:
    """In compatibility mode the positions of a later chunk begin at 0."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        past = named.get("past_key_values")
        if self.compatibility_mode and past is not None and past.get_seq_length():
            named.setdefault("position_ids", torch.arange(input.shape[1])[None])
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


@of_bridge(
    "begun.thawed",
    "frozen and trained again",
    "begun.interventions_returned",
    attribute="requires_grad_",
)
def _(original: Any) -> Any:
    """What was frozen stays so in the last block's MLP."""

    def requires_grad(self: Any, requires_grad: bool = True) -> Any:
        original(self, requires_grad)
        self.blocks[-1].mlp.requires_grad_(False)
        return self

    return requires_grad
