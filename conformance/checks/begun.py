"""What other checks promise, asked of bridges that are not new: in a mode, copied, used before."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from conformance.checks import (
    caching,
    calls,
    chunks,
    firing,
    flags,
    generation_hooks,
    interventions,
    layernorm,
    masks,
    modes,
    recomputed,
)
from conformance.checks.outlived import use
from conformance.checks.registry import Adapter, Check, check
from conformance.checks.support import bridge_of, copied, in_one_forward, quiet
from conformance.compare import Gap, labelled
from conformance.inputs import inputs
from conformance.spec import Case, blinds
from conformance.subjects import Subject, SubjectError, at_work, beginning, bridged

SCORES = "attn.hook_attn_scores"
# Each finds another kind of fault; together they find what the bridge does in most ways to call it.
# With the share of the profile's examples: an edit in place has much to miss.
HOSTS = {
    interventions.returned: 0.5,
    interventions.in_place: 1.3,
    firing.returned_gradients: 0.4,
    recomputed.recomputed: 0.3,
    flags.edited: 0.3,
    calls.embeddings: 0.6,
    masks.masks: 0.3,
    modes.inference: 0.3,
    chunks.edits: 0.3,
    caching.values: 1.2,
    layernorm.edited: 0.3,
    generation_hooks.hooks: 0.3,
}


def _in_compatibility_mode(subject: Subject, case: Case) -> Subject:
    with at_work("enable_compatibility_mode"):
        bridge_of(subject).enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return subject


def _copied(subject: Subject, case: Case) -> Subject:
    return copied(subject)


def _pickled(subject: Subject, case: Case) -> Subject:
    """Which a bridge may refuse, and say so (see ``copies.pickle``)."""

    def pickled(bridge: Any) -> Any:
        return pickle.loads(pickle.dumps(bridge))

    try:
        return copied(subject, by=pickled)
    except SubjectError:
        return subject


def _used(subject: Subject, case: Case) -> Subject:
    """Run in every way, backwards too, and left as if it had not been."""
    case = in_one_forward(replace(case, tokens=()), training=False, padding="none", edits=())
    use(subject, case, inputs(case))
    bridge_of(subject).zero_grad(set_to_none=True)
    return subject


def _cast(subject: Subject, case: Case) -> Subject:
    """Cast and cast back: to what holds all its numbers."""
    bridge = bridge_of(subject)
    if case.model.dtype == "float32":
        with at_work("casts to float64 and back"), quiet():
            bridge.to(torch.float64).to(torch.float32)
    return subject


def _frozen(subject: Subject, case: Case) -> Subject:
    """Frozen, run, and trained again."""
    bridge = bridge_of(subject)
    with at_work("a forward of a frozen bridge"):
        bridge.requires_grad_(False)
        bridge(inputs(replace(case, tokens=())).tokens[:1], return_type="loss")
        bridge.requires_grad_(True)
    return subject


# One after the other. The mode is in half of them: much of a bridge asks for it.
BEGINNINGS: tuple[tuple[Callable[[Subject, Case], Subject], ...], ...] = (
    *((_in_compatibility_mode,),) * 2,
    (_in_compatibility_mode, _copied),
    (_used, _in_compatibility_mode),
    (_used, _copied),
    (_pickled, _used),
    (_frozen, _cast, _used),
    (_copied, _frozen),
)


def _steps(case: Case) -> tuple[Callable[[Subject, Case], Subject], ...]:
    """What comes first in a case: the seed of the weights says so."""
    return BEGINNINGS[case.model.weight_seed % len(BEGINNINGS)]


def _masks(case: Case) -> bool:
    return _in_compatibility_mode in _steps(case)


def _sighted(case: Case) -> Case:
    """The case without what another mask makes another thing of, where compatibility mode is on.

    That is a query that sees no key, and an edit of masked scores: there they are -inf.
    """
    if not _masks(case):
        return case
    run = case.run
    edits = tuple(edit for edit in run.edits if not edit.site.endswith(SCORES))
    padding = run.padding
    if blinds(padding, run.seq_len):
        padding = "gap" if run.seq_len > 2 else "right"
    return replace(case, run=replace(run, edits=edits, padding=padding))


def _found(host: Check, adapter: Adapter, case: Case) -> tuple[list[Gap], SubjectError | None]:
    """What a check says, but for what is another matter in compatibility mode.

    Where it masks with -inf, Hugging Face has a number; and its caches have more names than sites.
    """
    try:
        gaps = list(host.run(adapter, case))
    except SubjectError as error:
        return [], error

    def other(gap: Gap) -> bool:
        return gap.kind == "order" or (gap.kind == "value" and SCORES in gap.site)

    return [gap for gap in gaps if not (_masks(case) and other(gap))], None


def _of_begun(host: Check, adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A check on a bridge that is not new. What it says of a new one as well is for it to say."""
    steps = _steps(case)
    # Originals of copies: what refers to them weakly does not depend on when they are collected.
    kept: list[Subject] = []

    def begin(subject: Subject) -> Subject:
        for step in steps:
            kept.append(subject)
            subject = step(subject, case)
        return subject

    with beginning(begin):
        gaps, error = _found(host, adapter, case)
    if not gaps and error is None:
        return
    bridged(case.model, adapter)  # one that cannot be built at all is this check's matter, too
    if any(_found(host, adapter, case)):
        return
    if error is not None:
        raise error
    told = ", ".join(step.__name__.strip("_").replace("_", " ") for step in steps)
    yield from labelled(told, gaps)


def _register(host: Check, share: float) -> Check:
    """A check of bridges that are not new."""
    return check(
        f"begun.{host.name.replace('.', '_')}",
        f"`{host.name}` holds too of bridges that are in compatibility mode, copied, unpickled, "
        "used before in every way, cast and cast back, or thawed.",
        lambda: host.cases().map(_sighted),
        examples=share,
    )(partial(_of_begun, host))


CHECKS = tuple(_register(host, share) for host, share in HOSTS.items())
