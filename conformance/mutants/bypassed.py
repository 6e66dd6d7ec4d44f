"""Faults that were seeded again: calls that pass something by, and what is kept for too long."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from adapter import block, clip, forks, olmo, recompute
from adapter.clip import _PatchedForward
from adapter.compatibility import OlmoTransformerBridge
from adapter.configuration import configurations
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.mutants.catalogue import add, mutant


@mutant("recompute.last", "two forwards", "firing.recomputed", recompute, "_settings_of")
def last(original: Any) -> Any:
    """What is computed again has the hooks of the last forward, whichever it is of."""

    def settings_of(module: torch.nn.Module) -> Any:
        kept: list[Any] = vars(module).setdefault("_kept_settings", [])
        kept[:] = original(module)
        return kept

    return settings_of


@mutant("recompute.reentrant", "reentrant", "firing.recomputed", block, "recompute_alike")
def reentrant(original: Any) -> Any:
    """With use_reentrant=True what is computed again lacks the hooks that are gone by then."""

    def recompute_alike(bridge: Any, layer: Any) -> None:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if not getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            original(bridge, layer)

    return recompute_alike


@mutant(
    "processing.ten", "12 blocks", "processing.weights", OlmoTransformerBridge, "process_weights"
)
def ten(original: Any) -> Any:
    """What the eleventh block and later ones write is not centered."""

    def process_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        far = [each.mlp.out.original_component for each in self.blocks[10:]]
        before = [linear.weight.detach().clone() for linear in far]
        original(self, *args, **kwargs)
        with torch.no_grad():
            for each, weight in zip(self.blocks[10:], before, strict=True):
                each.mlp.out.original_component.weight.copy_(weight)

    return process_weights


@mutant(
    "weights.ten_biases",
    "11 blocks, output biases",
    "weights.accessors",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def ten_biases(original: Any) -> Any:
    """accumulated_bias leaves out the eleventh block and later ones."""
    return lambda self, layer, *args, **named: original(self, min(layer, 10), *args, **named)


@mutant("patch.kept", "a projection replaced", "patched.modes", _PatchedForward, "_put_up")
def kept(original: Any) -> Any:
    """The exact patch goes on calling the projections that its first forward has found."""
    first: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()

    def put_up(self: Any) -> None:
        original(self)
        if self.mode == "exact":
            self.stand_ins = dict(first.setdefault(self.attn, self.stand_ins))
            vars(self.attn).update(self.stand_ins)

    return put_up


@mutant("patch.interrupted", "an interrupt", "patch.life", _PatchedForward, "__call__")
def interrupted(original: Any) -> Any:
    """Where Ctrl-C ends a patched attention, its stand-ins stay up."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            self.inside[threading.get_ident()] += 1
            self._put_up()
            raise

    return call


@mutant("patch.bridged_stays", "a clip that binds", "patch.life", clip, "_attentions")
def bridged_stays(original: Any) -> Any:
    """unpatch_model of a bridged model leaves the attentions inside of the bridge patched."""

    def attentions(model: Any) -> Any:
        found = original(model)
        if found is None or sys._getframe(1).f_code.co_name != "unpatch_model":
            return found
        return {
            path: None if isinstance(each, GeneralizedComponent) else each
            for path, each in found.items()
        }

    return attentions


add(
    "flags.wrapped",
    "a projection that computes more than its weight is taken for that",
    "such a projection",
    "flags.refused",
    forks,
    "parameters_of",
    lambda original: lambda projection: (projection.weight, projection.bias),
)


compatible = partial(mutant, owner=OlmoTransformerBridge, attribute="enable_compatibility_mode")


@compatible("compatibility.once", "the mode on before", "processing.weights")
def once(original: Any) -> Any:
    """Where compatibility mode is on, asking for it with processing does nothing."""

    def enable(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.compatibility_mode:
            original(self, *args, **kwargs)

    return enable


@compatible("compatibility.swapped", "a call by position", "processing.weights")
def swapped(original: Any) -> Any:
    """Given by position, the two centerings have changed places."""

    def enable(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args[:3], *reversed(args[3:5]), *args[5:], **kwargs)

    return enable


@mutant("compatibility.stale", "a cast", "processing.weights", OlmoUnembeddingBridge, "W_U")
def stale(original: Any) -> Any:
    """In compatibility mode W_U is what it was when it was first read."""

    def get(self: Any) -> Any:
        if not self.compatibility_mode:
            return original.fget(self)
        return vars(self).setdefault("_first_read", original.fget(self))

    return property(get)


@mutant(
    "compatibility.dropping",
    "train mode with a dropout",
    "compatibility.value_biases",
    OlmoTransformerBridge,
    "_why_value_biases_must_stay",
)
def dropping(original: Any) -> Any:
    """Value biases are folded though attention drops some of what they are added to."""

    def why(self: Any) -> Any:
        reason = original(self)
        return None if reason and "dropout" in reason else reason

    return why


@mutant("configuration.theta", "a theta of 100.5", "configuration.truth", olmo, "tell_the_truth")
def theta(original: Any) -> Any:
    """cfg.rotary_base is a whole number."""

    def tell_the_truth(bridge: Any) -> None:
        original(bridge)
        for config in configurations(bridge):
            config.rotary_base = int(config.rotary_base)

    return tell_the_truth
