"""A key-value cache is the same thing to a bridge and to Hugging Face: filled, handed over, cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import Cache, DynamicCache, StaticCache

from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps
from conformance.compare import Gap, bitwise
from conformance.inputs import Inputs, derived_positions, inputs
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import cases, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.verdict import NotApplicable


def chunked_runs(model: ModelSpec, **narrower: Any) -> SearchStrategy[RunSpec]:
    """Runs of two tokens and more, over a cache, in two chunks, three, or one a token."""
    lengths, chunks = st.sampled_from((2, 3, 5, 8, 24)), st.sampled_from((2, 2, 3, 24))
    given = {"lengths": lengths, "chunks": chunks, **narrower}
    return run_specs(model, caches=st.just(True), **given)


def chunked_cases() -> SearchStrategy[Case]:
    """Cases of `chunked_runs`."""
    return cases(runs=chunked_runs)


@dataclass(frozen=True)
class Chunk:
    """What one forward over a cache is fed: the columns ``start`` to ``stop`` of all tokens."""

    data: Inputs
    start: int
    stop: int

    def forward(
        self,
        subject: Subject,
        cache: Cache | None,
        call: Callable[..., Any] | None = None,
        **more: Any,
    ) -> Any:
        """What a model returns: of a bridge the logits, unless another return_type is asked for.

        The reference is told the positions that a bridge derives from the mask itself.

        Args:
            subject: Whose model.
            cache: What the chunks before it have filled.
            call: A method of the model to call in its place.
            more: What else it is asked.
        """
        data, columns = self.data, slice(self.start, self.stop)
        given: dict[str, Any] = {"use_cache": True, "past_key_values": cache, **more}
        positions = data.position_ids
        if data.attention_mask is not None:
            given["attention_mask"] = data.attention_mask[:, : self.stop]
            if positions is None and subject.bridge is None:
                positions = derived_positions(given["attention_mask"])
        if positions is not None:
            given["position_ids"] = positions[:, columns]
        call = call or subject.bridge or subject.model
        return call(data.tokens[:, columns], **given)

    def logits(self, subject: Subject, cache: Cache | None) -> torch.Tensor:
        """The logits ``[batch, chunk, d_vocab]``."""
        result = self.forward(subject, cache)
        logits: torch.Tensor = result if isinstance(result, torch.Tensor) else result.logits
        return logits


def chunks_of(case: Case, data: Inputs) -> list[Chunk]:
    """The successive forwards of a case."""
    run = case.run
    bounds = [run.seq_len * chunk // run.chunks for chunk in range(run.chunks + 1)]
    return [Chunk(data, start, stop) for start, stop in pairwise(bounds)]


@contextmanager
def from_the_seed(case: Case, *subjects: Subject) -> Iterator[None]:
    """No gradients, the case's mode, and the random state of its seed."""
    for subject in subjects:
        (subject.bridge or subject.model).train(case.run.training)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.run.token_seed)
        yield


def differing_caches(expected: Cache, actual: Cache) -> Iterator[Gap]:
    """Keys and values of each layer, bit for bit."""
    if len(expected.layers) != len(actual.layers):
        told = f"{len(actual.layers)} layers instead of {len(expected.layers)}"
        yield Gap("cache", "count", told)
    for index, (due, got) in enumerate(zip(expected.layers, actual.layers, strict=False)):
        both = [
            {f"cache.{index}.{name}": getattr(layer, name) for name in ("keys", "values")}
            for layer in (due, got)  # a layer that was never filled has None
        ]
        yield from exact_gaps(*both)


def _new_cache(case: Case, subject: Subject) -> Cache:
    """Every third time a cache of fixed size, with room left."""
    config = subject.model.config
    if case.run.token_seed % 3:
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=case.run.seq_len + 2)


