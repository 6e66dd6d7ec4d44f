"""The other options of transformer_lens' generate, and its two other ways to answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import StoppingCriteria

from conformance.checks.caches import Chunk, from_the_seed
from conformance.checks.chunks import tapping
from conformance.checks.generation import (
    bridge_options,
    by_bridge,
    by_hugging_face,
    differing_streams,
    differing_texts,
    generating,
    generating_cases,
    generating_runs,
    steps_of,
)
from conformance.checks.generation_hooks import settled_models
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of
from conformance.compare import Gap, bitwise, compare_tensors
from conformance.inputs import inputs
from conformance.observe import sites_of
from conformance.recorder import Recorder
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, reference
from conformance.taps import TappedCache
from conformance.tolerance import of_value


class EndsIn(StoppingCriteria):
    """Stops each row that ends in a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows stop, ``[batch]``."""
        return input_ids[:, -1] == self.token


def option_cases() -> SearchStrategy[Case]:
    """Generations of which half have no padding."""
    paddings = st.sampled_from(("none", "gap"))
    return cases(runs=partial(generating_runs, paddings=paddings))


@check(
    "generation.options",
    "repetition_penalty and stopping_criteria do what they do in Hugging Face's generate; "
    "temperature 0 is greedy, and greedy generation heeds no freq_penalty; generate_stream does "
    "the same.",
    option_cases,
    examples=0.3,
)
def options(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One of them, by the seed."""
    data = inputs(case)
    plain = by_hugging_face(case, data)
    stop = EndsIn(int(plain.tokens[-1, case.run.seq_len]))
    end = (stop.token + 1) % case.model.vocab_size
    # A penalty of 2 rounds nothing in any dtype.
    ways: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"repetition_penalty": 2.0}, {"repetition_penalty": 2.0}),
        (
            {"stopping_criteria": [stop], "eos_token_id": end, "pad_token_id": end},
            {"stopping_criteria": stop, "eos_token_id": end, "stop_at_eos": True},
        ),
        ({}, {"do_sample": True, "temperature": 0.0}),
        ({}, {"freq_penalty": 3.0}),
    )
    # Padding is penalized as if it were text: penalties-count-padding in known_defects.toml.
    penalized = data.attention_mask is None and case.run.token_seed % 2 == 0
    theirs, ours = ways[0 if penalized else 1 + case.run.token_seed // 2 % 3]
    expected = by_hugging_face(case, data, **theirs)
    yield from differing_texts(expected, by_bridge(generating(case, adapter), case, data, **ours))
    yield from differing_streams(expected, generating(case, adapter), case, **ours)


@check(
    "generation.stream",
    "generate_stream gives the prompt and the tokens of generate, in pieces of the asked size, "
    "and of two streams, taken in turns, each its own; return_input_tokens gives the prompt beside "
    "the tokens.",
    generating_cases,
    examples=0.12,
)
def stream(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Pieces of two tokens, or of more than there are."""
    data = inputs(case)
    expected = by_hugging_face(case, data).tokens
    size = 2 if case.run.token_seed % 2 else 100
    asked = bridge_options(case, data)
    subject = generating(case, adapter)
    with from_the_seed(case, subject), at_work("generate_stream"):
        told = bridge_of(subject).generate_stream(data.tokens, max_tokens_per_yield=size, **asked)
        pieces = list(told)
    yield from bitwise("tokens of the stream", expected, torch.cat(pieces, dim=1))
    for index, piece in enumerate(pieces[1:-1], start=1):
        if piece.shape[1] != size:
            yield Gap(f"piece {index}", "count", f"{piece.shape[1]} tokens instead of {size}")
    if not (case.run.training and case.model.attention_dropout):  # they would draw in turns too
        yield from _in_turns(generating(case, adapter), case, asked)
    subject = generating(case, adapter)
    with from_the_seed(case, subject), at_work("return_input_tokens"):
        both = bridge_of(subject).generate(data.tokens, return_input_tokens=True, **asked)
    for name, due, got in zip(("tokens", "prompt"), (expected, data.tokens), both, strict=True):
        yield from bitwise(name, due, got)


def _in_turns(subject: Subject, case: Case, asked: dict[str, Any]) -> Iterator[Gap]:
    """Two streams of one bridge, of texts of one length: dynamic RoPE remembers lengths."""
    data = inputs(case)
    other = data.tokens.flip(0).roll(1, dims=1)
    bridge = bridge_of(subject)
    texts = [data, replace(data, tokens=other)]
    with from_the_seed(case, subject), at_work("two streams in turns"):
        streams = [
            bridge.generate_stream(text.tokens, max_tokens_per_yield=1, **asked) for text in texts
        ]
        told = list(zip(*streams, strict=True))
    for index, (text, pieces) in enumerate(zip(texts, zip(*told, strict=True), strict=True)):
        due = by_hugging_face(case, text).tokens
        yield from bitwise(f"tokens of stream {index} of two", due, torch.cat(pieces, dim=1))


def single_texts() -> SearchStrategy[Case]:
    """Settled generations of one row, in eval mode, with a cache."""
    one: dict[str, Any] = {
        "batches": st.just(1),
        "trainings": st.just(False),
        "caches": st.just(True),
    }
    return cases(models=settled_models(), runs=partial(generating_runs, **one))


@check(
    "generation.cache_of_activations",
    "return_cache gives, beside the tokens, every hook's activation of the whole text, as the "
    "reference computes it under the prompt's mask.",
    single_texts,
    examples=0.15,
)
def cache_of_activations(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One row, as transformer_lens asks, and a cache of keys, which its last forward makes."""
    data = inputs(case)
    text = by_hugging_face(case, data).tokens
    subject = generating(case, adapter)
    with from_the_seed(case, subject), at_work("return_cache"):
        asked = bridge_options(case, data, return_cache=True)
        tokens, cache = bridge_of(subject).generate(data.tokens, **asked)
    yield from bitwise("tokens", text, tokens)
    mask = data.attention_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(1, steps_of(case))], dim=1)
    whole = Chunk(replace(data, tokens=text, attention_mask=mask), 0, text.shape[1])
    truth = reference(case.model)
    sites = sites_of(subject, case)
    recorder = Recorder()
    taps = tapping(truth, case, sites, recorder)
    with from_the_seed(case, truth), taps.attached():
        whole.logits(truth, TappedCache(taps, config=truth.model.config))
    for name, site in sites.items():
        due = recorder.values[name]
        if name not in cache:
            yield Gap(name, "missing", "not in the cache")
            continue
        allowance = of_value(site, name, recorder.values)
        wider = bool(site.derived)
        gap = compare_tensors(name, due, cache[name], allowance, any_wider=wider)
        yield from [gap] if gap else []
