"""Faults of what a bridge keeps when it is copied, saved, loaded or cast, and in reading texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from adapter import compatibility
from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import Make, add, mutant
from conformance.spec import FLAGS


def _when_restored(act: Callable[[Any], object]) -> Make:
    """A bridge to which something more is done when it is restored from a copy or a file."""

    def make(original: Any) -> Any:
        def restore(self: Any, state: Any) -> None:
            original(self, state)
            act(self)

        return restore

    return make


def _untie(bridge: Any) -> None:
    if bridge.original_model.config.tie_word_embeddings:
        weight = bridge.unembed.original_component.weight
        own = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
        bridge.unembed.original_component.weight = own


def _lower_flags(bridge: Any) -> None:
    for flag in FLAGS:
        if getattr(bridge.cfg, flag, False):
            setattr(bridge.cfg, flag, False)


def _lose_extras(bridge: Any) -> None:
    for name in ("clip_qkv", "attention_dropout"):
        vars(bridge.cfg).pop(name, None)


for name, breaks, trigger, killer, act in (
    (
        "thaws",
        "a loaded bridge is trainable as a whole",
        "a frozen parameter",
        "copies.pickle",
        lambda bridge: bridge.requires_grad_(True),
    ),
    (
        "evals",
        "a loaded bridge is in eval mode",
        "train mode",
        "copies.pickle",
        lambda bridge: bridge.eval(),
    ),
    ("flags_lost", "a loaded bridge has no flag on", "a flag", "copies.pickle", _lower_flags),
    (
        "unties",
        "the tied embeddings of a loaded bridge come apart",
        "tied embeddings",
        "copies.pickle",
        _untie,
    ),
    (
        "extras_lost",
        "a copy's cfg has only transformer_lens' own fields",
        "any",
        "copies.deepcopy",
        _lose_extras,
    ),
):
    add(
        f"kept.{name}",
        breaks,
        trigger,
        killer,
        OlmoTransformerBridge,
        "__setstate__",
        _when_restored(act),
    )


class _Whole:
    """What copy.deepcopy hands on as it is."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: Any) -> _Whole:
        return self


def _held(whole: _Whole) -> Any:
    return whole.held


@mutant(
    "kept.memo_lost",
    "a bridge copied together with its optimizer",
    "copies.deepcopy",
    OlmoTransformerBridge,
    "__reduce_ex__",
)
def memo_lost(original: Any) -> Any:
    """A bridge is copied on its own, apart from what is copied together with it."""
    inside: list[Any] = []

    def reduce(self: Any, protocol: Any) -> Any:
        if inside:
            return original(self, protocol)
        inside.append(self)
        try:
            return _held, (_Whole(copy.deepcopy(self)),)
        finally:
            inside.clear()

    return reduce


@mutant(
    "kept.strips_hooks",
    "a plain PyTorch hook that is a local function",
    "copies.hooked",
    compatibility,
    "forget_output_recorders",
)
def strips_hooks(original: Any) -> Any:
    """Copying a bridge takes away the user's PyTorch hooks that pickle cannot find."""

    def forget(model: Any) -> None:
        original(model)
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if "<locals>" in getattr(hook, "__qualname__", ""):
                    del module._forward_hooks[key]

    return forget


@mutant(
    "kept.duplicates_ignored",
    "tied embeddings",
    "parameters.same",
    OlmoTransformerBridge,
    "named_parameters",
)
def duplicates_ignored(original: Any) -> Any:
    """named_parameters(remove_duplicate=False) is not passed on."""

    def named(
        self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Any:
        return original(self, prefix, recurse)

    return named


@mutant("text.pads_by_token", "END as pad", "text.forward", OlmoTransformerBridge, "_encode")
def pads_by_token(original: Any) -> Any:
    """The mask is where no pad token stands, also one that belongs to the text."""

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, _ = original(self, *args, **kwargs)
        return tokens, (tokens != self.tokenizer.pad_token_id).long()

    return encode
