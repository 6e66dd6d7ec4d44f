"""Faults of the ways to get hold of a hook point."""

from __future__ import annotations

from typing import Any

from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import add, bridge_mutant, mutant


@mutant("lookup.alias_elsewhere", "any", "hook_api.lookup", OlmoTransformerBridge, "get_hook_point")
def alias_elsewhere(original: Any) -> Any:
    """get_hook_point gives hook_resid_pre for hook_resid_post."""
    return lambda self, name: original(self, name.replace("hook_resid_post", "hook_resid_pre"))


@mutant("lookup.any_name", "any", "hook_api.lookup", OlmoTransformerBridge, "get_hook_point")
def any_name(original: Any) -> Any:
    """get_hook_point gives the embedding's for a name that it does not know."""
    return lambda self, name: original(self, name) or self.hook_dict["embed.hook_out"]


add(
    "lookup.modules_without_aliases",
    "mod_dict knows no alias",
    "any",
    "hook_api.lookup",
    OlmoTransformerBridge,
    "mod_dict",
    lambda original: property(
        lambda self: {
            name: module
            for name, module in original.fget(self).items()
            if getattr(module, "name", name) == name
        }
    ),
)
add(
    "lookup.some_points",
    "hook_points() leaves out those of attention",
    "any",
    "hook_api.lookup",
    OlmoTransformerBridge,
    "hook_points",
    lambda original: (
        lambda self: [point for point in original(self) if ".attn." not in str(point.name)]
    ),
)


@bridge_mutant("lookup.attribute", "any", "hook_api.lookup")
def attribute(bridge: Any) -> None:
    """blocks[i].hook_resid_mid is a hook point that never fires."""
    for block in bridge.blocks:
        object.__setattr__(block, "hook_resid_mid", HookPoint())  # type: ignore[no-untyped-call]


def _output_only(original: Any) -> Any:
    return lambda self, hook_fn, hook_name="output": original(self, hook_fn)


def _both_ends(original: Any) -> Any:
    return lambda self, hook_name=None: original(self)


def _one_end(original: Any) -> Any:
    return lambda self, hook_name=None: original(self, hook_name or "output")


def _any_end(original: Any) -> Any:
    def remove(self: Any, hook_name: str | None = None) -> None:
        if hook_name in (None, "input", "output"):
            original(self, hook_name)

    return remove


for name, breaks, method, make in (
    ("output_only", "add_hook takes the input for the output", "add_hook", _output_only),
    ("both_ends", "remove_hooks of one end takes off those of both", "remove_hooks", _both_ends),
    ("one_end", "remove_hooks() takes off those of the output only", "remove_hooks", _one_end),
    ("any_end", "remove_hooks accepts a name that there is not", "remove_hooks", _any_end),
):
    add(f"lookup.{name}", breaks, "any", "hook_api.components", GeneralizedComponent, method, make)
