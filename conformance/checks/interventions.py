"""Edits: a hook that changes a tensor has the effect that the same change has on the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, freeze_some
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_values,
)
from conformance.observe import observe, sites_of
from conformance.recorder import Recorder
from conformance.sites import POST_CLIP, fired_rows
from conformance.spec import EDITS, Case, Edit, ModelSpec, RunSpec
from conformance.strategies import (
    EDIT_SEEDS,
    cases,
    clip_present,
    edits,
    model_specs,
    run_specs,
)
from conformance.subjects import bridged, reference
from conformance.verdict import NotApplicable

_RETURNED = tuple(kind for kind in EDITS if kind != "in_place")
# What RoPE makes and reads is edited more often than the rest: more can go wrong with an edit there
# than with others, by a layout of its own, by grouped heads, and by cosines handed to every block.
_ROTARY = ("hook_rot_q", "hook_rot_k", "attn.hook_cos", "attn.hook_sin")
_ROWS = tuple(
    name
    for name in (site.name for site in fired_rows())
    for _ in range(3 if name.endswith(_ROTARY) else 1)
)


def _named(model: ModelSpec, rows: Sequence[str]) -> SearchStrategy[str]:
    """Sites of the given rows: the row first, so that each is met as often in a deep model."""
    blocks = st.sampled_from(range(model.num_hidden_layers))
    return st.builds(lambda row, i: row.replace("{i}", str(i)), st.sampled_from(rows), blocks)


def edited_runs(
    model: ModelSpec,
    *,
    kinds: tuple[str, ...] = _RETURNED,
    most: int = 2,
    rows: Sequence[str] = (),
) -> SearchStrategy[RunSpec]:
    """Runs with one edit or several, each at another site of the model.

    Args:
        model: The model, whose sites are edited.
        kinds: Kinds of edits.
        most: Greatest number of edits at once.
        rows: Rows of the table that are edited; all that fire in a plain forward if empty.
    """
    names = _named(model, rows or _ROWS)
    each = edits(sites=names, kinds=st.sampled_from(kinds))
    some = st.lists(each, min_size=1, max_size=most, unique_by=lambda edit: edit.site)
    return run_specs(model, edits=some.map(tuple))


def edited_cases() -> SearchStrategy[Case]:
    """Cases with one to four edits that return a tensor."""
    return cases(runs=lambda model: edited_runs(model, most=4))


# Of what all sites of a block can bear at once: nothing that leaves nothing for the next to change.
BEARABLE = ("scale", "noise", "one_head", "one_position")
_SHALLOW, _DEEP = (1, 1, 1, 2, 2, 2, 3), (5, 5, 11)
_INNER = tuple(dict.fromkeys(row for row in _ROWS if "{i}" in row))


def block_edits(
    blocks: Sequence[int], kinds: tuple[str, ...], rows: Collection[str] = _INNER
) -> SearchStrategy[tuple[Edit, ...]]:
    """Edits of one kind, at every site of one block.

    Args:
        blocks: Indices of blocks.
        kinds: Kinds of edits.
        rows: Rows of the table that are edited there.
    """

    def everywhere(block: int, kind: str, seed: int) -> tuple[Edit, ...]:
        sites = (row.replace("{i}", str(block)) for row in rows)
        return tuple(Edit(site=site, kind=kind, seed=seed + at) for at, site in enumerate(sites))

    return st.builds(everywhere, st.sampled_from(blocks), st.sampled_from(kinds), EDIT_SEEDS)


def deep_cases(
    shallow: Callable[[ModelSpec], SearchStrategy[RunSpec]],
    *,
    kinds: tuple[str, ...] = BEARABLE,
    rows: Collection[str] = _INNER,
    of: int = 22,
) -> SearchStrategy[Case]:
    """Cases of which some have a deep model, with an edit at every site of a block far up.

    Args:
        shallow: The runs of all other models.
        kinds: Kinds of edits far up.
        rows: Rows of the table that are edited there.
        of: Of so many cases one is deep.
    """
    times = round((of - 1) * len(_DEEP) / len(_SHALLOW))

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        if model.num_hidden_layers < 4:
            return shallow(model)
        some = block_edits(range(3, model.num_hidden_layers), kinds, rows)
        return run_specs(model, edits=some, lengths=st.integers(1, 5), batches=st.integers(1, 2))

    return cases(models=model_specs(layers=st.sampled_from((*_SHALLOW * times, *_DEEP))), runs=runs)


def returned_cases() -> SearchStrategy[Case]:
    """As `edited_cases`, some deep."""
    return deep_cases(partial(edited_runs, most=4))


def in_place_cases() -> SearchStrategy[Case]:
    """Cases with edits that change the tensor where it lies, some deep."""
    return deep_cases(partial(edited_runs, kinds=("in_place",), most=4), kinds=("in_place",))


@check(
    "interventions.returned",
    "An edit that a hook returns, at any site, has on every later value, on the logits and on "
    "every gradient the effect that it has where Hugging Face computes the tensor.",
    returned_cases,
    examples=2.0,
)
def returned(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Up to four edits, or a block full; backward hooks on all but the derived sites."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    plain = {name: site for name, site in every.items() if not site.derived}
    expected = observe(reference(case.model), case, sites=every)
    actual = observe(subject, case, sites=plain)
    yield from compare_values(expected, actual, every)
    if case.run.chunks == 1:
        yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


@check(
    "interventions.in_place",
    "An edit in place, at any site, has the effect of the same edit returned: it reaches what "
    "reads that hook's tensor and nothing else.",
    in_place_cases,
)
def in_place(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Without a gradient, or frozen, since PyTorch refuses most of these under one."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    freeze_some(subject, drawing(case))
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every, backward=False)
    actual = observe(subject, case, sites=every, backward=False)
    yield from compare_values(expected, actual, every)


class _Patching(Recorder):
    """Puts tensors of another run in the place of those of this one, where the run has edits."""

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        self._sources = sources

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The other run's tensor."""
        return self._sources[self.key(name)] if name in self.edits else tensor


