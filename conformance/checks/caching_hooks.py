"""Caches that are filled by hooks which somebody puts on: get_caching_hooks and what uses it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from conformance.checks.hooking import attached, changes, gradient_gaps, settle, value_gaps
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    drawing,
    in_one_forward,
    sites_to_hook,
    some_positions,
)
from conformance.compare import Gap
from conformance.inputs import inputs
from conformance.observe import observe, options, started
from conformance.recorder import Observation
from conformance.sites import Port, Site
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import at_work, bridged, reference


def _view(tensor: torch.Tensor, site: Site, positions: Collection[int]) -> torch.Tensor:
    """A site's tensor at some positions: queries of ``[batch, head, query, key]``."""
    dim = 2 if site.port in (Port.SCORES, Port.PATTERN) else 1
    return tensor.index_select(dim, torch.tensor(list(positions), dtype=torch.long))


def _at(seen: Observation, owner: Mapping[str, Site], positions: Collection[int]) -> Observation:
    """What was seen, at some positions."""
    sites = {site.name: site for site in owner.values()}

    def cut(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: _view(each, sites[name], positions) for name, each in tensors.items()}

    return replace(seen, values=cut(seen.values), gradients=cut(seen.gradients))


def _asked(names: list[str], draw: Callable[[int], int]) -> tuple[Any, list[str]]:
    """A names_filter, and the names that it asks for."""
    picked = list(dict.fromkeys(names[draw(len(names))] for _ in range(4)))
    filters: list[tuple[Any, list[str]]] = [
        (picked, picked),
        (lambda name: name in picked, picked),
        (picked[0], picked[:1]),
    ]
    return filters[draw(3)]


@check(
    "caching.hooks",
    "get_caching_hooks, add_caching_hooks, cache_some and cache_all keep, in the dict that they "
    "are given, the names asked for, canonical ones beside aliases, each with the reference's "
    "value and gradient, at the positions asked for, and are gone after the context or "
    "reset_hooks().",
    cases,
    examples=0.2,
)
def caching_hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One of the ways; gradients by their hooks, none of them inside of a LayerNorm."""
    case, draw = in_one_forward(case), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge: Any = bridge_of(subject)
    sites = sites_to_hook(subject, case)
    expected = observe(reference(case.model), case, sites=sites)
    owner = {name: site for site in sites.values() for name in (site.name, *site.aliases)}
    names_filter, names = _asked(list(owner), draw)
    kept: dict[str, torch.Tensor] = {}
    positions: Collection[int] = range(case.run.seq_len)
    settle(subject, case)
    before, way = attached(subject), draw(3)
    whole = way == 2 and hasattr(bridge, "cache_all") and bool(draw(2))
    forward: list[Any] = []
    backward: list[Any] = []
    with at_work("putting caching hooks on"):
        if way == 0:
            pos_slice, positions = some_positions(case.run.seq_len, draw)
            given, forward, backward = bridge.get_caching_hooks(
                names_filter, incl_bwd=True, cache=kept, pos_slice=pos_slice
            )
        elif way == 1:
            given = bridge.add_caching_hooks(names_filter, incl_bwd=True, cache=kept)
        elif whole:
            names, given = list(sites), kept
            bridge.cache_all(kept, incl_bwd=True)
        else:
            bridge.cache_some(kept, lambda name: name in names, incl_bwd=True)
            given = kept
    if given is not kept:
        yield Gap("cache", "contract", "is another dict than the one that was given")
    data = inputs(case)
    with at_work("a run that is cached"), bridge.hooks(fwd_hooks=forward, bwd_hooks=backward):
        with started(subject, case):
            logits = bridge(data.tokens, return_type="logits", **options(subject, case))
        logits.backward(data.probe.to(logits.dtype))
    bridge.reset_hooks()
    yield from changes(before, attached(subject), "afterwards")
    seen = _at(expected, owner, positions)
    due = dict.fromkeys(each for name in names for each in (name, owner[name].name))
    wanted = {*due, *(f"{name}_grad" for name in due if owner[name].name in seen.gradients)}
    # All is more than what is judged here.
    kept_too = wanted & given.keys() if whole else given.keys()
    for name in sorted(wanted ^ kept_too):
        kind = "missing" if name in wanted else "extra"
        yield Gap(name, kind, "asked for, or in the cache, and not both")
    for name in sorted(wanted & given.keys()):
        site = owner[name.removesuffix("_grad")]
        gaps = gradient_gaps if name.endswith("_grad") else value_gaps
        yield from gaps(name, site, seen, given[name])
