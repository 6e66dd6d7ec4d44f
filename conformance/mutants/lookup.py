"""Faults of the ways to get hold of a hook point."""

from __future__ import annotations

from typing import Any

from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import Make, add, bridge_mutant, mutant


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
            if not isinstance(module, HookPoint) or module.name == name
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


def _every_component(bridge: Any, method: str, make: Make) -> None:
    """Replace a method of every component of a bridge."""
    for component in bridge.modules():
        if isinstance(component, GeneralizedComponent):
            broken = make(getattr(component, method))
            object.__setattr__(component, method, broken)


@bridge_mutant("lookup.output_only", "a hook on an input", "hook_api.components")
def output_only(bridge: Any) -> None:
    """add_hook takes the input for the output."""
    _every_component(bridge, "add_hook", lambda add_hook: lambda fn, name="output": add_hook(fn))


@bridge_mutant("lookup.both_ends", "hooks on both ends", "hook_api.components")
def both_ends(bridge: Any) -> None:
    """remove_hooks of one end takes off those of both."""
    _every_component(bridge, "remove_hooks", lambda remove: lambda name=None: remove())


@bridge_mutant("lookup.one_end", "a hook on an input", "hook_api.components")
def one_end(bridge: Any) -> None:
    """remove_hooks() takes off those of the output only."""
    _every_component(
        bridge, "remove_hooks", lambda remove: lambda name=None: remove(name or "output")
    )


@bridge_mutant("lookup.any_end", "any", "hook_api.components")
def any_end(bridge: Any) -> None:
    """remove_hooks accepts a name that there is not."""

    def make(remove: Any) -> Any:
        return lambda name=None: remove(name) if name in (None, "input", "output") else None

    _every_component(bridge, "remove_hooks", make)


@bridge_mutant("lookup.everywhere", "any", "hook_api.components")
def everywhere(bridge: Any) -> None:
    """remove_hooks() of a component takes off the hooks of all others too."""

    def make(remove: Any) -> Any:
        return lambda name=None: remove(name) if name else bridge.reset_hooks()

    _every_component(bridge, "remove_hooks", make)


@bridge_mutant("lookup.refusal_removes", "a hook on an output", "hook_api.components")
def refusal_removes(bridge: Any) -> None:
    """remove_hooks takes all off before it refuses a name."""

    def make(remove: Any) -> Any:
        def removing(name: str | None = None) -> None:
            if name not in (None, "input", "output"):
                remove()
            remove(name)

        return removing

    _every_component(bridge, "remove_hooks", make)


@mutant("lookup.behind_flags", "any", "hook_api.lookup", OlmoTransformerBridge, "get_hook_point")
def behind_flags(original: Any) -> Any:
    """get_hook_point does not know hook_result."""
    return lambda self, name: None if name.endswith("hook_result") else original(self, name)
