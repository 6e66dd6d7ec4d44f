"""Several hooks at one place act one after another; what they remember is theirs until cleared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint

from conformance.checks.hooking import some_sites
from conformance.checks.interventions import edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, in_one_forward
from conformance.compare import (
    Gap,
    bitwise,
    compare_gradients,
    compare_parameters,
    compare_values,
    labelled,
)
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import observe, sites_of
from conformance.points import hook_points
from conformance.recorder import Recorder
from conformance.sites import Port, fired_rows
from conformance.spec import EDITS, Case, Edit
from conformance.strategies import cases
from conformance.subjects import at_work, bridged, reference

KINDS = tuple(kind for kind in EDITS if kind not in ("identity", "replace", "in_place"))


class Chain(Recorder):
    """Performs edits of one site one after another, of its value and of its gradient."""

    edits_gradients = True

    def __init__(self, site: str, forward: list[Edit], backward: list[Edit]) -> None:
        self.site, self.chains = site, {"fwd": forward, "bwd": backward}

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that all edits of a site leave."""
        return self._edited("fwd", name, tensor)

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep, and send on, the gradient that all edits of it leave."""
        tensor = self._edited("bwd", name, tensor)
        super().gradient(name, tensor)
        return tensor if name == self.site else None

    def _edited(self, direction: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for edit in self.chains[direction] if name == self.site else ():
            tensor = edited(edit, tensor)
        return tensor


def chained_cases() -> SearchStrategy[Case]:
    """Cases with an edit of what has a gradient, outside of the LayerNorms."""
    rows = [site for site in fired_rows() if not site.derived]
    rows = [site for site in rows if site.port not in (Port.COS, Port.SIN)]
    none = ("rotary_emb.hook_in", "embed.hook_in")
    names = [site.name for site in rows if site.name not in none]
    return cases(runs=partial(edited_runs, kinds=KINDS, most=1, rows=names))


def _midway(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A hook that adds the edit later in the same forward, and takes off another one.

    Nothing else is hooked: where something is, a hook point may be at work already.
    """
    subject, (edit,) = bridged(case.model, adapter, prepared=case.run.prepared), case.run.edits
    points, draw = hook_points(subject), drawing(case)
    names = [name for name in sites_of(subject, case) if name in points]
    before = names[: names.index(edit.site)]
    behind = names[len(before) :]
    gone: Any = points[behind[draw(len(behind))]]
    calls: list[str] = []

    def perform(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return edited(edit, tensor)

    def removed(tensor: torch.Tensor, hook: HookPoint) -> None:
        calls.append(str(hook.name))

    def starter(tensor: torch.Tensor, hook: HookPoint) -> None:
        gone.remove_hooks()
        points[edit.site].add_hook(perform)

    with at_work("hooks that add and remove hooks"):
        gone.add_hook(removed)
        points[before[draw(len(before))]].add_hook(starter)
    site = {edit.site: sites_of(subject, case)[edit.site]}
    expected = observe(reference(case.model), case, sites=site)
    actual = observe(subject, case)
    yield from bitwise("logits", expected.logits, actual.logits)
    yield from compare_parameters(expected, actual)
    for name in calls:
        yield Gap(name, "count", "a hook that is removed before its turn is called")


@check(
    "hook_api.order",
    "Hooks at one place act in the order of their adding, those added with prepend=True before "
    "all others, each on what the one before has left, those with alias_names once for each: of "
    "the tensor in the forward, of the gradient in the backward. One that another hook adds or "
    "removes before its turn in the same forward is called, or is not.",
    chained_cases,
    examples=0.4,
)
def order(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three edits of a value and three of its gradient, or eight, put on in different ways."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every = sites_of(subject, case)
    plain = {name: site for name, site in every.items() if not site.derived}
    bridge: Any = subject.bridge
    (first,) = case.run.edits
    point: Any = hook_points(subject)[first.site]
    draw = torch.Generator().manual_seed(first.seed)
    chains: dict[str, list[Edit]] = {"fwd": [], "bwd": []}
    with ExitStack() as stack:
        for step in range(6 if first.seed % 4 else 16):
            direction = ("fwd", "bwd")[step % 2]
            kind = KINDS[int(torch.randint(len(KINDS), (), generator=draw))]
            edit = first if step < 2 else Edit(site=first.site, kind=kind, seed=first.seed + step)

            def hook(tensor: torch.Tensor, hook: HookPoint, edit: Edit = edit) -> torch.Tensor:
                return edited(edit, tensor)

            way, times = int(torch.randint(4, (), generator=draw)), 1
            with at_work("putting a hook on"):
                if way == 0:
                    point.add_hook(hook, direction, prepend=True)
                elif way == 1:
                    bridge.add_hook((*every[first.site].aliases, first.site)[0], hook, direction)
                elif way == 2:
                    hooks = {f"{direction}_hooks": [(first.site, hook)]}
                    stack.enter_context(bridge.hooks(**hooks))
                else:  # called once under each name
                    point.add_hook(hook, direction, alias_names=["one", "other"])
                    times = 2
            at = 0 if way == 0 else len(chains[direction])
            chains[direction][at:at] = [edit] * times
        chained = Chain(first.site, chains["fwd"], chains["bwd"])
        expected = observe(reference(case.model), case, sites=every, recorder=chained)
        # The hooks are on already: this recorder's own only look.
        bare = replace(case, run=replace(case.run, edits=()))
        actual = observe(subject, bare, sites=plain)
    yield from compare_values(expected, actual, every)
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)
    if drawing(case)(2):
        yield from labelled("midway", _midway(adapter, case))


@check(
    "hook_api.contexts",
    "What a hook keeps in hook.ctx is there in the next forward, and is gone from the hook points "
    "that a call with clear_contexts=True has touched, or from all after clear_contexts() or "
    "reset_hooks(), and from no others.",
    cases,
    examples=0.1,
)
def contexts(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One site that is touched and one that is not, through each of the calls."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge: Any = subject.bridge
    points, tokens = hook_points(subject), inputs(case).tokens
    (site, names), (other, _) = some_sites(subject, case, 2).items()

    def count(tensor: torch.Tensor, hook: HookPoint) -> None:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    def within(**named: bool) -> None:
        with bridge.hooks(fwd_hooks=[(names[-1], count)], **named):
            bridge(tokens)

    def passing(**named: bool) -> None:
        bridge.run_with_hooks(tokens, fwd_hooks=[(names[-1], count)], **named)

    def caching(**named: bool) -> None:
        points[site].add_hook(count)
        bridge.run_with_cache(tokens, names_filter=names[-1], **named)
        points[site].remove_hooks()

    with at_work("clear_contexts"):
        clear = (bridge.reset_hooks, bridge.clear_contexts)[case.run.token_seed % 2]
    for call in (within, passing, caching):
        points[other].ctx["calls"] = 7
        steps: list[tuple[str, Callable[[], object], object]] = [
            ("once", call, (1, 7)),
            ("twice", call, (2, 7)),
            ("clear_contexts=True", partial(call, clear_contexts=True), (None, 7)),
            ("once more", call, (1, 7)),
            ("no clearing", partial(bridge.reset_hooks, clear_contexts=False), (1, 7)),
            (clear.__name__, clear, (None, None)),
        ]
        for what, step, due in steps:
            with at_work(f"hook.ctx in {call.__name__}"):
                step()
            kept = tuple(points[at].ctx.get("calls") for at in (site, other))
            if kept != due:
                detail = f"{call.__name__}, {what}: it and {other} keep {kept} instead of {due}"
                yield Gap(site, "contract", detail)
                return