def patched_cases() -> SearchStrategy[Case]:
    """Cases with one or two sites whose tensors are replaced."""
    return cases(runs=lambda model: edited_runs(model, kinds=("replace",)))


@check(
    "interventions.patching",
    "A tensor that was cached in a run on other tokens, returned at its site, has the effect of "
    "Hugging Face's own tensor of that run in that place; no gradient flows past it.",
    patched_cases,
    examples=0.5,
)
def patching(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Activation patching: two runs of each subject, each patched with what it showed itself."""
    run = case.run
    other = replace(case, run=replace(run, token_seed=run.token_seed ^ 1, edits=()))
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=run.prepared)
    every = sites_of(subject, case)
    plain = {name: site for name, site in every.items() if not site.derived}
    due = observe(truth, other, sites=every, backward=False).values
    own = observe(subject, other, sites=every, backward=False).values
    expected = observe(truth, case, sites=every, recorder=_Patching(due))
    actual = observe(subject, case, sites=plain, recorder=_Patching(own))
    yield from compare_values(expected, actual, every)
    if run.chunks == 1:
        yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


def clipped_edits() -> SearchStrategy[Case]:
    """Cases with one edit at a post-clip hook, which only some adapters have."""
    # Not a replacement: the reference's clamp is in place, and keeps a gradient of zeros there.
    kinds = st.sampled_from([kind for kind in _RETURNED if kind != "replace"])

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        one = edits(sites=_named(model, POST_CLIP), kinds=kinds)
        return run_specs(model, edits=st.tuples(one))

    return cases(models=model_specs(clips=clip_present()), runs=runs)


@check(
    "interventions.clipped",
    "An edit after the clamp has the effect of changing what attention uses, and is not clamped.",
    clipped_edits,
    examples=0.45,
)
def clipped(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """At the hooks that an adapter declares beyond the required ones."""
    if not set(POST_CLIP) <= set(getattr(adapter, "optional_hooks", ())):
        raise NotApplicable("the adapter declares no post-clip hooks")
    yield from returned.run(adapter, case)
