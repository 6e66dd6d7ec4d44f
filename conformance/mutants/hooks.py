"""Faults of hooks that leave the forward as it is: layout, names, order, firing."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from adapter import attention, rotary
from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.hooks import OlmoHookPoint, new_hook
from adapter.layouts import HeadsAfterPositions, SplitHeads
from adapter.mlp import OlmoMLPBridge
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import add, bridge_mutant, hook_mutant, mutant, points, shared


@mutant(
    "layout.entries_first",
    "more than one head",
    "hooks.values",
    SplitHeads,
    "handle_conversion",
)
def entries_first(original: Any) -> Any:
    """Q, k, v and z are split as if a head's entries were far apart."""

    def split(self: Any, x: torch.Tensor, *context: Any) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.d_head, -1).transpose(-1, -2)

    return split


@mutant(
    "layout.square",
    "n_heads or n_kv equal to d_head",
    "hooks.values",
    SplitHeads,
    "handle_conversion",
)
def square(original: Any) -> Any:
    """Where there are as many heads as entries of a head, the two are exchanged."""

    def split(self: Any, x: torch.Tensor, *context: Any) -> torch.Tensor:
        heads: torch.Tensor = original(self, x, *context)
        return heads.mT if heads.shape[-1] == heads.shape[-2] else heads

    return split


@mutant(
    "layout.guessed",
    "as many heads as tokens",
    "hooks.values",
    HeadsAfterPositions,
    "handle_conversion",
)
def guessed(original: Any) -> Any:
    """Rotated q and k keep heads first where there are as many as positions."""

    def turn(self: Any, x: torch.Tensor, *context: Any) -> torch.Tensor:
        return x if x.shape[1] == x.shape[2] else original(self, x, *context)

    return turn


for letter in "qk":
    hook_mutant(
        f"layout.unrestored_{letter}",
        f"an edit of hook_rot_{letter} is put back with its heads in reverse",
        f"an edit of hook_rot_{letter} and more than one head",
        "interventions.returned",
        f"blocks.{{i}}.attn.hook_rot_{letter}",
        lambda fire, x: out if torch.equal(out := fire(x), x) else out.flip(1),
    )


def _without(name: str) -> Any:
    return lambda aliases: {alias: at for alias, at in aliases.items() if alias != name}


def _pointing(name: str, target: str) -> Any:
    return lambda aliases: {**aliases, name: target}


for name, breaks, owner, make in (
    ("no_hook_z", "attn.hook_z does not exist", OlmoAttentionBridge, _without("hook_z")),
    ("hook_v", "hook_v is k", OlmoAttentionBridge, _pointing("hook_v", "k.hook_out")),
    ("hook_pre", "mlp.hook_pre is up", OlmoMLPBridge, _pointing("hook_pre", "in.hook_out")),
    (
        "hook_resid_mid",
        "hook_resid_mid is behind ln2",
        OlmoBlockBridge,
        _pointing("hook_resid_mid", "ln2.hook_out"),
    ),
):
    add(f"alias.{name}", breaks, "any", "hooks.names", owner, "hook_aliases", make)


@mutant("hooks.extra", "any", "hooks.values", OlmoMLPBridge, "__init__")
def extra(original: Any) -> Any:
    """A hook that nobody has declared fires."""

    def init(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        self.hook_middle = new_hook()
        self.register_forward_hook(lambda module, into, out: module.hook_middle(out))

    return init


@mutant("hooks.key_before_query", "any", "hooks.values", OlmoAttentionBridge, "_project")
def key_before_query(original: Any) -> Any:
    """K is projected, and fires, before q."""

    def project(self: Any, hidden: torch.Tensor, residual: Any) -> Any:
        if self.forks_input:
            return original(self, hidden, residual)
        k, q, v = (linear(hidden) for linear in (self.k, self.q, self.v))
        return [q, k, v]

    return project


@bridge_mutant("hooks.rotated_exchanged", "any", "hooks.values")
def rotated_exchanged(bridge: Any) -> None:
    """Hook_rot_q is the rotated k, hook_rot_k the rotated q."""
    for block in bridge.blocks:
        modules = block.attn._modules
        both = modules["hook_rot_q"], modules["hook_rot_k"]
        modules["hook_rot_k"], modules["hook_rot_q"] = both


class _RegistersTwice(HookPoint):
    """Each backward hook is registered, and so fires, twice."""

    def add_hook(self, hook: Any, dir: Any = "fwd", *args: Any, **named: Any) -> Any:
        if dir == "bwd":
            super().add_hook(hook, dir, *args, **named)
        return super().add_hook(hook, dir, *args, **named)


@bridge_mutant("hooks.backward_twice", "any", "hooks.gradients")
def backward_twice(bridge: Any) -> None:
    """A backward hook of hook_resid_pre fires twice."""
    for point in points(bridge, "blocks.{i}.hook_in"):
        point.__class__ = _RegistersTwice


for name, breaks, sites in (
    (
        "branches",
        "an edit of q.hook_in in place reaches k",
        ("q.hook_in", "k.hook_in", "gate.hook_in"),
    ),
    (
        "rotation",
        "an edit of a block's rotation in place reaches later blocks",
        ("hook_cos", "hook_sin"),
    ),
):
    killer, trigger = "interventions.in_place", "such an edit"
    add(f"in_place.{name}", breaks, trigger, killer, OlmoHookPoint, "forward", shared(*sites))


for module, name in ((rotary, "rotary_emb.hook_out"), (attention, "attn.hook_hidden_states")):
    add(
        f"alive.{name}",
        f"{name} is advertised and never fires",
        "any",
        "alive.advertised",
        module,
        "drop_hook",
        lambda _: lambda component, hook: None,
    )

add(
    "alive.output_attentions",
    "output_attentions=True gives no patterns",
    "any",
    "alive.output_attentions",
    attention,
    "record_attention",
    lambda original: lambda pattern: None,
)

add(
    "rotary.unhooked",
    "rotary_emb.hook_cos and rotary_emb.hook_sin never fire",
    "any",
    "hooks.values",
    OlmoRotaryEmbeddingBridge,
    "forward",
    lambda original: lambda self, *args, **named: self.original_component(*args, **named),
)
