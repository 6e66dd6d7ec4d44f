"""Hooks that fire only under a flag: right under it, silent and refused without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.hooking import Log, attached, changes, settle
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, compare_tensors, labelled
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.recorder import Tensors
from conformance.sites import behind_flags
from conformance.spec import Case, ModelSpec
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import Allowance, exactly, of_head_product, of_sum_by_head

FORKS = ((), ("use_split_qkv_input",), ("use_attn_in",))  # not both at once
_SOURCES = {"hook_mlp_in": "ln2.hook_in", "hook_result": "attn.o.hook_in"}
# Sites of a block that come before the hooks of a flag.
_EARLIER = {
    "use_attn_result": ("hook_in", "ln1.hook_out", "attn.v.hook_out"),
    "use_split_qkv_input": ("hook_in", "ln1.hook_in", "ln1.hook_out", "attn.hook_in"),
    "use_attn_in": ("hook_in", "ln1.hook_in", "ln1.hook_out", "attn.hook_in"),
    "use_hook_mlp_in": ("hook_in", "attn.hook_in", "attn.hook_out"),
}
OTHERS = ((), ("use_attn_result",), ("use_hook_mlp_in",), ("use_attn_result", "use_hook_mlp_in"))


def _forward(subject: Subject, case: Case, **named: Any) -> torch.Tensor:
    """The logits of a plain forward, or of one of ``run_with_hooks``."""
    bridge, data = subject.bridge, inputs(case)
    assert bridge is not None
    given = {"return_type": "logits", **options(subject, case), **named}
    with torch.no_grad(), started(subject, case):
        run = bridge.run_with_hooks if named else bridge
        logits: torch.Tensor = run(data.tokens, **given)
    return logits


def _source(name: str) -> str:
    """The ungated site that a gated hook's tensor follows from."""
    block, hook = ".".join(name.split(".")[:2]), name.rsplit(".", 1)[-1]
    return f"{block}.{_SOURCES.get(hook, 'hook_in')}"


def _expected(
    model: ModelSpec, name: str, source: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, Allowance]:
    """What a gated hook carries, and how far it may be off.

    Args:
        model: The model.
        name: Canonical name of the hook.
        source: The tensor at `_source`.
        weight: Of the output projection of the hook's block, ``[d_model, head * d_head]``.
    """
    hook = name.rsplit(".", 1)[-1]
    if hook == "hook_mlp_in":
        return source, exactly(source.dtype)
    if hook == "hook_result":
        z = source
        by_head = weight.double().view(weight.shape[0], -1, model.d_head)
        result = torch.einsum("bphd,mhd->bphm", z.double(), by_head)
        size = torch.einsum("bphd,mhd->bphm", z.double().abs(), by_head.abs())
        return result.to(z.dtype), of_head_product(size, z.dtype)
    few = hook in ("hook_k_input", "hook_v_input")
    heads = model.num_key_value_heads if few else model.num_attention_heads
    return source.unsqueeze(2).repeat(1, 1, heads, 1), exactly(source.dtype)


