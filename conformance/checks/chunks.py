"""A text fed in chunks is the same text; what is hooked in one chunk is of that chunk alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache

from conformance.checks.caches import chunked_runs, chunks_of, differing_caches, from_the_seed
from conformance.checks.interventions import edited_runs
from conformance.checks.layernorm import wide_models
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, bitwise, compare_values, within
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.recorder import Observation, Recorder
from conformance.sites import Site
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.taps import TappedCache, Taps
from conformance.tolerance import of_chunks


def wide_chunked_cases() -> SearchStrategy[Case]:
    """Chunked cases of models whose rounding stays small: no few entries are normalized."""
    return cases(models=wide_models(), runs=chunked_runs)


@check(
    "chunks.whole",
    "Fed in chunks over a cache, one token a time or more, a bridge gives every real token the "
    "logits that the reference gives it in one forward, up to rounding.",
    wide_chunked_cases,
    examples=0.3,
)
def whole(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """In eval mode: each chunk draws its own dropout."""
    at_once = in_one_forward(case, training=False)
    data = inputs(case)
    expected = observe(reference(case.model), at_once, backward=False).logits
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    cache = DynamicCache(config=subject.model.config)
    with from_the_seed(at_once, subject), at_work("going on with a cache"):
        pieces = [chunk.logits(subject, cache) for chunk in chunks_of(case, data)]
    mask = data.attention_mask
    real = torch.ones_like(data.tokens, dtype=torch.bool) if mask is None else mask.bool()
    due, got = expected[real], torch.cat(pieces, dim=1)[real]
    yield from within(of_chunks(due), "logits", due, got)


def hooks_at(names: Iterable[str], recorder: Recorder) -> list[tuple[str, Any]]:
    """Hooks as `TransformerBridge.hooks` takes them.

    Each edits what the recorder edits, and shows it what is left.
    """

    def at(name: str) -> Any:
        def see(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
            left = recorder.edit(name, tensor)
            recorder.value(name, left.detach().clone())
            return None if left is tensor else left

        return see

    return [(name, at(name)) for name in names]


def tapping(truth: Subject, case: Case, sites: Mapping[str, Site], recorder: Recorder) -> Taps:
    """Taps on a reference that show the recorder each site, and edit what it edits."""
    recorder.begin(case)
    clamps, see = truth.clamps, recorder.see
    taps = Taps(
        truth.model, sites, recorder.visit, d_head=case.model.d_head, clamps=clamps, see=see
    )
    taps.cached = case.run.use_cache
    taps.editing = sites if recorder.edits_gradients else recorder.edits
    return taps


def second_chunk_cases() -> SearchStrategy[Case]:
    """Cases of three chunks, with edits."""

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        lengths = st.sampled_from((3, 3, 4, 6, 24))
        some = edited_runs(model).map(lambda run: run.edits)
        return chunked_runs(model, lengths=lengths, chunks=st.just(3), edits=some)

    return cases(runs=runs)


@check(
    "chunks.edits",
    "Hooks and edits on the second of three chunks see and change what they do on the reference: "
    "its values, those that run_with_cache keeps too, the third chunk by way of the cache, and "
    "nothing of the first.",
    second_chunk_cases,
    examples=0.35,
)
def edits(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bare, hooked everywhere, bare again."""
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    sites = sites_of(subject, case)
    first, second, third = chunks_of(case, inputs(case))

    theirs, ours = Recorder(), Recorder()
    taps = tapping(truth, case, sites, theirs)
    due = TappedCache(taps, config=truth.model.config)
    expected, seen = [], []
    with from_the_seed(case, truth), taps.attached():
        for chunk in (first, second, third):
            theirs.begin(case)
            taps.editing = theirs.edits if chunk is second else ()
            expected.append(chunk.logits(truth, due))
            seen.append(theirs.values)

    cache = DynamicCache(config=subject.model.config)
    bridge = bridge_of(subject)
    ours.begin(case)
    shown = [ours.values]
    with from_the_seed(case, subject), at_work("hooks on the second chunk"):
        actual = [first.logits(subject, cache)]
        with bridge.hooks(fwd_hooks=hooks_at(sites, ours)):
            if drawing(case)(2):
                asked = {"call": bridge.run_with_cache, "names_filter": list(sites)}
                logits, kept = second.forward(subject, cache, **asked)
                shown.append(dict(kept.items()))
            else:
                logits = second.logits(subject, cache)
        actual.append(logits)
        actual.append(third.logits(subject, cache))

    yield from bitwise("logits of the first chunk", expected[0], actual[0])
    for values in shown:
        yield from compare_values(
            Observation(expected[1], seen[1]),
            Observation(actual[1], values, fired=tuple(ours.fired)),
            sites,
        )
    yield from bitwise("logits of the third chunk", expected[2], actual[2])
    yield from differing_caches(due, cache)
