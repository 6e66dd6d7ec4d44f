"""When hooks fire: once, in order, under any of their names, and backwards in reverse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from hypothesis.strategies import SearchStrategy

from conformance.checks.hooking import (
    WAYS,
    Log,
    Pairs,
    gradient_gaps,
    run_hooked,
    value_gaps,
)
from conformance.checks.interventions import deep_cases, edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import in_one_forward
from conformance.compare import (
    Gap,
    compare_firing,
    compare_gradients,
    compare_parameters,
    labelled,
)
from conformance.edits import edited
from conformance.observe import observe, sites_of
from conformance.recorder import Observation, Recorder
from conformance.sites import Port, Site, fired_rows
from conformance.spec import EDITS, Case, Edit
from conformance.strategies import cases
from conformance.subjects import at_work, bridged, reference


def _heard(
    name: str, site: Site, log: Log, expected: Observation, *, backward: bool, compatible: bool
) -> Iterator[Gap]:
    """The gaps of one function, put at a site under one of its names."""
    label = f"{name} backwards" if backward else name
    told, tensors = log.told[label], log.tensors[label]
    known = expected.gradients if backward else expected.values
    if len(tensors) != (site.name in known):
        kind = "count" if tensors else "missing"
        yield Gap(label, kind, f"called {len(tensors)} times instead of {int(site.name in known)}")
        return
    for said, tensor in zip(told, tensors, strict=True):
        if said not in ((site.name, *site.aliases) if compatible else (site.name,)):
            yield Gap(label, "contract", f"the function was told that it is at {said}")
        # Compatibility mode masks with -inf, where Hugging Face takes the lowest number.
        if not (compatible and site.port is Port.SCORES):
            yield from (gradient_gaps if backward else value_gaps)(label, site, expected, tensor)


@check(
    "firing.names",
    "A function put on a hook by any of its names, or by a filter of names, through add_hook, "
    "hooks() or run_with_hooks, is called once a forward or backward, in order, with the site's "
    "tensor or gradient and its canonical name.",
    cases,
    examples=0.4,
)
def names(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A function for each name, and one for all of them: a filter that matches every name.

    Every fourth bridge is in compatibility mode, where a hook may go by any of its names.
    """
    case = in_one_forward(case)
    compatible = case.run.token_seed % 4 == 3
    if compatible:  # it has an own idea of what a query sees that sees no key
        case = replace(case, run=replace(case.run, padding="none"))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    wanted = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=wanted)
    draw, log = case.run.token_seed, Log()
    asked = {name: site for site in wanted.values() for name in (site.name, *site.aliases)}
    # Backward hooks on the LayerNorms' derived sites have a check of their own.
    plain = {name: site for name, site in asked.items() if not site.derived}

    def pairs(names: dict[str, Site], ending: str) -> dict[str, Pairs]:
        found: dict[str, Pairs] = {way: [] for way in WAYS}
        for turn, name in enumerate(names, draw):
            by_name = turn // len(WAYS) % 2
            ask = name if by_name else (lambda other, name=name: other == name)
            found[WAYS[turn % len(WAYS)]].append((ask, log.listener(name + ending)))
        return found

    forward, backward = pairs(asked, ""), pairs(plain, " backwards")
    sweep, sweep_back = Log(), Log()
    way = WAYS[draw % len(WAYS)]
    forward[way].append((lambda name: True, sweep.listener("")))
    backward[way].append((lambda name: name in plain, sweep_back.listener("")))
    with at_work("enable_compatibility_mode"):
        if compatible:
            assert subject.bridge is not None
            subject.bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    run_hooked(subject, case, forward, backward)

    def canonical(told: list[str]) -> list[str]:
        return [asked[name].name if compatible and name in asked else name for name in told]

    yield from compare_firing(wanted, canonical(sweep.told[""]))
    due = [name for name in reversed(wanted) if name in plain and name in expected.gradients]
    yield from compare_firing(due, canonical(sweep_back.told[""]))
    for name, site in asked.items():
        yield from _heard(name, site, log, expected, backward=False, compatible=compatible)
    for name, site in plain.items():
        yield from _heard(name, site, log, expected, backward=True, compatible=compatible)


@check(
    "firing.reverse",
    "Backward hooks fire in exactly the reverse of the order in which forward hooks fire, those "
    "inside the LayerNorms included.",
    cases,
    examples=0.4,
)
def reverse(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every node of the graph has its turn by the time of its making: measured, see the reference.

    The taps of the reference fire in the reverse of their own order too, on every case.
    """
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every)
    # Upstream's bridge breaks under a backward hook inside a LayerNorm: half the cases have none.
    inside = case.run.token_seed % 2
    wanted = {name: site for name, site in every.items() if inside or not site.derived}
    actual = observe(subject, case, sites=wanted)
    due = [name for name in reversed(wanted) if name in expected.gradients]
    yield from compare_firing(wanted, [name for name in actual.fired if name in wanted])
    yield from compare_firing(due, actual.fired_backward)


class _Editor(Recorder):
    """Performs the run's edits on gradients, of values that most cases have scaled before."""

    edits_gradients = True

    def begin(self, case: Case) -> None:
        """Sort the run's edits."""
        super().begin(case)
        self.gradient_edits = self.edits
        self.overwrites = {
            at: bool(edit.seed % 2) for at, edit in self.edits.items() if edit.kind == "in_place"
        }
        scaled = case.run.token_seed % 3 != 1
        self.wraps = case.run.token_seed // 3 % 3 == 0
        self.unnoticed = bool(case.run.token_seed // 9 % 2)
        self.edits = {at: Edit(site=at) for at in self.edits if scaled}

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a gradient as it comes, and send on an edited one."""
        super().gradient(name, tensor)
        edit = self.gradient_edits.get(name)
        return None if edit is None else edited(edit, tensor)


def gradient_edits() -> SearchStrategy[Case]:
    """Cases with one or two edits of what has a gradient, often of one that is another's too."""
    rows = [site.name for site in fired_rows() if site.port not in (Port.COS, Port.SIN)]
    rows = [name for name in rows if not name.startswith(("rotary_emb", "embed.hook_in"))]
    # What is added to the residual stream has its gradient: the very tensor.
    added = [f"blocks.{{i}}.{part}.hook_out" for part in ("attn.o", "attn", "mlp.out", "mlp")]
    kinds = (*EDITS, *("in_place",) * (len(EDITS) - 2))
    inner = [name for name in rows if "{i}" in name]
    return deep_cases(partial(edited_runs, kinds=kinds, rows=rows + 3 * added), rows=inner, of=6)


@check(
    "firing.returned_gradients",
    "A gradient that a backward hook returns, or leaves in place of the one that it was given (be "
    "it through .data), takes its place: what flows on, to every earlier site and every "
    "parameter, is what flows on from such a change on the reference, also through an edit of the "
    "value there.",
    gradient_edits,
    examples=0.5,
)
def returned_gradients(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Edits of one or two gradients, against a tensor hook that returns them on the reference."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    edits = {edit.site for edit in case.run.edits}
    wanted = {name: site for name, site in every.items() if not site.derived or name in edits}
    expected = observe(reference(case.model), case, sites=every, recorder=_Editor())
    editor = _Editor()
    actual = observe(subject, case, sites=wanted, recorder=editor)
    label = "through an edit of the value" if editor.edits else "of the value as it is"
    yield from labelled(label, compare_gradients(expected, actual, wanted))
    yield from labelled(label, compare_parameters(expected, actual))
