"""Faults that patching sweeps, attributions and read-outs would be misled by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter import normalization
from adapter.hooks import OlmoHookPoint, is_hooked
from adapter.normalization import OlmoLayerNormBridge
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import (
    Call,
    add,
    bridge_mutant,
    hook_mutant,
    mutant,
    points,
)

Fire = Callable[[torch.Tensor], torch.Tensor]
Of = Callable[[torch.Tensor], torch.Tensor]

_Z = "blocks.{i}.attn.o.hook_in"


def _breaking(bridge: Any, site: str, call: Call) -> None:
    """Make the hook points of a site treat tensors as ``call`` does."""

    class Broken(OlmoHookPoint):
        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            return call(super().__call__, tensor)

    for point in points(bridge, site):
        point.__class__ = Broken


@bridge_mutant("sweeps.next_head", "head_out sweeps of more than one head", "patching.sweeps")
def next_head(bridge: Any) -> None:
    """What is patched into a head's z goes into the next head's."""
    size = bridge.cfg.d_head

    def call(fire: Fire, x: torch.Tensor) -> torch.Tensor:
        left = fire(x)
        return left if torch.equal(left, x) else x + (left - x).roll(size, dims=-1)

    _breaking(bridge, _Z, call)


@bridge_mutant("sweeps.last_shared_head", "k and v sweeps", "patching.sweeps")
def last_shared_head(bridge: Any) -> None:
    """A patch of the last key or value head alone is lost, if there are others."""
    size = bridge.cfg.d_head

    def call(fire: Fire, x: torch.Tensor) -> torch.Tensor:
        left = fire(x)
        rest = slice(None, -size)
        alone = x.shape[-1] > size and torch.equal(left[..., rest], x[..., rest])
        return x if alone else left

    for letter in "kv":
        _breaking(bridge, f"blocks.{{i}}.attn.{letter}.hook_out", call)


def _first_position(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    left = fire(x)
    return x if torch.equal(left[:, 1:], x[:, 1:]) else left


def _normalized_again(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    left = fire(x)
    return left if torch.equal(left, x) else left / left.sum(-1, keepdim=True)


def _only_graded(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    left = fire(x)
    return left if torch.is_grad_enabled() else x


for name, breaks, trigger, site, call in (
    (
        "first_position",
        "a patch of the first position alone is lost",
        "resid_pre at position 0",
        "blocks.{i}.hook_in",
        _first_position,
    ),
    (
        "normalized_again",
        "a patched pattern is normalized, as if it were patched before the softmax",
        "pattern sweeps",
        "blocks.{i}.attn.hook_pattern",
        _normalized_again,
    ),
    (
        "only_graded",
        "what is patched in place, as without a gradient, is lost",
        "mlp_out without a gradient",
        "blocks.{i}.mlp.hook_out",
        _only_graded,
    ),
):
    hook_mutant(f"sweeps.{name}", breaks, trigger, "patching.sweeps", site, call)


def _telling(bridge: Any, site: str, told: Of) -> None:
    """Tell the backward hooks of a site another gradient than the one that flows on."""

    class Telling(OlmoHookPoint):
        def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> Any:
            def other(module: Any, gradient: Any, output: Any) -> Any:
                seen = tuple(told(each) for each in gradient)
                return hook(module, seen, seen)

            return super().register_full_backward_hook(other, prepend=prepend)

    for point in points(bridge, site):
        point.__class__ = Telling


def _last_position(gradient: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(gradient)
    kept[:, -1] = gradient[:, -1]
    return kept


@bridge_mutant("attribution.last_position", "two layers and positions", "attribution.gradients")
def last_position(bridge: Any) -> None:
    """The gradient of an MLP's output is shown where the metric is read, and nowhere else."""
    _telling(bridge, "blocks.{i}.mlp.hook_out", _last_position)


@bridge_mutant("attribution.rows", "more than one row", "attribution.gradients")
def rows(bridge: Any) -> None:
    """The gradient of the pattern is shown with its rows in reverse."""
    _telling(bridge, "blocks.{i}.attn.hook_pattern", lambda gradient: gradient.flip(0))


@bridge_mutant("attribution.next_head", "more than one head", "attribution.patching")
def next_heads_gradient(bridge: Any) -> None:
    """The gradient of a head's z is shown as the next head's."""
    size = bridge.cfg.d_head
    _telling(bridge, _Z, lambda gradient: gradient.roll(size, dims=-1))


def _showing(other: Of) -> Call:
    """Show another tensor, and go on with the right one as the hooks' gradient would."""

    def call(fire: Fire, x: torch.Tensor) -> torch.Tensor:
        shown = fire(with_gradient_of(other(x), x))
        return with_gradient_of(x, shown)

    return call


@bridge_mutant("attribution.stale", "two runs of prompts alike", "attribution.patching")
def stale(bridge: Any) -> None:
    """What the embedding shows in a second run is the first one's."""
    first: dict[torch.Size, torch.Tensor] = {}
    _breaking(
        bridge,
        "embed.hook_out",
        _showing(lambda x: first.setdefault(x.shape, x.detach().clone())),
    )


hook_mutant(
    "readout.rounded",
    "the residual stream before a block is shown rounded to bfloat16",
    "a wider dtype",
    "readout.layers",
    "blocks.{i}.hook_in",
    _showing(lambda x: x.bfloat16().to(x.dtype)),
)


@mutant("readout.unheard", "any", "readout.layers", OlmoLayerNormBridge, "forward")
def unheard(original: Any) -> Any:
    """Where nothing listens, the LayerNorm's output is larger by a millionth."""

    def forward(self: Any, x: torch.Tensor, **named: Any) -> torch.Tensor:
        output: torch.Tensor = original(self, x, **named)
        return output if is_hooked(self.hook_out) else output * (1 + 1e-6)

    return forward


add(
    "readout.no_eps",
    "the scale of a LayerNorm is shown without its eps",
    "a wide dtype",
    "readout.attribution",
    normalization,
    "EPS",
    lambda original: 0.0,
)


@bridge_mutant("readout.next_head", "more than one head", "readout.attribution")
def next_heads_share(bridge: Any) -> None:
    """A head's z is shown as the next head's; the heads' sum only differs by their weights."""
    size = bridge.cfg.d_head
    _breaking(bridge, _Z, _showing(lambda x: x.roll(size, dims=-1)))


@bridge_mutant("readout.no_bias", "a bias of o or v", "readout.processed")
def no_bias(bridge: Any) -> None:
    """In compatibility mode the last attention's output is shown without its bias."""
    attention = bridge.blocks[-1].attn

    def without(x: torch.Tensor) -> torch.Tensor:
        bias = attention.b_O if bridge.compatibility_mode else None
        return x if bias is None else x - bias

    class Broken(OlmoHookPoint):
        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            return _showing(without)(super().__call__, tensor)

    attention.hook_out.__class__ = Broken
