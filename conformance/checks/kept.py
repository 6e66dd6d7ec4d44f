"""What a hook may do besides to edit: keep its tensor, and run the model itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint

from conformance.checks.forked import is_exact
from conformance.checks.gates import FORKS
from conformance.checks.hooking import value_gaps
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    drawing,
    exact_gaps,
    in_one_forward,
    sites_to_hook,
    turn,
)
from conformance.compare import Gap, bitwise, labelled
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.points import hook_points
from conformance.sites import behind_flags
from conformance.spec import Case
from conformance.strategies import cases, legal_flags, run_specs
from conformance.subjects import at_work, bridged, reference


@check(
    "hook_api.kept",
    "A tensor that a hook keeps stays what it was when the caller writes to the output or to the "
    "tokens in place, also when the hook removes itself and when the run stops at a layer.",
    cases,
    examples=0.25,
)
def kept(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every site's, with no copy of ours, in one run without a gradient."""
    case, draw = in_one_forward(case), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    sites = sites_to_hook(subject, case)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every, backward=False)
    stop, once = (None, draw(case.model.num_hidden_layers))[draw(2)], bool(draw(2))
    seen: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = tensor
        if once:
            hook.remove_hooks("fwd")

    points = hook_points(subject)
    for name in sites:
        points[name].add_hook(keep)
    tokens = inputs(case).tokens.clone()
    given = {"return_type": "logits", "stop_at_layer": stop, **options(subject, case)}
    with at_work("a hooked forward"), torch.no_grad(), started(subject, case):
        output = bridge_of(subject)(tokens, **given)
    output.zero_()
    tokens.zero_()
    for name, tensor in seen.items():
        yield from value_gaps(name, sites[name], expected, tensor)


def _mostly_forks() -> SearchStrategy[tuple[str, ...]]:
    """Flags of a bridge; in most cases one that copies what heads read, and no other."""
    forks = st.sampled_from(FORKS[1:])
    return st.one_of(legal_flags(), forks, forks, forks)


class _Beside:
    """A second thread: from where a hook starts it up to where it waits; then on, at the end."""

    def __init__(self) -> None:
        self.arrived, self.leave = threading.Event(), threading.Event()
        self.work: list[Future[None]] = []
        self.threads: set[int] = set()

    def __enter__(self) -> None:
        """Nothing is started yet."""

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        for each in self.work:
            each.result()

    def inside(self) -> bool:
        """Whether this is the second thread."""
        return threading.get_ident() in self.threads

    def start(self, function: Callable[[], None]) -> None:
        """Start it, and go on when it waits, or is done."""

        def known() -> None:
            self.threads.add(threading.get_ident())
            function()

        pool = ThreadPoolExecutor(1)
        self.work.append(pool.submit(known))
        self.work[-1].add_done_callback(lambda _: self.arrived.set())
        pool.shutdown(wait=False)
        self.arrived.wait()

    def wait(self) -> None:
        """Wait, in the second thread, for the end of the run that the first one is in."""
        self.arrived.set()
        self.leave.wait()


