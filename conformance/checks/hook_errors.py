"""An exception inside a hook, inside the model or of the call itself: the bridge is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from conformance.checks.hooking import Log, attached, changes, settle, some_sites
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, in_one_forward
from conformance.compare import Gap, compare_parameters, compare_tensors
from conformance.inputs import inputs
from conformance.observe import observe, options, started
from conformance.points import OnPurposeError, hook_points
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import Subject, bridged, reference
from conformance.tolerance import exactly


class _Interrupt(BaseException):
    """As `OnPurposeError`, and like Ctrl-C no Exception."""


class _Trial:
    """One bridge, one way of failing.

    Args:
        subject: The bridge.
        case: How it is run.
        site: Where the fault is.
    """

    def __init__(self, subject: Subject, case: Case, site: str) -> None:
        self.bridge: Any = subject.bridge
        self.site, self.tokens = site, inputs(case).tokens
        self.given = {"return_type": "logits", **options(subject, case)}
        self.fault = (OnPurposeError, _Interrupt)[case.run.token_seed // 3 % 2]("on purpose")
        self.bystander = Log().listener("")

    def raising(self, *args: Any, **kwargs: Any) -> None:
        """Raise, as any kind of hook."""
        raise self.fault

    def hooks(self, direction: str) -> dict[str, Any]:
        """A hook that fails, behind one on another site that does not."""
        good = ("blocks.0.hook_resid_pre", self.bystander)
        return {f"{direction}_hooks": [good, (self.site, self.raising)]}

    def within(self, direction: str) -> None:
        """Within hooks()."""
        with self.bridge.hooks(**self.hooks(direction)):
            self.bridge(self.tokens, **self.given).sum().backward()

    def run_with_hooks(self, direction: str) -> None:
        """In run_with_hooks, or in the backward after it."""
        hooks = self.hooks(direction)
        self.bridge.run_with_hooks(self.tokens, **hooks, **self.given).sum().backward()

    def nested(self, direction: str) -> None:
        """In run_with_hooks inside of hooks(), which goes on."""
        with self.bridge.hooks(fwd_hooks=[("hook_embed", self.bystander)]):
            with suppress(OnPurposeError, _Interrupt):
                self.run_with_hooks(direction)
            self.bridge(self.tokens, **self.given)
        raise self.fault

    def run_with_cache(self, direction: str) -> None:
        """In run_with_cache, with the failing hook put on before."""
        with self.bridge.hooks(**self.hooks(direction)):
            output, _ = self.bridge.run_with_cache(self.tokens, **self.given)
            output.sum().backward()

    def incl_bwd(self, direction: str) -> None:
        """In the forward or the backward of run_with_cache(incl_bwd=True)."""
        plain = [name for name in self.bridge.hook_dict if "hook_resid" in name]
        given = {**self.given, "return_type": "loss", "names_filter": plain, "incl_bwd": True}
        with self.bridge.hooks(**self.hooks(direction)):
            self.bridge.run_with_cache(self.tokens, **given)

    def inside(self, direction: str) -> None:
        """In a module of the model, before or behind what it computes."""
        block = self.bridge.blocks[-1].original_component
        before = direction == "fwd"
        put = block.register_forward_pre_hook if before else block.register_forward_hook
        handle = put(self.raising)
        try:
            self.bridge.run_with_cache(self.tokens, **self.given)
        finally:
            handle.remove()

    def stopping(self, direction: str) -> None:
        """In a run that would have stopped before the last block."""
        hooks = {f"{direction}_hooks": [("hook_embed", self.raising)]}
        given = {**self.given, "stop_at_layer": len(self.bridge.blocks) - 1}
        self.bridge.run_with_hooks(self.tokens, **hooks, **given).sum().backward()

    def starting(self, direction: str) -> None:
        """In a run that has started at the last block."""
        last = len(self.bridge.blocks) - 1
        stream = self.bridge.embed(self.tokens).detach().requires_grad_()
        hooks = {f"{direction}_hooks": [(f"blocks.{last}.hook_resid_mid", self.raising)]}
        given = {**self.given, "start_at_layer": last}
        self.bridge.run_with_hooks(stream, **hooks, **given).sum().backward()

    def unknown(self, direction: str) -> None:
        """No fault, but a name that no hook has, behind one that is there."""
        pairs = {f"{direction}_hooks": [(self.site, self.bystander), (NO_HOOK, self.bystander)]}
        with self.bridge.hooks(**pairs):
            pass

    def unknown_passing(self, direction: str) -> None:
        """As `unknown`, in run_with_hooks."""
        pairs = {f"{direction}_hooks": [(self.site, self.bystander), (NO_HOOK, self.bystander)]}
        self.bridge.run_with_hooks(self.tokens, **pairs, **self.given)

    def unknown_cached(self, direction: str) -> None:
        """As `unknown`, in run_with_cache."""
        self.bridge.run_with_cache(self.tokens, names_filter=NO_HOOK, **self.given)

    def no_stream(self, direction: str) -> None:
        """Tokens where start_at_layer asks for a residual stream."""
        hooks = {f"{direction}_hooks": [(self.site, self.bystander)]}
        self.bridge.run_with_hooks(self.tokens, **hooks, start_at_layer=0, **self.given)

    def no_scalar(self, direction: str) -> None:
        """Logits, of which incl_bwd cannot send back a gradient."""
        self.bridge.run_with_cache(self.tokens, names_filter=self.site, incl_bwd=True, **self.given)


NO_HOOK = "blocks.0.hook_nothing"
FAILING = (
    *("within", "run_with_hooks", "nested", "run_with_cache", "incl_bwd", "inside"),
    *("stopping", "starting", "stopping", "starting"),
)
REFUSED = ("unknown", "unknown_passing", "unknown_cached", "no_stream", "no_scalar")


def _tried(trial: _Trial, case: Case) -> Iterator[Gap]:
    """Fail in a drawn way, and see that the caller hears of it."""
    draw = case.run.token_seed // 6
    refused = draw % 4 == 0
    ways = REFUSED if refused else FAILING
    way, direction = ways[draw // 8 % len(ways)], ("fwd", "bwd")[draw // 4 % 2]
    what = " ".join((getattr(trial, way).__doc__ or "").lower().split()).rstrip(".")
    try:
        with torch.random.fork_rng(devices=[]):
            getattr(trial, way)(direction)
    except (OnPurposeError, _Interrupt) as raised:
        if raised is not trial.fault:
            yield Gap("exception", "contract", f"{what}: another one arrives: {raised!r}")
    except Exception as error:
        if not refused:
            detail = f"{what} ({direction}): {type(error).__name__} takes its place: {error}"
            yield Gap("exception", "contract", detail)
    else:
        yield Gap("exception", "contract", f"{what} ({direction}): nobody hears of it")


@check(
    "hook_api.exceptions",
    "An exception in a forward hook, a backward hook or the model, under any of the calls, and a "
    "call that is refused, reach the caller and leave no hook of theirs behind, take none of the "
    "user's away, and change neither context_level nor logits nor gradients afterwards.",
    cases,
    examples=0.8,
)
def exceptions(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The user has a permanent hook, one more, and one backwards, all at another place."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    settle(subject, case)
    site, mine = some_sites(subject, case, 2)
    users, point = Log(), hook_points(subject)[mine]
    point.add_hook(users.listener("permanent"), is_permanent=True)
    point.add_hook(users.listener("forward"))
    point.add_hook(users.listener("backward"), dir="bwd")
    before = attached(subject)
    with started(subject, case):
        yield from _tried(_Trial(subject, case, site), case)
    yield from changes(before, attached(subject), "afterwards")
    if level := getattr(bridge_of(subject), "context_level", 0):  # 3.0 to 3.6 keep none
        yield Gap("context_level", "contract", f"is {level} with no context open")
    for parameter in subject.parameters.values():
        parameter.grad = None
    users.order.clear()
    try:
        actual, expected = observe(subject, case), observe(reference(case.model), case)
    except _Interrupt:
        yield Gap("exception", "contract", "the hook that raised it is called again, afterwards")
        return
    if users.order != ["permanent", "forward", "backward"]:
        yield Gap(mine, "count", f"of the user's hooks, afterwards, {users.order} are called")
    dtype = expected.logits.dtype
    gap = compare_tensors("logits", expected.logits, actual.logits, exactly(dtype))
    yield from [gap] if gap else []
    yield from compare_parameters(expected, actual)
