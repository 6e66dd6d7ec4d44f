"""What run_with_cache keeps: which names, which positions, where, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache

from conformance.checks.gates import FORKS, OTHERS
from conformance.checks.hooking import (
    attached,
    changes,
    picking,
    run_cached,
    run_with_cache,
    settle,
    value_gaps,
)
from conformance.checks.interventions import edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    drawing,
    exact_gaps,
    freeze_some,
    in_one_forward,
    quiet,
    some_positions,
    turn,
)
from conformance.compare import Gap, compare_tensors
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.points import hook_points
from conformance.sites import Site, behind_flags
from conformance.spec import Case, Edit
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly


@dataclass(frozen=True)
class _Wish:
    """One way of asking for a cache.

    Attributes:
        named: Keyword arguments of run_with_cache.
        names: The names asked for.
        positions: The positions that ``pos_slice`` picks.
    """

    named: Mapping[str, Any]
    names: Collection[str]
    positions: Collection[int]


def _some_names(
    every: Mapping[str, Site], draw: Callable[[int], int]
) -> tuple[Any, Collection[str]]:
    """A names_filter, and the names that it asks for."""
    known = [name for site in every.values() for name in (site.name, *site.aliases)]
    aliases = [name for name in known if name not in every]
    picked = list(dict.fromkeys(known[draw(len(known))] for _ in range(5)))
    ending = "." + known[draw(len(known))].rpartition(".")[2]
    ended = [name for name in known if name.endswith(ending)]
    alias = aliases[draw(len(aliases))]
    site = list(every)[draw(len(every))]
    filters: list[tuple[Any, Collection[str]]] = [
        ([], []),
        (None, known),
        (site, [site]),
        (alias, [alias]),
        (picked, picked),
        (lambda name: name in picked, picked),
        (lambda name: name.endswith(ending), ended),
    ]
    return filters[draw(len(filters))]


def _wish(case: Case, every: Mapping[str, Site]) -> _Wish:
    draw = drawing(case)
    names_filter, names = _some_names(every, draw)
    pos_slice, positions = some_positions(case.run.seq_len, draw)
    named = {
        "names_filter": names_filter,
        "pos_slice": pos_slice,
        "device": (None, "cpu", torch.device("meta"))[draw(3)],
        "remove_batch_dim": case.run.batch == 1 and bool(draw(2)),
        "return_cache_object": bool(draw(2)),
    }
    return _Wish(named, names, positions)


def _toggled(cache: Any) -> Iterator[Gap]:
    """What is wrong of a cache's switch of autograd, which afterwards is as it was."""
    before = torch.is_grad_enabled()
    try:
        for mode in (False, True):
            with quiet(), at_work("toggle_autodiff"):
                cache.toggle_autodiff(mode)
            if torch.is_grad_enabled() is not mode:
                yield Gap("toggle_autodiff", "contract", f"{mode} switches autograd to {not mode}")
    finally:
        torch.set_grad_enabled(before)