def _halve(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return tensor / 2 if tensor.is_floating_point() else tensor


def _some_blocks(bridge: Any, draw: Callable[[int], int]) -> dict[str, int]:
    """A stop_at_layer or a start_at_layer, which came later."""
    late = hasattr(bridge, "_setup_start_at_layer") and draw(2)
    return {"start_at_layer" if late else "stop_at_layer": draw(len(bridge.blocks))}


@check(
    "hook_api.nested",
    "A hook that runs the model on other tokens, or its ln1 alone, gets what it gets outside of a "
    "hook, under flags and with an edit too, and the run around it is what it is without that; so "
    "it is where the other run is another thread's, and ends later. Either may be a run of some "
    "blocks, the outer one one that caches.",
    lambda: cases(runs=lambda model: run_specs(model, flags=_mostly_forks())),
    examples=0.4,
)
def nested(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One edit, and every value of the run around: each bit as where neither is within the other.

    Most edits are behind a flag, and most runs between what that flag copies and what reads it.
    """
    case, draw = in_one_forward(case, training=False), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge: Any = bridge_of(subject)
    sites = list(sites_to_hook(subject, case))
    edits, places = sites, sites
    if case.run.flags and draw(12):
        turn(subject, case.run.flags, True)
        edits = list(behind_flags(case.model, case.run.flags)) if draw(8) else sites
    edit = edits[draw(len(edits))]
    block, _, rest = edit.partition(".attn.")
    if rest and draw(8):
        names = ("ln1.hook_out", "ln1.hook_in", "hook_in")
        places = [f"{block}.{name}" for name in names]
    place = places[draw(len(places))]
    # Of threads, upstream makes what chance will: it keeps what it copies on the module.
    threads = is_exact(adapter) and rest and draw(2)
    seed = case.run.token_seed ^ 1
    other = replace(case, run=replace(case.run, token_seed=seed), tokens=case.tokens[::-1])
    given = {"return_type": "logits", **options(subject, case)}
    whole = draw(3) == 0
    outer = {} if whole else _some_blocks(bridge, draw)
    inner = {} if whole or draw(2) else _some_blocks(bridge, draw)
    cached = not whole and bool(draw(2))
    within: list[torch.Tensor] = []
    caches: list[dict[str, torch.Tensor]] = []
    seen: dict[str, torch.Tensor] = {}
    running, calls = False, 0
    beside = _Beside()

    def call(case: Case, part: dict[str, int], method: Any = bridge) -> Any:
        tokens = inputs(case).tokens
        entry = bridge.W_E[tokens].detach() if "start_at_layer" in part else tokens
        return method(entry, **given, **part)

    def run_other() -> None:
        with torch.no_grad():
            within.append(call(other, inner))

    def run(tensor: torch.Tensor, hook: HookPoint) -> None:
        nonlocal running, calls
        calls += 1
        if beside.inside():
            beside.wait()
        elif not running:
            running = True
            if threads:
                beside.start(run_other)
            else:
                run_other()
            before = calls
            if rest:
                bridge.get_submodule(f"{block}.ln1")(bridge.W_E[inputs(other).tokens])
            calls, running = before, False

    def keep(tensor: torch.Tensor, hook: HookPoint) -> None:
        if not running and not beside.inside():
            seen[str(hook.name)] = tensor.detach().clone()

    def forward(case: Case, part: dict[str, int], *hooks: Any) -> torch.Tensor:
        every = [(edit, _halve), *hooks, *((name, keep) for name in sites)]
        hooked = bridge.hooks(fwd_hooks=every)
        with at_work(f"a forward with an edit at {edit}"), hooked, torch.no_grad(), beside:
            method = bridge.run_with_cache if cached and case is not other else bridge
            output = call(case, part, method)
        if method is not bridge:
            output, cache = output
            caches.append(dict(cache.items()))
        logits: torch.Tensor = output
        return logits

    alone = forward(other, inner)
    seen.clear()
    around, due = forward(case, outer), dict(seen)
    seen.clear()
    if not whole and place not in due:
        place = list(due)[draw(len(due))]
    got = forward(case, outer, (place, run))
    label = f"with an edit at {edit} and a run in a hook at {place}{', beside' * bool(threads)}"
    if not whole:
        label = f"{label}, {inner} in {outer}"
    yield from exact_gaps(due, seen) if whole else labelled(label, exact_gaps(due, seen))
    yield from labelled(label, bitwise("logits of the run around", around, got))
    if cached:
        yield from labelled(f"{label}, cache", exact_gaps(*caches))
    for logits in within:
        yield from labelled(label, bitwise("logits of the run within", alone, logits))
    if whole and calls != 2:
        told = f"fired {calls} times, instead of once in each run"
        yield Gap(place, "count" if calls else "missing", told)
