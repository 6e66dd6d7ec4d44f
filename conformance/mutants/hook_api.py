"""Faults of caches, of partial runs, and of what is left of hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.mutants.catalogue import Make, add, bridge_mutant, mutant, points

add(
    "caching.shared",
    "neighbouring hooks keep one tensor",
    "an edit in place",
    "caching.unchanging",
    OlmoHookPoint,
    "forward",
    lambda original: lambda self, x: x,
)
add(
    "caching.logits",
    "the logits that are returned are the ones that are kept",
    "any",
    "caching.unchanging",
    OlmoUnembeddingBridge,
    "forward",
    lambda original: UnembeddingBridge.forward,
)


@bridge_mutant("caching.heads_sliced", "a pos_slice", "caching.values")
def heads_sliced(bridge: Any) -> None:
    """A pos_slice picks heads of the rotated queries."""
    for point in points(bridge, "blocks.{i}.attn.hook_rot_q"):
        point.pos_dim = 2


@bridge_mutant("caching.keys_sliced", "a pos_slice", "caching.values")
def keys_sliced(bridge: Any) -> None:
    """A pos_slice picks keys of the pattern, and not queries."""
    for point in points(bridge, "blocks.{i}.attn.hook_pattern"):
        point.pos_dim = 3


def _cached(change: Callable[[Any, Any, dict[str, Any]], None]) -> Make:
    """What is in a cache is changed before anybody sees it."""

    def make(original: Any) -> Any:
        def run(self: Any, *args: Any, **named: Any) -> Any:
            output, cache = original(self, *args, **named)
            change(self, getattr(cache, "cache_dict", cache), named)
            return output, cache

        return run

    return make


def _no_alias(bridge: Any, cache: dict[str, Any], named: dict[str, Any]) -> None:
    if isinstance(named.get("names_filter"), list):
        for name in [name for name in cache if bridge.hook_dict[name].name != name]:
            del cache[name]


def _untrained(bridge: Any, cache: dict[str, Any], named: dict[str, Any]) -> None:
    if named.get("incl_bwd"):
        bridge.blocks[0].attn.v.original_component.weight.grad = None


def _gradient_of_neighbour(bridge: Any, cache: dict[str, Any], named: dict[str, Any]) -> None:
    for name in [name for name in cache if name.endswith("ln2.hook_in_grad")]:
        cache[name] = cache[name.replace("ln2.hook_in", "hook_out")]


def _last_block_too(bridge: Any, cache: dict[str, Any], named: dict[str, Any]) -> None:
    if named.get("stop_at_layer") is not None:
        index = named["stop_at_layer"] % len(bridge.blocks)
        cache[f"blocks.{index}.hook_in"] = next(iter(cache.values()))


for name, breaks, trigger, killer, change in (
    ("no_alias", "a list of names keeps no alias", "a list", "caching.values", _no_alias),
    (
        "untrained",
        "incl_bwd leaves the value projection of the first block without a gradient",
        "any",
        "caching.incl_bwd",
        _untrained,
    ),
    (
        "neighbour",
        "the gradient of hook_resid_mid is that of hook_resid_post",
        "any",
        "caching.incl_bwd",
        _gradient_of_neighbour,
    ),
    (
        "too_far",
        "the block at which a run stops is in the cache",
        "stop_at_layer",
        "caching.layers",
        _last_block_too,
    ),
):
    owner, attribute = OlmoTransformerBridge, "run_with_cache"
    add(f"caching.{name}", breaks, trigger, killer, owner, attribute, _cached(change))


@mutant(
    "caching.stopped_short",
    "stop_at_layer",
    "caching.layers",
    OlmoTransformerBridge,
    "run_with_hooks",
)
def stopped_short(original: Any) -> Any:
    """The output of a run that stops early has no gradient."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        output = original(self, *args, **named)
        if named.get("stop_at_layer") is not None:
            return output.detach().requires_grad_()
        return output

    return run


@mutant(
    "caching.from_behind",
    "a negative start_at_layer",
    "caching.layers",
    OlmoTransformerBridge,
    "_setup_start_at_layer",
)
def from_behind(original: Any) -> Any:
    """A start counted from the end is one block late, if there is one more."""

    def setup(self: Any, entry: torch.Tensor, start: int) -> torch.Tensor:
        late: torch.Tensor = original(self, entry, min(start + 1, -1) if start < 0 else start)
        return late

    return setup


@mutant("hook_api.permanent", "a permanent hook", "hook_api.ledger", OlmoHookPoint, "remove_hooks")
def permanent(original: Any) -> Any:
    """Removing hooks of the backward takes the permanent ones too."""

    def remove(
        self: Any, dir: str = "fwd", including_permanent: bool = False, **named: Any
    ) -> None:
        original(self, dir, including_permanent or dir != "fwd", **named)

    return remove


@mutant(
    "hook_api.prepended",
    "prepend=True",
    "hook_api.order",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def prepended(original: Any) -> Any:
    """A backward hook that is put in front of the others comes behind them."""

    def register(self: Any, hook: Any, prepend: bool = False) -> RemovableHandle:
        handle: RemovableHandle = original(self, hook)
        return handle

    return register


@mutant("hook_api.all_at_the_end", "hooks()", "hook_api.ledger", OlmoTransformerBridge, "hooks")
def all_at_the_end(original: Any) -> Any:
    """A context takes the hooks of the user off at its end, too."""

    @contextmanager
    def hooks(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        with original(self, *args, **named) as bridge:
            yield bridge
        self.reset_hooks(clear_contexts=False)

    return hooks


@mutant(
    "hook_api.interrupted",
    "an exception in the forward",
    "hook_api.exceptions",
    OlmoTransformerBridge,
    "run_with_hooks",
)
def interrupted(original: Any) -> Any:
    """Ctrl-C in run_with_hooks leaves its first hook where it is."""

    def run(self: Any, tokens: Any, fwd_hooks: Any = (), *args: Any, **named: Any) -> Any:
        try:
            return original(self, tokens, list(fwd_hooks), *args, **named)
        except BaseException as error:
            if not isinstance(error, Exception) and fwd_hooks:
                self.add_hook(*fwd_hooks[0])
            raise

    return run


@mutant(
    "hook_api.swallowed",
    "an exception in a backward hook",
    "hook_api.exceptions",
    OlmoHookPoint,
    "register_full_backward_hook",
)
def swallowed(original: Any) -> Any:
    """An exception in a backward hook is as good as returning nothing."""

    def register(self: Any, hook: Any, prepend: bool = False) -> RemovableHandle:
        def quiet(*args: Any) -> Any:
            try:
                return hook(*args)
            except Exception:
                return None

        handle: RemovableHandle = original(self, quiet, prepend)
        return handle

    return register


@mutant("hook_api.forgetful", "any", "hook_api.contexts", OlmoHookPoint, "add_hook")
def forgetful(original: Any) -> Any:
    """A hook point forgets what its hooks keep when a hook is put on."""

    def add_hook(self: Any, *args: Any, **named: Any) -> Any:
        self.clear_context()
        return original(self, *args, **named)

    return add_hook
