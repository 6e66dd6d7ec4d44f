"""The systematic mutants: the same small fault at each hook of the table.

A site is told apart from its neighbours only if a fault at it alone is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapter.hooks import OlmoHookPoint
from conformance.forks import with_gradient_of
from conformance.mutants.catalogue import Call, bridge_mutant, hook_mutant
from conformance.sites import TABLE, Site, Status

_SITES = [site for site in TABLE if site.status in (Status.REQUIRED, Status.OPTIONAL)]
_POSITIONAL = ("rotary_emb.hook_in", "hook_cos", "hook_sin")
Fire = Callable[[torch.Tensor], torch.Tensor]


def _nudged(x: torch.Tensor) -> torch.Tensor:
    """The next float32 above each entry."""
    return torch.nextafter(x, torch.full_like(x, torch.inf)) if x.dtype == torch.float32 else x


def _shown(change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """A hook point that shows something else than the tensor it lets through."""

    def call(fire: Fire, x: torch.Tensor) -> torch.Tensor:
        fire(change(x))
        return x

    return call


def _steeper(by: float) -> Call:
    """A hook point whose gradient is a little too large; its value is right."""

    def call(fire: Fire, x: torch.Tensor) -> torch.Tensor:
        y = fire(x)
        if y.requires_grad:
            y = y.view_as(y)
            y.register_hook(lambda gradient: gradient * (1 + by))  # type: ignore[no-untyped-call]
        return y

    return call


def _discards(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    left = fire(x.clone())
    return with_gradient_of(x, left)


def _systematic(site: Site) -> None:
    tokens = site.name == "embed.hook_in"
    hook_mutant(
        f"twice.{site.name}",
        "the hook fires twice",
        "any",
        "hooks.values",
        site.name,
        lambda fire, x: fire(fire(x)),
    )
    if tokens:
        return
    hook_mutant(
        f"nudged.{site.name}",
        "the hook shows 1 + 1e-5 of the value" if site.derived else "the hook is one ulp off",
        "float32",
        "hooks.values",
        site.name,
        _shown((lambda x: x * (1 + 1e-5)) if site.derived else _nudged),
    )
    if not site.name.endswith(_POSITIONAL):
        hook_mutant(
            f"steeper.{site.name}",
            f"the gradient is too large by {1e-3 if site.derived else 1e-5}",
            "any",
            "layernorm.observed" if site.derived else "hooks.gradients",
            site.name,
            _steeper(1e-3 if site.derived else 1e-5),
        )


for site in _SITES:
    _systematic(site)


def _wide(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    return fire(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


for name in ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern"):
    hook_mutant(
        f"wide.blocks.{{i}}.{name}",
        "the hook shows float32",
        "bfloat16 or float16",
        "precision.everywhere",
        f"blocks.{{i}}.{name}",
        _wide,
    )

# Not at every site: edits are drawn over all sites, so each takes some twenty cases to kill.
for name in ("attn.hook_in", "attn.hook_pattern", "mlp.hook_out"):
    hook_mutant(
        f"discards.blocks.{{i}}.{name}",
        "what a hook returns is discarded",
        "an edit there",
        "interventions.returned",
        f"blocks.{{i}}.{name}",
        _discards,
    )


def _reversed(fire: Fire, x: torch.Tensor) -> torch.Tensor:
    left = fire(x)
    return torch.where(left.eq(x), x, left.flip(0)) if x.shape[0] > 1 else left


for row in ("blocks.{i}.hook_in", "blocks.{i}.attn.o.hook_in"):
    hook_mutant(
        f"patching.rows.{row}",
        "what is returned is put back with its rows in reverse",
        "a replacement there and more than one row",
        "interventions.patching",
        row,
        _reversed,
    )


class _Leaks(OlmoHookPoint):
    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        left: torch.Tensor = super().__call__(tensor)
        cut = tensor.requires_grad and not left.requires_grad
        return with_gradient_of(left, tensor) if cut else left


@bridge_mutant("patching.leaks", "a replacement", "interventions.patching")
def leaks(bridge: Any) -> None:
    """The gradient flows past a tensor that a hook returns and that has none."""
    for point in bridge.hook_dict.values():
        point.__class__ = _Leaks


for name in ("blocks.{i}.attn.hook_in", "blocks.{i}.mlp.gate.hook_in", "unembed.hook_out"):
    hook_mutant(
        f"silent.{name}",
        "the hook never fires",
        "any",
        "hooks.values",
        name,
        lambda fire, x: x,
    )
