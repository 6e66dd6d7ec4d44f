"""Faults of caches that are filled by hooks which somebody puts on."""

from __future__ import annotations

from typing import Any

from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import add, mutant


def _without(option: str) -> Any:
    """The method passes an option over."""

    def make(original: Any) -> Any:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            named.pop(option, None)
            return original(self, *args, **named)

        return call

    return make


for name, breaks, option, method in (
    ("whole_text", "get_caching_hooks keeps all positions", "pos_slice", "get_caching_hooks"),
    ("own_dict", "get_caching_hooks fills a dict of its own", "cache", "get_caching_hooks"),
    ("no_gradients", "add_caching_hooks keeps no gradients", "incl_bwd", "add_caching_hooks"),
):
    owner = OlmoTransformerBridge
    add(f"caching_hooks.{name}", breaks, "any", "caching.hooks", owner, method, _without(option))


@mutant("caching_hooks.doubled", "any", "caching.hooks", OlmoTransformerBridge, "get_caching_hooks")
def doubled(original: Any) -> Any:
    """Get_caching_hooks keeps twice the gradient."""

    def hooks(self: Any, *args: Any, **named: Any) -> Any:
        cache, forward, backward = original(self, *args, **named)
        twice = [
            (name, lambda tensor, hook, keep=keep: keep(2 * tensor, hook=hook))
            for name, keep in backward
        ]
        return cache, forward, twice

    return hooks