@check(
    "caching.values",
    "run_with_cache keeps just the names asked for (by a string, list or filter, canonical or "
    "alias), in the order of firing, each with the reference's tensor at the positions, behind "
    "flags too, on the device and in the shape asked for, moved there again or not, and changes "
    "neither the logits nor the bridge.",
    cases,
    examples=0.7,
)
def values(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One drawn combination of what run_with_cache can be asked for."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every, backward=False)
    wish = _wish(case, every)
    settle(subject, case)
    before = attached(subject)
    logits, cache = run_with_cache(subject, case, inputs(case).tokens, **wish.named)
    yield from changes(before, attached(subject), "after run_with_cache")
    if wish.named["return_cache_object"]:
        with quiet(), at_work("cache.to"):
            cache = cache.to(wish.named["device"] or "cpu")
    batched = getattr(cache, "has_batch_dim", None)
    if batched is wish.named["remove_batch_dim"]:  # None of a dict
        yield Gap("has_batch_dim", "contract", f"is {batched}, whatever the tensors have")
    if wish.named["return_cache_object"]:
        yield from _toggled(cache)
    gap = compare_tensors(
        "logits", expected.logits, logits.detach(), exactly(expected.logits.dtype)
    )
    yield from [gap] if gap else []
    owner = {name: site for site in every.values() for name in (site.name, *site.aliases)}
    asked = {owner[name].name for name in wish.names}
    device = torch.device(wish.named["device"] or "cpu")
    if any(parameter.device.type != "cpu" for parameter in subject.parameters.values()):
        yield Gap("parameters", "contract", f"moved, as only the cache should be, to {device}")

    def view(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
        pick = picking(site, wish.positions, batchless=wish.named["remove_batch_dim"])
        return lambda tensor: pick(tensor).to(device)

    order = [name for name in cache if name in every]
    if order != (fired := [name for name in every if name in order]):
        yield Gap("cache", "order", f"{order} instead of {fired}")
    for name in sorted(set(wish.names) - cache.keys()):
        yield Gap(name, "missing", "not in the cache, though asked for")
    for name, tensor in cache.items():
        site = owner.get(name)
        if site is None or site.name not in asked:
            yield Gap(name, "extra", "in the cache, though not asked for")
            continue
        if tensor.requires_grad or tensor.device != device:
            yield Gap(name, "contract", f"on {tensor.device}, {tensor.requires_grad=}")
        elif device.type == "cpu":
            yield from value_gaps(name, site, expected, tensor, view(site))
        elif tensor.shape != (due := view(site)(expected.values[site.name])).shape:
            yield Gap(name, "shape", f"{list(tensor.shape)} instead of {list(due.shape)}")
    if wish.named["pos_slice"] is not None and case.run.token_seed % 3 == 0:
        yield from _behind_flags(subject, case, wish)


def _behind_flags(subject: Subject, case: Case, wish: _Wish) -> Iterator[Gap]:
    """What the positions picked of hooks behind flags are, beside what is kept without picking."""
    draw = drawing(case)
    flags = (*FORKS[1 + draw(len(FORKS) - 1)], *OTHERS[draw(len(OTHERS))])
    rows = behind_flags(case.model, flags)
    turn(subject, flags, True)
    asked: dict[str, Any] = {"names_filter": list(rows)}
    _, whole = run_with_cache(subject, case, inputs(case).tokens, **asked)
    asked["pos_slice"] = wish.named["pos_slice"]
    _, picked = run_with_cache(subject, case, inputs(case).tokens, **asked)
    due, got = {}, {}
    for name, site in rows.items():
        pick = picking(site, wish.positions, batchless=False)
        if name in whole:  # what is silent is for `flags.hooks` to say
            due[f"{name}, sliced"] = pick(whole[name])
        if name in picked:
            got[f"{name}, sliced"] = picked[name]
    yield from exact_gaps(due, got)


def changed_cases() -> SearchStrategy[Case]:
    """Cases with one edit in place, half of which let a gradient flow and drop the edit."""
    return cases(runs=partial(edited_runs, kinds=("in_place",), most=1))


def _disturb(
    subject: Subject, case: Case, logits: torch.Tensor, tokens: torch.Tensor, kept: DynamicCache
) -> None:
    """Rewrite in place all that a forward has used, and run others that rewrite all they use."""
    bridge = subject.bridge
    assert bridge is not None

    def halve(tensor: torch.Tensor, hook: HookPoint) -> None:
        if tensor.is_floating_point():
            tensor.mul_(0.5)

    with at_work("later forwards"), torch.no_grad():
        logits.clamp_(-0.01, 0.01)
        tokens.zero_()
        with bridge.hooks(fwd_hooks=[(lambda name: True, halve)]):
            bridge(tokens, return_type="logits")
        for parameter in subject.parameters.values():
            parameter.mul_(2)
        bridge(tokens, return_type="logits")
        if kept.get_seq_length() and case.run.padding == "none":
            bridge(tokens[:, :1], return_type="logits", past_key_values=kept, use_cache=True)


@check(
    "caching.unchanging",
    "What run_with_cache has kept does not change afterwards: not by an edit in place at another "
    "hook, a backward, a later forward with or without the key-value cache, new weights, or what "
    "the caller does to tokens and logits in place.",
    changed_cases,
    examples=0.5,
)
def unchanging(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """An edit in place is performed without a gradient: PyTorch refuses most under one.

    Of those that are frozen gradient mode stays on.
    """
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    frozen = freeze_some(subject, drawing(case))
    backward = bool(case.run.token_seed % 2) and not frozen
    edits = () if backward else case.run.edits
    case = replace(case, run=replace(case.run, edits=edits))
    every, data = sites_of(subject, case), inputs(case)
    expected = observe(reference(case.model), case, sites=every, backward=False)
    for edit in edits:

        def in_place(tensor: torch.Tensor, hook: HookPoint, edit: Edit = edit) -> None:
            tensor.copy_(edited(edit, tensor))

        hook_points(subject)[edit.site].add_hook(in_place)
    tokens, kept = data.tokens.clone(), DynamicCache(config=subject.model.config)
    named: dict[str, Any] = {"names_filter": lambda name: name in every}
    if case.run.use_cache:
        named["past_key_values"] = kept
    with torch.set_grad_enabled(backward or frozen):
        logits, cache = run_cached(subject, case, tokens, **named)
    with at_work("a backward"):
        if backward:
            logits.backward(data.probe.to(logits.dtype))  # type: ignore[no-untyped-call]
    _disturb(subject, case, logits, tokens, kept)
    for name, site in every.items():
        if name not in cache:
            yield Gap(name, "missing", "not in the cache")
        else:
            yield from value_gaps(name, site, expected, cache[name])
