"""The ways to get hold of a hook point: by any of its names, or of the component it is part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.hooking import attached, changes, settle, value_gaps
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap
from conformance.observe import observe, sites_of
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference

UNKNOWN = ("blocks.0.hook_nothing", "blocks.99.hook_in", "hook_", "blocks", "cfg")


def _attribute(bridge: Any, name: str) -> Any:
    """What the dotted path of a name leads to, or None."""
    found = bridge
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part, None)
    return found


@check(
    "hook_api.lookup",
    "hook_dict, mod_dict, get_hook_point, hook_points() and the path of attributes lead from each "
    "name and alias to one hook point, get_hook_point knows no other name, and block_hooks lists "
    "those of a block.",
    cases,
    examples=0.1,
)
def lookup(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every name of every site of one bridge."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    with at_work("looking hook points up"):
        by_name, modules = bridge.hook_dict, bridge.mod_dict
        listed = {id(point) for point in bridge.hook_points()}
        strangers = [name for name in UNKNOWN if bridge.get_hook_point(name) is not None]
        ways: dict[str, Callable[[str], Any]] = {
            "get_hook_point": bridge.get_hook_point,
            "mod_dict": modules.get,
            "the path of attributes": lambda name: _attribute(bridge, name),
        }
        for site in sites_of(subject, case).values():
            point = by_name.get(site.name)
            if not isinstance(point, HookPoint) or id(point) not in listed:
                yield Gap(site.name, "missing", "from hook_dict or hook_points()")
                continue
            if by_name.get(str(point.name)) is not point:
                yield Gap(site.name, "contract", f"calls itself {point.name}")
            for name in (site.name, *site.aliases):
                if by_name.get(name) is not point:
                    yield Gap(name, "contract", "another hook point in hook_dict")
                for way, look in ways.items():
                    if look(name) is not point:
                        yield Gap(name, "contract", f"another hook point by {way}")
        for name, point in by_name.items():
            for way in ("get_hook_point", "mod_dict"):
                if ways[way](name) is not point:
                    yield Gap(name, "contract", f"another hook point by {way}")
        for block in range(case.model.num_hidden_layers):
            prefix = f"blocks.{block}."
            due = sorted(name.removeprefix(prefix) for name in by_name if name.startswith(prefix))
            # Older releases have no such list.
            if hasattr(bridge, "block_hooks") and bridge.block_hooks(block) != due:
                yield Gap(f"block_hooks({block})", "contract", "is not those of hook_dict")
    if listed != {id(point) for point in by_name.values()}:
        yield Gap("hook_points()", "contract", "is not all of hook_dict")
    for name in strangers:
        yield Gap(name, "extra", "get_hook_point knows it")


def _components(subject: Subject) -> dict[str, tuple[Any, str, str]]:
    """Components with an input and an output of their own: by name, with their sites."""
    bridge, last = bridge_of(subject), subject.model.config.num_hidden_layers - 1
    block = f"blocks.{last}"
    paths = ("ln_final", "unembed", block, *(f"{block}.{at}" for at in ("attn", "ln1", "mlp.in")))
    return {
        path: (_attribute(bridge, path), f"{path}.hook_in", f"{path}.hook_out") for path in paths
    }


@check(
    "hook_api.components",
    "A component's add_hook puts a hook on its output or its input, its remove_hooks removes the "
    "hooks of the one, of the other or of both, and no others; an unknown name is refused. "
    "get_hooks() has both.",
    cases,
    examples=0.1,
)
def components(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One component: hooks on both ends, then none on one, then none."""
    case, draw = in_one_forward(case), drawing(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    sites = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=sites, backward=False)
    with at_work("getting components"):
        every = _components(subject)
    path = list(every)[draw(len(every))]
    component, *ends = every[path]
    bridge_of(subject).add_hook("rotary_emb.hook_in", lambda tensor, hook: None)
    seen: list[tuple[str, torch.Tensor]] = []

    def keep(tensor: torch.Tensor, hook: HookPoint) -> None:
        seen.append((str(hook.name), tensor.detach().clone()))

    with at_work(f"{path}.get_hooks"):
        own = component.get_hooks()
    for end in ends:
        if own.get(end.rpartition(".")[2]) is not bridge_of(subject).hook_dict[end]:
            yield Gap(end, "missing", f"from {path}.get_hooks()")
    settle(subject, case)
    before = attached(subject)
    with at_work(f"{path}.add_hook"):
        component.add_hook(keep, "input")
        component.add_hook(keep, *(("output",) if draw(2) else ()))
    first, left = (("input", ends[1:]), ("output", ends[:1]), (None, []))[draw(3)]

    def fired(due: list[str], when: str) -> Iterator[Gap]:
        seen.clear()
        observe(subject, case, backward=False)
        if [name for name, _ in seen] != due:
            told = ", ".join(name for name, _ in seen)
            yield Gap(path, "contract", f"{when}: {told or 'nothing'} instead of {', '.join(due)}")
        for name, tensor in seen:
            if name in sites:
                yield from value_gaps(f"{name} {when}", sites[name], expected, tensor)

    yield from fired(ends, "after add_hook")
    with at_work(f"{path}.remove_hooks"):
        component.remove_hooks(first)
    for ask in (partial(component.add_hook, keep), component.remove_hooks):
        try:
            ask("nothing")
        except Exception as error:
            if "nothing" not in str(error):
                yield Gap(path, "contract", f"the refusal does not name it: {error}")
        else:
            yield Gap(path, "contract", "an unknown name is accepted")
    yield from fired(left, f"after remove_hooks({first!r}) and two refusals")
    with at_work(f"{path}.remove_hooks"):
        component.remove_hooks()
    yield from fired([], "after remove_hooks()")
    yield from changes(before, attached(subject), "afterwards")
