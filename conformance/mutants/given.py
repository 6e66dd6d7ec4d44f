"""Faults of what a call is given: passed over, overwritten, or looked for in one place only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter import calls, text
from adapter.calls import OlmoCalls
from adapter.compatibility import OlmoTransformerBridge
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import add, mutant


def _made_for_texts(*names: str) -> Callable[[Any], Any]:
    """Several texts have their padding's mask, and no other of these names."""

    def make(original: Any) -> Any:
        def call(self: Any, input: Any, *args: Any, **named: Any) -> Any:
            if isinstance(input, list) and len(input) > 1:
                named = {name: value for name, value in named.items() if name not in names}
            return original(self, input, *args, **named)

        return call

    return make


for name, check, method in (
    ("attention_mask", "text.forward", "forward"),
    ("one_zero_attention_mask", "text.forward", "forward"),
    ("attention_mask", "continuation.generation", "generate"),
):
    breaks = f"{name} of several texts is overwritten with that of their padding, in {method}"
    make = _made_for_texts(name)
    add(f"given.{name}_{method}", breaks, "several texts", check, OlmoTextBridge, method, make)


add(
    "given.cache_by_position",
    "a cache that is given by position is not seen by the mask of padding",
    "several texts of unequal length over a cache",
    "text.forward",
    text,
    "_CACHE",
    lambda _original: 6,
)


add(
    "given.first_slots",
    "positions of embeddings follow the mask's first slots, where a cache has others",
    "embeddings over a cache, a gap or padding on the left",
    "calls.embeddings",
    calls,
    "_positions",
    lambda original: (
        lambda mask, length: original(None if mask is None else mask[..., :length], length)
    ),
)


@mutant(
    "given.embeddings_by_name",
    "inputs_embeds, a gap or padding on the left",
    "calls.embeddings",
    OlmoTransformerBridge,
    "forward",
)
def _(original: Any) -> Any:
    """Positions of embeddings do not follow a mask where they are given as inputs_embeds."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        if "inputs_embeds" in named:
            length = named["inputs_embeds"].shape[-2]
            named.setdefault("position_ids", torch.arange(length)[None])
        return original(self, input, *args, **named)

    return forward


@mutant(
    "given.end_of_texts",
    "texts, eos_token_id",
    "continuation.generation",
    OlmoCalls,
    "hf_generate",
)
def _(original: Any) -> Any:
    """hf_generate of texts goes on past the eos_token_id that it is given."""

    def hf_generate(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(input, torch.Tensor):
            named.pop("eos_token_id", None)
        return original(self, input, *args, **named)

    return hf_generate


@mutant(
    "given.names_by_position",
    "names_filter by position",
    "firing.refused",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """run_with_cache refuses a gated name only where it is given as names_filter."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        return (original if "names_filter" in named else TransformerBridge.run_with_cache)(
            self, *args, **named
        )

    return run


def _of_tokens(change: Callable[[Any, dict[str, Any]], None]) -> Any:
    """hf_generate of tokens, of a bridge with a tokenizer, takes its options as changed."""

    def make(original: Any) -> Any:
        def hf_generate(self: Any, input: Any, *args: Any, **named: Any) -> Any:
            if self.tokenizer is not None:
                change(self, named)
            return original(self, input, *args, **named)

        return hf_generate

    return make


def _its_end(self: Any, named: dict[str, Any]) -> None:
    named.pop("eos_token_id", None)


def _its_pad(self: Any, named: dict[str, Any]) -> None:
    named["pad_token_id"] = self.tokenizer.eos_token_id


for name, breaks, trigger, change in (
    ("end_of_tokens", "the tokenizer's end is taken for an eos_token_id", "eos_token_id", _its_end),
    ("pad_token", "the tokenizer's end is taken for a pad_token_id", "pad_token_id", _its_pad),
    (
        "padding_of_the_model",
        "the model's padding is forgotten over the tokenizer's end",
        "a prompt with the model's pad",
        lambda self, named: named.setdefault("pad_token_id", self.tokenizer.eos_token_id),
    ),
):
    made = _of_tokens(change)
    add(f"given.{name}", breaks, trigger, "sampling.hugging_face", OlmoCalls, "hf_generate", made)


def _without(record: str) -> Callable[[Any], Any]:
    return lambda records: tuple(name for name in records if name != record)


for record in calls._WANTS_A_RECORD:
    breaks, trigger = f"{record} alone asks for no record", f"{record} without another record"
    check, made = "sampling.hugging_face", _without(record)
    add(f"given.{record}", breaks, trigger, check, calls, "_WANTS_A_RECORD", made)


@mutant(
    "given.unknown_name",
    "a names_filter that no hook has",
    "hook_api.exceptions",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """run_with_cache of a name that no hook has caches nothing, and says nothing."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        try:
            return original(self, *args, **named)
        except KeyError:
            return original(self, *args, **{**named, "names_filter": lambda name: False})

    return run