@check(
    "firing.gated",
    "A hook that a flag gates fires once a forward under its flag, with the residual stream once "
    "a head, or the head's share of the output, and never without, before as after; a flag that "
    "a hook turns counts from there on.",
    cases,
    examples=0.3,
)
def gated(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Without any flag, under a legal set of flags, and without any again.

    Against the reference where no head is summed yet, and bit for bit against what the bridge
    shows of the same tensor in the same forward: an adapter may sum by head in its own order.
    """
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge, seed = bridge_of(subject), case.run.token_seed
    truth = reference(case.model)
    values = observe(truth, case, sites=sites_of(subject, case), backward=False).values
    chosen = (*FORKS[seed % len(FORKS)], *OTHERS[seed // len(FORKS) % len(OTHERS)])
    rows = behind_flags(case.model)
    for when, flags in (("before", ()), ("under", chosen), ("after", ())):
        with at_work(f"a forward {when} {' and '.join(chosen) or 'no flag'}"):
            for flag in chosen:
                getattr(bridge, f"set_{flag}")(flag in flags)
            log = _listened(subject, case, rows)
        for name, site in rows.items():
            shown = log.tensors[name]
            due = int(site.flag in flags)
            if len(shown) != due:
                yield Gap(name, "count", f"fired {len(shown)} times instead of {due}, {when}")
            elif shown:
                yield from _right(truth, case.model, name, log, values[_source(name)])
    draw = drawing(case)
    for flag in sorted(_EARLIER):
        yield from _midway(subject, case, flag, draw, truth, values)


def _listened(subject: Subject, case: Case, rows: Iterable[str]) -> Log:
    """What gated hooks and their sources show in one forward; then all hooks are taken off."""
    bridge, log = bridge_of(subject), Log()
    for name in {*rows, *map(_source, rows)}:
        bridge.hook_dict[name].add_hook(log.listener(name))
    try:
        _forward(subject, case)
    finally:
        bridge.reset_hooks()
    return log


def _midway(
    subject: Subject,
    case: Case,
    flag: str,
    draw: Callable[[int], int],
    truth: Subject,
    values: Tensors,
) -> Iterator[Gap]:
    """A hook turns a flag on or off: that counts for what is still to come, and in full."""
    bridge = bridge_of(subject)
    turned_on, at = bool(draw(2)), draw(case.model.num_hidden_layers)
    site = f"blocks.{at}.{_EARLIER[flag][draw(len(_EARLIER[flag]))]}"
    rows = behind_flags(case.model, (flag,))
    what = f"when a hook at {site} turns {flag} {'on' if turned_on else 'off'}"

    def switch(tensor: torch.Tensor, hook: HookPoint) -> None:
        getattr(bridge, f"set_{flag}")(turned_on)

    with at_work(f"a forward {what}"):
        getattr(bridge, f"set_{flag}")(not turned_on)
        bridge.hook_dict[site].add_hook(switch)
        try:
            log = _listened(subject, case, rows)
        finally:
            getattr(bridge, f"set_{flag}")(False)
    for name in rows:
        shown, due = len(log.tensors[name]), (int(name.split(".")[1]) >= at) == turned_on
        if shown != due:
            yield Gap(name, "count", f"fired {shown} times instead of {int(due)}, {what}")
        elif shown:
            gaps = _right(truth, case.model, name, log, values[_source(name)])
            yield from labelled(what, gaps)


def _right(
    truth: Subject, model: ModelSpec, name: str, log: Log, reference_source: torch.Tensor
) -> Iterator[Gap]:
    """The gaps of what a gated hook carries, and of what that follows from."""
    source = _source(name)
    if not log.tensors[source]:
        yield Gap(source, "missing", "never fired")
        return
    own, shown = log.tensors[source][0], log.tensors[name][0]
    layer = truth.model.model.layers[int(name.split(".")[1])]
    weight = layer.self_attn.o_proj.weight.detach()
    due, allowance = _expected(model, name, own, weight)
    for gap in (
        compare_tensors(source, reference_source, own, of_sum_by_head(reference_source)),
        compare_tensors(name, due, shown, allowance),
    ):
        yield from [gap] if gap else []


def _attempts(
    subject: Subject, case: Case, name: str, direction: str
) -> dict[str, Callable[[], object]]:
    """Ways of asking for one hook by its name, after another one that is there."""
    bridge: Any = subject.bridge
    tokens = inputs(case).tokens
    good, listen = "blocks.0.hook_resid_pre", Log().listener("")
    hooks = {f"{direction}_hooks": [(good, listen), (name, listen)]}

    def within() -> None:
        with bridge.hooks(**hooks):
            pass

    return {
        "add_hook": lambda: bridge.add_hook(name, listen, dir=direction),
        "hooks()": within,
        "run_with_hooks": lambda: bridge.run_with_hooks(tokens, **hooks),
        "run_with_cache": lambda: bridge.run_with_cache(tokens, names_filter=name),
        "run_with_cache by position": lambda: bridge.run_with_cache(tokens, True, False, name),
        "run_with_cache of a list": lambda: bridge.run_with_cache(
            tokens, names_filter=[good, name]
        ),
    }


@check(
    "firing.refused",
    "Asking by name, canonical or alias, for a hook whose flag is off is refused by add_hook, "
    "hooks(), run_with_hooks and run_with_cache, with an error that names the flag, and leaves "
    "nothing behind; a filter that matches it too is not refused, and skips it.",
    cases,
    examples=0.2,
)
def refused(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every gated hook, under one of its names; its flag was never on, or is off again."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    draw = torch.Generator().manual_seed(case.run.token_seed)
    settle(subject, case)
    with at_work("setting flags"):
        if case.run.token_seed % 2:
            for setting in (True, False):
                bridge.set_use_split_qkv_input(setting)
                bridge.set_use_attn_result(setting)
                bridge.set_use_hook_mlp_in(setting)
    before = attached(subject)
    for site in behind_flags(case.model).values():
        names = (site.name, *site.aliases)
        name = names[int(torch.randint(len(names), (), generator=draw))]
        direction = ("fwd", "bwd")[int(torch.randint(2, (), generator=draw))]
        for way, attempt in _attempts(subject, case, name, direction).items():
            try:
                attempt()
                yield Gap(name, "contract", f"{way} does not refuse it without {site.flag}")
            except Exception as error:
                if site.flag not in str(error):
                    detail = f"{way} refuses it, and {site.flag} is not named: {error}"
                    yield Gap(name, "contract", detail)
    yield from changes(before, attached(subject), "after refusals")
    log = Log()
    with at_work("run_with_hooks of a filter"):
        actual = _forward(subject, case, fwd_hooks=[(lambda name: True, log.listener(""))])
    for name in behind_flags(case.model).keys() & set(log.told[""]):
        yield Gap(name, "extra", "a filter fires it without its flag")
    expected = observe(reference(case.model), case, backward=False).logits
    gap = compare_tensors("logits", expected, actual, exactly(expected.dtype))
    yield from [gap] if gap else []
