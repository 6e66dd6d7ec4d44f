"""What the checks of hooks share: ways to put hooks on a bridge, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.compare import Gap, compare_tensors
from conformance.inputs import inputs
from conformance.observe import options, sites_of, started
from conformance.points import hook_points
from conformance.recorder import Observation
from conformance.sites import Port, Site
from conformance.spec import Case
from conformance.subjects import Subject, at_work
from conformance.tolerance import of_gradient, of_value

WAYS = ("add_hook", "hooks", "run_with_hooks")

Function = Callable[..., Any]
# A name, or a filter of names, and the function that is put there.
Pairs = list[tuple[Any, Function]]
# What hangs on each module, as PyTorch and TransformerLens hold it.
Attached = Mapping[str, tuple[int, ...]]

_HELD = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def run_hooked(
    subject: Subject, case: Case, forward: Mapping[str, Pairs], backward: Mapping[str, Pairs]
) -> torch.Tensor:
    """One forward with hooks on a bridge, and a backward when all but the added ones are off.

    Args:
        subject: The bridge.
        case: How to run it, in one chunk.
        forward: Hooks of the forward, by the way in which they are put on: of `WAYS`.
        backward: Hooks of the backward, likewise.

    Returns:
        The logits ``[batch, pos, d_vocab]``.
    """
    bridge = subject.bridge
    assert bridge is not None
    data = inputs(case)
    given = options(subject, case)

    def both(way: str) -> dict[str, Any]:
        return {"fwd_hooks": forward.get(way, []), "bwd_hooks": backward.get(way, [])}

    with at_work("a forward and a backward with hooks on"):
        for asked, function in forward.get("add_hook", ()):
            bridge.add_hook(asked, function)
        for asked, function in backward.get("add_hook", ()):
            bridge.add_hook(asked, function, dir="bwd")
        with bridge.hooks(**both("hooks")), started(subject, case):
            logits: torch.Tensor = bridge.run_with_hooks(
                data.tokens, return_type="logits", **both("run_with_hooks"), **given
            )
        if logits.requires_grad:  # a replaced output has no gradient to send back
            logits.backward(data.probe.to(logits.dtype))  # type: ignore[no-untyped-call]
        bridge.reset_hooks()
    return logits.detach()


class Log:
    """What hook functions were called with, each under a label of its own."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.told: dict[str, list[str]] = {}
        self.tensors: dict[str, list[torch.Tensor]] = {}

    def listener(self, label: str) -> Function:
        """A hook function that writes down its calls and changes nothing."""
        told, tensors = self.told.setdefault(label, []), self.tensors.setdefault(label, [])

        def listen(tensor: torch.Tensor, hook: HookPoint) -> None:
            self.order.append(label)
            told.append(str(hook.name))
            tensors.append(tensor.detach().clone())

        return listen


def run_with_cache(
    subject: Subject, case: Case, tokens: torch.Tensor, **named: Any
) -> tuple[torch.Tensor, Any]:
    """What run_with_cache gives: its output and the cache, an `ActivationCache` or a dict."""
    bridge = subject.bridge
    assert bridge is not None
    given = {"return_type": "logits", **options(subject, case), **named}
    with at_work("run_with_cache"), started(subject, case):
        found: tuple[torch.Tensor, Any] = bridge.run_with_cache(tokens, **given)
    return found


def run_cached(
    subject: Subject, case: Case, tokens: torch.Tensor, **named: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `run_with_cache`, with the cache as a dict."""
    output, cache = run_with_cache(subject, case, tokens, **named)
    return output, dict(cache.items())


def value_gaps(
    label: str,
    site: Site,
    expected: Observation,
    actual: torch.Tensor,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Iterator[Gap]:
    """The gap of one value that a hook or a cache has seen, if there is one."""
    allowance = of_value(site, site.name, expected.values)
    due = view(expected.values[site.name])
    gap = compare_tensors(label, due, actual, allowance, any_wider=bool(site.derived))
    yield from [gap] if gap else []


def gradient_gaps(
    label: str,
    site: Site,
    expected: Observation,
    actual: torch.Tensor,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Iterator[Gap]:
    """The gap of one gradient that a hook or a cache has seen, if there is one."""
    allowance = of_gradient(site, expected.values, expected.gradients)
    due, wider = view(expected.gradients[site.name]), bool(site.derived)
    gap = compare_tensors(label, due, actual, allowance, kind="gradient", any_wider=wider)
    yield from [gap] if gap else []


def picking(
    site: Site, positions: Collection[int], *, batchless: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """From a site's tensor to what a cache keeps of it.

    Args:
        site: The site.
        positions: The positions that ``pos_slice`` picks.
        batchless: Without the batch, if that is one row.
    """
    # Queries, of [batch, head, query, key]; positions come second everywhere else.
    dim = 2 if site.port in (Port.SCORES, Port.PATTERN) else 1
    at = torch.tensor(list(positions), dtype=torch.long)

    def look(tensor: torch.Tensor) -> torch.Tensor:
        picked = tensor.index_select(dim, at)
        return picked[0] if batchless and picked.shape[0] == 1 else picked

    return look


def some_sites(subject: Subject, case: Case, count: int) -> dict[str, tuple[str, ...]]:
    """Drawn sites that have a gradient, each with all its names, in order of execution."""
    none = ("embed.hook_in", "rotary_emb.hook_in", "hook_cos", "hook_sin")
    known = sites_of(subject, case).values()
    plain = [site for site in known if not site.derived and not site.name.endswith(none)]
    draw = torch.Generator().manual_seed(case.run.token_seed)
    picked = sorted(torch.randperm(len(plain), generator=draw)[:count].tolist())
    return {plain[at].name: (plain[at].name, *plain[at].aliases) for at in picked}


def settle(subject: Subject, case: Case) -> None:
    """Let a bridge put up the listeners of its own, and Hugging Face those of its outputs.

    Both do so once, in the first forward that needs them.
    """
    assert subject.bridge is not None
    with at_work("a first forward"), torch.no_grad():
        subject.bridge(inputs(case).tokens, output_attentions=True)


def attached(subject: Subject) -> Attached:
    """Every hook on every module of a bridge and of the model in it, in order."""
    assert subject.bridge is not None
    found: dict[str, tuple[int, ...]] = {}
    for module_name, module in (
        *subject.bridge.named_modules(),
        *subject.model.named_modules(prefix="original_model"),
    ):
        for held in _HELD:
            found[f"{module_name}.{held}"] = tuple(vars(module)[held])
    for name, point in hook_points(subject).items():
        for held in ("fwd_hooks", "bwd_hooks"):
            found[f"{name}.{held}"] = tuple(id(handle) for handle in getattr(point, held))
    return found


def changes(before: Attached, after: Attached, when: str) -> Iterator[Gap]:
    """A gap for each module that has lost a hook, or has one more than before."""
    for name in sorted(before.keys() | after.keys()):
        then, now = before.get(name, ()), after.get(name, ())
        if then != now:
            lost, left = len(set(then) - set(now)), len(set(now) - set(then))
            detail = f"{when}: {lost} hooks lost, {left} left over"
            yield Gap(name, "contract", detail if lost or left else f"{when}: in another order")
