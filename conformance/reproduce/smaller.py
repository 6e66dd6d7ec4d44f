"""A smaller case that shows the same: what a script need not say is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from conformance.sites import sites
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.verdict import Verdict

Judge = Callable[[Case], Verdict]
Same = Callable[[Verdict], bool]

_PLAIN_RUN = ("chunks", "batch", "padding", "positions", "training", "prepared", "use_cache")
_PLAIN_MODEL = (
    *("num_hidden_layers", "rope_type", "rope_theta", "hidden_act", "tie_word_embeddings"),
    *("attention_dropout", "clip_qkv", "biases", "pad_token_id"),
)


def _kind(verdict: Verdict) -> str:
    """What is wrong, whichever the block and the numbers."""
    if not verdict.gaps:
        return re.sub(r"\d+", "#", verdict.reason)
    return re.sub(r"\d+", "#", f"{verdict.gaps[0].site}: {verdict.gaps[0].kind}")


def as_before(verdict: Verdict) -> Same:
    """Whether another verdict begins with the same disagreement."""
    kind = _kind(verdict)
    return lambda other: other.bad and _kind(other) == kind


def _changes(case: Case) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """One thing less, or shorter: fields of the model and of the run. Not each makes a case."""
    model, run = case.model, case.run
    for at in range(len(run.edits) if len(run.edits) > 1 else 0):
        yield {}, {"edits": run.edits[:at] + run.edits[at + 1 :]}
    for name in _PLAIN_RUN:
        if (usual := getattr(RunSpec(), name)) != getattr(run, name):
            yield {}, {name: usual}
    for length in (1, 2, 4, run.seq_len // 2):
        if 0 < length < run.seq_len:
            yield {}, {"seq_len": length, "chunks": min(run.chunks, length)}
    for name in _PLAIN_MODEL:
        if (usual := getattr(ModelSpec(), name)) != getattr(model, name):
            yield {name: usual}, {}


def _first(case: Case, judge: Judge, same: Same) -> Verdict | None:
    """The verdict on the first smaller case that shows the same."""
    for model, run in _changes(case):
        # A field may not fit the others, and a check may count on what its own cases always have.
        with suppress(Exception):
            changed = Case(model=replace(case.model, **model), run=replace(case.run, **run))
            edited = {edit.site for edit in changed.run.edits}
            if edited <= sites(changed.model).keys() and same(judged := judge(changed)):
                return judged
    return None


def smaller(verdict: Verdict, judge: Judge, same: Same) -> Verdict:
    """The verdict on the smallest case that is found by leaving out one thing after the other.

    Args:
        verdict: On a case.
        judge: Judges another.
        same: Whether it shows what the first one does.
    """
    while verdict.case is not None:
        found = _first(verdict.case, judge, same)
        if found is None:
            break
        verdict = found
    return verdict