@check(
    "caches.handed_over",
    "A cache, growing or of fixed size, that a bridge and Hugging Face's model fill in turns gives "
    "the logits, and holds the keys and values, of one that the reference has filled alone.",
    chunked_cases,
    examples=0.3,
)
def handed_over(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Chunk by chunk, the bridge first or second."""
    truth, helper = reference(case.model), reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    data = inputs(case)
    chunks = chunks_of(case, data)
    due = _new_cache(case, truth)
    with from_the_seed(case, truth):
        expected = [chunk.logits(truth, due) for chunk in chunks]
    shared = _new_cache(case, truth)
    actual = []
    with from_the_seed(case, helper, subject):
        for index, chunk in enumerate(chunks):
            # What the bridge has put into the cache may be what Hugging Face's model breaks at.
            turn = helper if (index + case.run.token_seed) % 2 else subject
            with at_work("going on with a cache") if index or turn is subject else nullcontext():
                actual.append(chunk.logits(turn, shared))
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        yield from bitwise(f"logits#{index}", wanted, got)
    yield from differing_caches(due, shared)


@check(
    "caches.returned",
    "logits_and_cache returns Hugging Face's own cache, the one that was given if one was, and "
    "none where none is wanted; fed back it goes on, one token or more at a time.",
    chunked_cases,
    examples=0.2,
)
def returned(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No cache is made here but that of the first forward."""
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    chunks = chunks_of(case, inputs(case))
    due: Any = None
    expected = []
    with from_the_seed(case, truth):
        for chunk in chunks:
            result = chunk.forward(truth, due)
            due = result.past_key_values
            expected.append(result.logits)
    cache: Any = None
    with from_the_seed(case, subject):
        for index, chunk in enumerate(chunks):
            with at_work("return_type='logits_and_cache'"):
                logits, back = chunk.forward(subject, cache, return_type="logits_and_cache")
            yield from bitwise(f"logits#{index}", expected[index], logits)
            if not isinstance(back, Cache):
                yield Gap(f"cache#{index}", "missing", f"a {type(back).__name__} was returned")
                return
            if cache is not None and back is not cache:
                yield Gap(f"cache#{index}", "contract", "is not the cache that was given")
            cache = back
        with at_work("use_cache=False"):
            asked: dict[str, Any] = {"return_type": "logits_and_cache", "use_cache": False}
            _, none = chunks[0].forward(subject, None, **asked)
    if none is not None:
        yield Gap("cache", "extra", f"use_cache=False returned a {type(none).__name__}")
    yield from differing_caches(due, cache)


Surgery = Callable[[Any, torch.Tensor, int], tuple[torch.Tensor, int]]


def _crop(cache: Any, rows: torch.Tensor, stop: int) -> tuple[torch.Tensor, int]:
    gone = 1 if stop > 1 else 0
    cache.crop(-gone)
    return rows, stop - gone


def _reorder(cache: Any, rows: torch.Tensor, stop: int) -> tuple[torch.Tensor, int]:
    beams = rows.roll(1)
    beams[-1] = beams[0]  # beams may descend from the same one
    cache.reorder_cache(beams)
    return beams, stop


def _repeat(cache: Any, rows: torch.Tensor, stop: int) -> tuple[torch.Tensor, int]:
    cache.batch_repeat_interleave(2)
    return rows.repeat_interleave(2), stop


def _select(cache: Any, rows: torch.Tensor, stop: int) -> tuple[torch.Tensor, int]:
    kept = rows[len(rows) // 2 :]
    cache.batch_select_indices(kept)
    return kept, stop


SURGERIES: tuple[Surgery, ...] = (_crop, _reorder, _repeat, _select)


def _other_rows(data: Inputs, rows: torch.Tensor) -> Inputs:
    """Some rows of all tensors, with other tokens: a cache does not remember tokens."""

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows]

    tokens = data.tokens[rows].roll(1, dims=1)
    return Inputs(tokens, of(data.attention_mask), of(data.position_ids), data.probe[rows])


@check(
    "caches.surgery",
    "A cache that is cropped, reordered, repeated or cut down by rows between two chunks goes on "
    "as Hugging Face's does.",
    chunked_cases,
    examples=0.3,
)
def surgery(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One chunk, an operation on the cache, and the rest with other tokens."""
    if case.run.chunks == 1:
        raise NotApplicable("fed at once: there is no cache between two chunks")
    data = inputs(case)
    operate = SURGERIES[case.run.token_seed % len(SURGERIES)]
    name = operate.__name__.strip("_")
    stop = chunks_of(case, data)[-1].start

    def run(who: Subject) -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=who.model.config)
        with from_the_seed(case, who):
            Chunk(data, 0, stop).logits(who, cache)
            rows, kept = operate(cache, torch.arange(case.run.batch), stop)
            rest = Chunk(_other_rows(data, rows), kept, case.run.seq_len)
            return rest.logits(who, cache), cache

    expected, due = run(reference(case.model))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with at_work(f"going on after {name}"):
        actual, cache = run(subject)
    yield from bitwise(f"logits after {name}", expected, actual)
    yield from differing_caches(due, cache)
