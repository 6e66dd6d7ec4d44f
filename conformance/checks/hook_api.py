"""Hooks put on, stacked and taken off again: nothing of ours stays, nothing of the user's goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.hooking import attached, changes, settle, some_sites
from conformance.checks.registry import Adapter, check
from conformance.checks.support import in_one_forward
from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import observe, options, started
from conformance.points import hook_points
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly

STEPS = 5  # of a script


@dataclass(frozen=True, eq=False)
class _Entry:
    """A hook that should be on the bridge.

    Attributes:
        tag: Name of its function.
        site: Where it is.
        direction: ``fwd`` or ``bwd``.
        permanent: Whether only a reset that says so removes it.
        level: Depth of the context that it belongs to; None for a hook that was just added.
    """

    tag: str
    site: str
    direction: str
    permanent: bool = False
    level: int | None = None


class _Script:
    """A bridge, what should hang on it, and what was called there.

    Args:
        subject: The bridge.
        case: How it is run.
        names: Some sites of it that have a gradient, in order of execution: each with all its
            names, the canonical one first.
    """

    def __init__(self, subject: Subject, case: Case, names: dict[str, tuple[str, ...]]) -> None:
        self.bridge: Any = subject.bridge
        self.points: dict[str, Any] = dict(hook_points(subject))
        self.subject, self.case, self.names = subject, case, names
        self.entries: list[_Entry] = []
        self.calls: list[tuple[str, str]] = []
        self.gaps: list[Gap] = []
        # Each open context, its entries, and whether it removes them at its end.
        self.contexts: list[tuple[Any, list[_Entry], bool]] = []
        # Handles of added hooks. One that is removed by PyTorch's own stays in the point's list.
        self.handles: list[tuple[_Entry, Any]] = []
        self.unlisted = False
        self.logits = observe(reference(case.model), case, backward=False).logits
        self._generator = torch.Generator().manual_seed(case.run.token_seed)
        self._functions: dict[str, Callable[..., None]] = {}

    def draw(self, below: int) -> int:
        """A number drawn from the case."""
        return int(torch.randint(below, (), generator=self._generator))

    def function(self, entry: _Entry) -> Callable[..., None]:
        """The hook function of an entry: it writes down that it was called, and where."""

        def listen(tensor: torch.Tensor, hook: HookPoint) -> None:
            self.calls.append((entry.tag, str(hook.name)))

        return self._functions.setdefault(entry.tag, listen)

    def entry(self, **named: Any) -> _Entry:
        """A hook at a drawn site in a drawn direction, of a new function or of one in use."""
        tag = f"hook {self.draw(len(self._functions) + 3)}"
        site = list(self.names)[self.draw(len(self.names))]
        direction = ("fwd", "bwd")[self.draw(2)]
        return _Entry(tag, site, direction, **named)

    def due(self) -> list[tuple[str, str]]:
        """The calls that a forward and a backward should make, in order."""
        forward = [(e, s) for s in self.names for e in self.entries if e.direction == "fwd"]
        backward = [(e, s) for s in reversed(self.names) for e in self.entries]
        both = forward + [(e, s) for e, s in backward if e.direction == "bwd"]
        return [(entry.tag, site) for entry, site in both if entry.site == site]

    def run(self, when: str, call: Any = None) -> None:
        """A forward and a backward, by the bridge or by another call, and what is wrong of them."""
        data, self.calls, due = inputs(self.case), [], self.due()
        given = options(self.subject, self.case)
        with started(self.subject, self.case):
            logits = (call or self.bridge)(data.tokens, return_type="logits", **given)
        logits.backward(data.probe.to(logits.dtype))
        if self.calls != due:
            called = ", ".join(f"{tag} at {site}" for tag, site in self.calls)
            wanted = ", ".join(f"{tag} at {site}" for tag, site in due)
            self.gaps.append(Gap("hooks", "contract", f"{when}: {called}; due were {wanted}"))
        allowance = exactly(self.logits.dtype)
        gap = compare_tensors(f"logits {when}", self.logits, logits.detach(), allowance)
        self.gaps += [gap] if gap else []
        self.gaps += self._told(when) if call is None else ()

    def _told(self, when: str) -> Iterator[Gap]:
        """Where a hook point is wrong about the hooks that it has."""
        for site in self.names if not self.unlisted else ():
            for direction in ("fwd", "bwd", "both"):
                own = [e for e in self.entries if e.site == site]
                own = [e for e in own if direction in (e.direction, "both")]
                due = bool(own), any(not entry.permanent for entry in own)
                ask = self.points[site].has_hooks
                told = ask(direction), ask(direction, including_permanent=False)
                if told != due:
                    said = f"{when}: has_hooks({direction!r}), with permanent ones and without"
                    yield Gap(site, "contract", f"{said}: {told} instead of {due}")
                for level in range(len(self.contexts) + 2):
                    on = any(entry.level == level for entry in own)
                    if ask(direction, level=level) is not on:
                        said = f"{when}: has_hooks({direction!r}, level={level})"
                        yield Gap(site, "contract", f"{said} instead of {on}")
        # Older releases have no such list.
        if hasattr(self.bridge, "list_hooks") and not self.unlisted:
            yield from self._listed(when)

    def _listed(self, when: str) -> Iterator[Gap]:
        """Where the bridge lists other hooks than it has."""
        for direction in ("fwd", "bwd", "both"):
            for permanent in (True, False):
                due: dict[str, list[Any]] = {}
                own = [e for e in self.entries if permanent or not e.permanent]
                for way in ("fwd", "bwd") if direction == "both" else (direction,):
                    for entry in own:
                        if entry.direction == way:
                            due.setdefault(entry.site, []).append(self.function(entry))
                for asked, names in self._filters():
                    found = self.bridge.list_hooks(asked, direction, permanent)
                    told = {name: [handle.user_hook for handle in found[name]] for name in found}
                    on = {name: functions for name, functions in due.items() if name in names}
                    if told != on:
                        said = f"{when}: list_hooks({asked}, {direction!r}, {permanent})"
                        yield Gap(said, "contract", f"of {list(told)}, others than on {list(on)}")

    def _filters(self) -> Iterator[tuple[Any, Collection[str]]]:
        """Each way to ask for hook points, and what it asks for."""
        first, *_, last = self.names
        yield list(self.names), self.names
        yield first, (first,)
        yield (lambda name: name == last), (last,)

    def pairs(self, entries: list[_Entry], resets: bool) -> dict[str, Any]:
        """Entries as the arguments of ``hooks()``, each under a drawn name of its site."""
        found: dict[str, Any] = {"fwd_hooks": [], "bwd_hooks": [], "reset_hooks_end": resets}
        for entry in entries:
            names = self.names[entry.site]
            asked = names[self.draw(len(names))]
            found[f"{entry.direction}_hooks"].append((asked, self.function(entry)))
        return found

    def remove(self, gone: Callable[[_Entry], bool]) -> None:
        """Take entries off the books."""
        self.entries = [entry for entry in self.entries if not gone(entry)]

    def add(self) -> str:
        """Add a hook by name, in front of or behind those that are there."""
        entry = self.entry(permanent=bool(self.draw(2)))
        function, permanent = self.function(entry), entry.permanent
        if permanent and self.draw(2):
            names, point = self.names[entry.site], self.points[entry.site]
            by_name = self.bridge, (names[self.draw(len(names))],)
            owner, where = (by_name, (point, ()), (point, ()))[self.draw(3)]
            owner.add_perma_hook(*where, function, dir=entry.direction)
            self.entries.append(entry)
            return f"add_perma_hook of a {type(owner).__name__}"
        if self.draw(2):
            point = self.points[entry.site]
            handle = point.add_hook(function, entry.direction, permanent, prepend=True)
            self.handles.append((entry, handle))
            self.entries.insert(0, entry)
            return f"add_hook(prepend=True, {permanent=})"
        names = self.names[entry.site]
        name = names[self.draw(len(names))]
        self.bridge.add_hook(name, function, dir=entry.direction, is_permanent=permanent)
        self.entries.append(entry)
        return f"add_hook({permanent=})"

    def open(self) -> str:
        """Enter a context of one to three hooks, perhaps inside of others."""
        level, resets = len(self.contexts) + 1, bool(self.draw(3))
        own = [self.entry(level=level) for _ in range(1 + self.draw(3))]
        # The bridge adds those of the forward first.
        own.sort(key=lambda entry: entry.direction != "fwd")
        context = self.bridge.hooks(**self.pairs(own, resets))
        if context.__enter__() is not self.bridge:
            self.gaps.append(Gap("hooks()", "contract", "the context is not the bridge"))
        self.contexts.append((context, own, resets))
        self.entries += own
        return f"entering hooks(reset_hooks_end={resets})"

    def close(self) -> str:
        """Leave the innermost context."""
        if not self.contexts:
            return self.open()
        context, own, resets = self.contexts.pop()
        context.__exit__(None, None, None)
        self.remove(lambda entry: resets and entry in own)
        return "leaving hooks()"

    def reset(self) -> str:
        """One of the variants of reset_hooks, remove_hooks of one point, or a handle's removal."""
        held = [(e, handle) for e, handle in self.handles if e in self.entries and handle]
        if held and self.draw(3) == 0:
            entry, handle = held[self.draw(len(held))]
            handle.hook.remove()
            self.remove(lambda other: other is entry)
            self.unlisted = True
            return "a handle's hook.remove()"
        direction = ("fwd", "bwd", "both")[self.draw(3)]
        permanent = self.draw(3) == 0

        def gone(entry: _Entry) -> bool:
            return direction in (entry.direction, "both") and (permanent or not entry.permanent)

        if self.draw(3) == 0:
            site = list(self.names)[self.draw(len(self.names))]
            self.points[site].remove_hooks(direction, permanent)
            self.remove(lambda entry: entry.site == site and gone(entry))
            return f"remove_hooks({direction=}, including_permanent={permanent})"
        level = (None, None, 1, 2)[self.draw(4)]
        named = {"direction": direction, "including_permanent": permanent, "level": level}
        # Older releases have it under the one name only.
        ways = [way for way in ("reset_hooks", "remove_all_hook_fns") if hasattr(self.bridge, way)]
        way = ways[self.draw(2) % len(ways)]
        getattr(self.bridge, way)(**named)
        self.remove(lambda entry: gone(entry) and level in (None, entry.level))
        return f"{way}({direction=}, including_permanent={permanent}, {level=})"

    def reset_nothing(self) -> None:
        """Reset the hooks of a level that none has: without a context they have no level at all."""
        self.bridge.reset_hooks(level=0)

    def passing(self) -> str:
        """One call of run_with_hooks, whose own hooks act with the others and leave with it."""
        level, resets = len(self.contexts) + 1, bool(self.draw(3))
        own = [self.entry(level=level) for _ in range(1 + self.draw(3))]
        own.sort(key=lambda entry: entry.direction != "fwd")
        self.entries += own
        what = f"run_with_hooks(reset_hooks_end={resets})"
        self.run(f"in {what}", partial(self.bridge.run_with_hooks, **self.pairs(own, resets)))
        self.remove(lambda entry: resets and entry in own)
        return what

    def cached(self) -> str:
        """One call of run_with_cache, which leaves the hooks of others alone."""
        cached = self.bridge.run_with_cache
        self.run("in run_with_cache", lambda *a, **named: cached(*a, **named)[0])
        return "run_with_cache"

    def finish(self) -> None:
        """Leave all contexts, look at what is permanent, and take that off too."""
        while self.contexts:
            self.close()
        if not self.gaps and any(entry.permanent for entry in self.entries):
            self.bridge.reset_hooks()
            self.remove(lambda entry: not entry.permanent)
            self.run("after a last reset_hooks()")
        self.bridge.reset_hooks(including_permanent=True)


@check(
    "hook_api.ledger",
    "After any sequence of add_hook (permanent or not, in front or behind, by alias), nested "
    "hooks(), run_with_hooks, reset_hooks and remove_hooks, just the hooks that should be there "
    "are called, in order, forwards and backwards, and the logits are bit for bit what they were.",
    cases,
    examples=0.84,
)
def ledger(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """A drawn script of steps, with a forward and a backward after each."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    settle(subject, case)
    before = attached(subject)
    script = _Script(subject, case, some_sites(subject, case, 3))
    # Twice what the other steps need, to have something to act on, or act upon.
    twice = (script.add, script.reset)
    steps = (*twice, *twice, script.open, script.passing, script.close, script.cached)
    with at_work("a script of hooks"):
        for _ in range(STEPS):
            what = steps[script.draw(len(steps))]()
            if case.run.token_seed % 2:
                script.reset_nothing()
            script.run(f"after {what}")
            if script.gaps:
                break
        script.finish()
    yield from script.gaps
    yield from changes(before, attached(subject), "after the script")
