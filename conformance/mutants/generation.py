"""Faults of generation: its ends, masks, options, hooks, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter.calls import OlmoCalls
from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import Make, add, hook_mutant, mutant

Options = dict[str, Any]


def _asked(change: Callable[[Options], Options]) -> Make:
    """A generation loop some of whose options are others than those that were asked for."""

    def make(original: Any) -> Any:
        def tokens(self: Any, *args: Any, **named: Any) -> Any:
            return original(self, *args, **{**named, **change(named)})

        return tokens

    return make


def _first_mask(named: Options) -> Options:
    mask = named["initial_attention_mask"]
    return {} if mask is None else {"initial_attention_mask": mask[:1].expand_as(mask)}


def _unpenalized(named: Options) -> Options:
    return {} if named["do_sample"] else {"repetition_penalty": 1.0}


def _tepid(named: Options) -> Options:
    return {"temperature": max(named["temperature"], 1.0)} if named["do_sample"] else {}


def _one_more(named: Options) -> Options:
    return {"top_k": named["top_k"] and named["top_k"] + 1}


for name, breaks, trigger, killer, change in (
    (
        "padded_with_zero",
        "a row that has stopped goes on with token 0 instead of its end of text",
        "rows that stop at different steps",
        "generation.greedy",
        lambda named: {"eos_token_for_padding": 0},
    ),
    (
        "first_mask",
        "every row has the mask of the first",
        "rows padded in different ways",
        "generation.greedy",
        _first_mask,
    ),
    (
        "unpenalized",
        "greedy generation heeds no repetition_penalty",
        "repetition_penalty, greedy",
        "generation.options",
        _unpenalized,
    ),
    (
        "criteria_lost",
        "stopping criteria are forgotten beside an end of text",
        "stopping_criteria",
        "generation.options",
        lambda named: {"stopping_criteria_list": None} if named["stop_at_eos"] else {},
    ),
    (
        "tepid",
        "a temperature below 1 is taken for 1",
        "a temperature below 1",
        "sampling.draws",
        _tepid,
    ),
    (
        "one_more",
        "top_k keeps one token more",
        "top_k",
        "sampling.draws",
        _one_more,
    ),
):
    owner, attribute = OlmoTransformerBridge, "_generate_tokens"
    add(f"generation.{name}", breaks, trigger, killer, owner, attribute, _asked(change))

add(
    "generation.mask_forgotten",
    "from embeddings, the mask is forgotten after a token: transformer_lens' own loop",
    "embeddings, a gap or left padding",
    "generation.embeddings",
    OlmoCalls,
    "_generate_tokens",
    lambda original: TransformerBridge._generate_tokens,
)


@mutant(
    "generation.positions_of_padding",
    "left padding or a gap, a cache",
    "generation.greedy",
    OlmoTransformerBridge,
    "forward",
)
def positions_of_padding(original: Any) -> Any:
    """Over a cache, a new token's position counts the padding before it."""

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("past_key_values") is not None and "position_ids" in named:
            last = named["attention_mask"].shape[1] - 1
            named["position_ids"] = torch.full_like(named["position_ids"], last)
        return original(self, *args, **named)

    return forward


@mutant(
    "generation.rest_lost", "any", "generation.stream", OlmoTransformerBridge, "generate_stream"
)
def rest_lost(original: Any) -> Any:
    """A stream ends with its last full piece."""

    def stream(
        self: Any, input: Any, max_tokens_per_yield: int = 25, **named: Any
    ) -> Iterator[Any]:
        pieces = original(self, input, max_tokens_per_yield=max_tokens_per_yield, **named)
        for index, piece in enumerate(pieces):
            if index == 0 or piece.shape[1] == max_tokens_per_yield:
                yield piece

    return stream


hook_mutant(
    "generation.twice",
    "the hook fires twice for a single token over a cache",
    "a cache",
    "generation.hooks",
    "blocks.{i}.attn.hook_pattern",
    lambda fire, x: fire(fire(x)) if x.shape[2] == 1 and x.shape[3] > 1 else fire(x),
)


@mutant("generation.hooks_once", "an edit", "generation.hooks", OlmoTransformerBridge, "forward")
def hooks_once(original: Any) -> Any:
    """Over a cache the last token's embedding is taken from the table: no edit of it acts."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        if named.get("past_key_values") is not None and not input.is_floating_point():
            input = self.embed.original_component(input)
        return original(self, input, *args, **named)

    return forward


@mutant(
    "generation.eval", "train mode", "generation.leaves_nothing", OlmoTransformerBridge, "generate"
)
def left_in_eval(original: Any) -> Any:
    """A generation leaves the bridge in eval mode."""

    def generate(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        self.eval()
        return result

    return generate


@mutant(
    "generation.still_captures",
    "a cache",
    "generation.leaves_nothing",
    OlmoTransformerBridge,
    "generate_stream",
)
def still_captures(original: Any) -> Any:
    """After an abandoned stream every forward leaves its cache in the bridge."""

    def stream(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        try:
            yield from original(self, *args, **named)
        finally:
            self._capture_hf_cache = True

    return stream


@mutant(
    "generation.unmasked_cache",
    "padding",
    "generation.cache_of_activations",
    OlmoTransformerBridge,
    "run_with_cache",
)
def unmasked_cache(original: Any) -> Any:
    """return_cache shows the text as it were without the prompt's mask."""

    def run(self: Any, *args: Any, attention_mask: Any = None, **named: Any) -> Any:
        return original(self, *args, **named)

    return run


@mutant(
    "sampling.always_cached",
    "no cache",
    "sampling.hugging_face",
    OlmoTransformerBridge,
    "hf_generate",
)
def always_cached(original: Any) -> Any:
    """Hf_generate uses a cache, asked or not: as transformer_lens does."""

    def generate(self: Any, *args: Any, use_past_kv_cache: bool = True, **named: Any) -> Any:
        return original(self, *args, **named)

    return generate


@mutant(
    "sampling.never_ends",
    "a configured end of text",
    "sampling.hugging_face",
    OlmoTransformerBridge,
    "hf_generate",
)
def never_ends(original: Any) -> Any:
    """Stop_at_eos=False leaves the configuration's end of text in force."""

    def generate(self: Any, *args: Any, stop_at_eos: bool = True, **named: Any) -> Any:
        return original(self, *args, **named)

    return generate
