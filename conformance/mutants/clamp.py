"""Faults of the bridge's own clamp of q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter.attention import OlmoAttentionBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import (
    Make,
    add,
    bridge_mutant,
    hook_mutant,
    mutant,
    points,
)

_BINDS = "a clip that binds"


def _by(clamp: Callable[[str, torch.Tensor, float], torch.Tensor]) -> Make:
    """A clamp that treats q, k and v, each given with its letter, in another way."""

    def make(original: Any) -> Any:
        def clip_all(self: Any, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
            clip = self.original_component.config.clip_qkv
            pairs = list(zip("qkv", projections, strict=True))
            clamped = [(s, x if clip is None else clamp(s, x, clip)) for s, x in pairs]
            return tuple(getattr(self, f"hook_{s}_clipped")(x) for s, x in clamped)

        return clip_all

    return make


def _straight_through(_: str, x: torch.Tensor, clip: float) -> torch.Tensor:
    return with_gradient_of(x.clamp(-clip, clip), x)


def _kink_passes() -> bool:
    """Whether a gradient passes at exactly the clip: until PyTorch 2.13, no more from 2.14 on."""
    at = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(at.clamp(-1, 1), at)
    return bool(gradient)


def _flipping_the_kink(_: str, x: torch.Tensor, clip: float) -> torch.Tensor:
    """As `torch.clamp`, but an entry of exactly the clip has the other gradient."""
    is_open = x.abs() < clip if _kink_passes() else x.abs() <= clip
    return torch.where(is_open, x, x.clamp(-clip, clip).detach())


def _falsy(_: str, x: torch.Tensor, clip: float) -> torch.Tensor:
    return x.clamp(-clip, clip) if clip else x


def _only(letters: str) -> Callable[[str, torch.Tensor, float], torch.Tensor]:
    return lambda letter, x, clip: x.clamp(-clip, clip) if letter in letters else x


for name, breaks, trigger, killer, clamp in (
    ("dropped", "nothing is clamped", _BINDS, "forward.logits", _only("")),
    ("only_v", "q and k are not clamped", _BINDS, "forward.logits", _only("v")),
    ("not_v", "v is not clamped", _BINDS, "forward.logits", _only("qk")),
    (
        "half",
        "clamped at half the clip",
        _BINDS,
        "forward.logits",
        lambda _, x, clip: x.clamp(-clip / 2, clip / 2),
    ),
    (
        "no_maximum",
        "only what is below -clip is clamped",
        _BINDS,
        "forward.logits",
        lambda _, x, clip: x.clamp(min=-clip),
    ),
    ("zero_is_none", "clip_qkv=0.0 is taken for no clip", "clip 0.0", "forward.logits", _falsy),
    (
        "straight_through",
        "a clamped entry has the gradient of an open one",
        _BINDS,
        "gradients.parameters",
        _straight_through,
    ),
    (
        "kink",
        "an entry of exactly the clip has the gradient that PyTorch does not give it",
        "entries that equal the clip",
        "clamp.kink",
        _flipping_the_kink,
    ),
    (
        "in_place",
        "clamped in place, on the tensor that hook_q, hook_k and hook_v have shown",
        "a clip and a backward hook",
        "gradients.everywhere",
        lambda _, x, clip: x.clamp_(-clip, clip),
    ),
):
    add(f"clamp.{name}", breaks, trigger, killer, OlmoAttentionBridge, "_clip", _by(clamp))


@bridge_mutant("clamp.before_the_hook", _BINDS, "hooks.values")
def before_the_hook(bridge: Any) -> None:
    """Hook_q, hook_k and hook_v show, and see the gradient of, what is clamped already."""
    clip = bridge.original_model.config.clip_qkv
    for site in (f"blocks.{{i}}.attn.{letter}.hook_out" for letter in "qkv"):
        for point in points(bridge, site) if clip is not None else ():
            point.forward = lambda x: x.clamp(-clip, clip)  # type: ignore[method-assign]


@mutant("clamp.hooks_before", _BINDS, "clamp.post_clip", OlmoAttentionBridge, "_clip")
def hooks_before(original: Any) -> Any:
    """Hook_q_clipped, hook_k_clipped and hook_v_clipped show what is not clamped yet."""

    def clip_all(self: Any, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clip = self.original_component.config.clip_qkv
        shown = (
            getattr(self, f"hook_{s}_clipped")(x) for s, x in zip("qkv", projections, strict=True)
        )
        return tuple(x if clip is None else x.clamp(-clip, clip) for x in shown)

    return clip_all


@mutant(
    "clamp.edits_clamped",
    "an edit of hook_q_clipped beyond the clip",
    "interventions.clipped",
    OlmoAttentionBridge,
    "_clip",
)
def edits_clamped(original: Any) -> Any:
    """What a hook leaves after the clamp is clamped again."""

    def clip_all(self: Any, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clip = self.original_component.config.clip_qkv
        kept = original(self, *projections)
        return kept if clip is None else tuple(x.clamp(-clip, clip) for x in kept)

    return clip_all


@mutant(
    "clamp.bias_after",
    "a bias of v and a clip that binds",
    "biases.forward",
    OlmoAttentionBridge,
    "_clip",
)
def bias_after(original: Any) -> Any:
    """The bias of v is added behind the clamp."""

    def clip_all(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        hf = self.original_component
        bias = hf.v_proj.bias if hf.config.clip_qkv is not None else None
        if bias is None:
            return original(self, q, k, v)
        q, k, v = original(self, q, k, v - bias)
        return q, k, v + bias

    return clip_all


hook_mutant(
    "clamp.v_detached",
    "the values have no gradient",
    "any",
    "gradients.parameters",
    "blocks.{i}.attn.hook_v_clipped",
    lambda fire, x: fire(x.detach()),
)
