"""Runs of some of the blocks: stop_at_layer and start_at_layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.checks.chunks import hooks_at
from conformance.checks.forked import (
    edit_behind_flags,
    firing,
    is_exact,
    led_allowances,
    under_flags,
    without_edits,
)
from conformance.checks.hooking import (
    Log,
    attached,
    changes,
    run_cached,
    settle,
    value_gaps,
)
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward, turn
from conformance.compare import (
    Gap,
    bitwise,
    compare_firing,
    compare_parameters,
    compare_tensors,
    compare_values,
    labelled,
)
from conformance.forks import Forks
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.recorder import Observation, Recorder
from conformance.spec import Case
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly


def deep_cases() -> SearchStrategy[Case]:
    """Cases with several blocks, mostly; of eleven, the last has a number of two digits."""
    depths = st.sampled_from((1, 2, 3, 2, 3, 2, 3, 2, 3, 11))
    # Positions that follow from the padding: a bridge derives them wherever it starts.
    paddings = st.sampled_from(("none", *("left", "gap", "rows") * 2, "right"))
    return cases(models=model_specs(layers=depths), runs=partial(run_specs, paddings=paddings))


@dataclass(frozen=True)
class _Part:
    """Which blocks are run.

    Attributes:
        start: Index of the first block, or None to begin with tokens.
        stop: Index of the block that is not reached, or None to end with logits.
        named: The keyword options that say so, an index counted from the end here and there.
    """

    start: int | None
    stop: int | None
    named: dict[str, int]

    def runs(self, names: list[str]) -> list[str]:
        """The sites that fire, in order of execution."""
        first = 0 if self.start is None else names.index(f"blocks.{self.start}.hook_in")
        last = len(names) if self.stop is None else names.index(f"blocks.{self.stop}.hook_in")
        # Positions are embedded anyway. What rotary_emb.hook_in shows is read for its dtype only.
        rotary = ["rotary_emb.hook_cos", "rotary_emb.hook_sin"] if first else []
        return rotary + names[first:last]


def _part(case: Case) -> _Part:
    """A part drawn from the case: all but the first blocks, all but the last, or fewer.

    Of many blocks, it begins or ends at the last. A stop_at_layer behind the last block is
    the known defect stop-at-last-layer of the bridge.
    """
    draw, blocks = case.run.token_seed, case.model.num_hidden_layers
    few = blocks if blocks < 10 else 1
    stop: int | None = blocks - few + draw // 6 % few
    start: int | None = blocks - few + draw // 36 % few
    if draw % 3 == 0:
        start = None
    elif draw % 3 == 1:
        stop = None
    elif start is not None and stop is not None:
        start, stop = min(start, stop), max(start, stop)
    back = blocks if draw // 3 % 2 else 0
    asked = {"start_at_layer": start, "stop_at_layer": stop}
    named = {name: index - back for name, index in asked.items() if index is not None}
    return _Part(start, stop, named)


def _streams(truth: Subject, case: Case) -> list[torch.Tensor]:
    """Hugging Face's own residual stream before each block, then the logits, all in one graph."""
    given = options(truth, case)
    with started(truth, case):
        output = truth.model(inputs(case).tokens, output_hidden_states=True, **given)
    assert output.hidden_states is not None
    return [*output.hidden_states[:-1], output.logits]


def _trained(subject: Subject, part: _Part) -> dict[str, torch.Tensor]:
    """The parameters of which a part's gradients are those of the whole run."""

    def counts(name: str) -> bool:
        _, kind, index, *_ = f"{name}..".split(".")
        first = part.start or 0
        return part.start is None or "lm_head" in name or (kind == "layers" and int(index) >= first)

    return {name: tensor for name, tensor in subject.parameters.items() if counts(name)}


def _gradients(
    output: torch.Tensor, sources: Mapping[str, torch.Tensor], case: Case
) -> Observation:
    """What arrives at some tensors of a drawn gradient of a part's output."""
    draw = torch.Generator().manual_seed(case.run.token_seed)
    probe = (0.1 * torch.randn(output.shape, generator=draw)).to(output.dtype)
    arrived = torch.autograd.grad(output, list(sources.values()), probe, allow_unused=True)
    named = dict(zip(sources, arrived, strict=True))
    return Observation(output.detach(), parameter_gradients=named)


def output_gaps(truth: Subject, subject: Subject, case: Case) -> Iterator[Gap]:
    """What a drawn part of a bridge makes of the truth's residual stream there, fed at once."""
    part, streams = _part(case), _streams(truth, case)
    entry = inputs(case).tokens if part.start is None else streams[part.start].detach()
    given = {**options(subject, case), **part.named}
    with torch.no_grad(), at_work(f"a forward with {part.named}"), started(subject, case):
        output = bridge_of(subject)(entry, return_type="logits", **given)
    due = streams[-1 if part.stop is None else part.stop]
    yield from bitwise(f"output with {part.named}", due.detach(), output)


def _flagged_gaps(
    truth: Subject, subject: Subject, case: Case, part: _Part, entry: torch.Tensor
) -> Iterator[Gap]:
    """What the edits of a case, which are behind flags and in a part, come to in that part."""
    turn(subject, case.run.flags, True)
    edit_behind_flags(subject, case)
    bare, every, recorder = without_edits(case), firing(subject, case), Recorder()
    due, bridge = part.runs(list(every)), bridge_of(subject)
    recorder.begin(bare)
    given: dict[str, Any] = {"return_type": "logits", **options(subject, case), **part.named}
    with torch.no_grad(), at_work("a forward"), started(subject, case):
        output = bridge.run_with_hooks(entry, fwd_hooks=hooks_at(due, recorder), **given)
    seen = Observation(output, recorder.values, fired=tuple(recorder.fired))
    forks = Forks(case, truth, seen, exact=True, everywhere=False)
    whole = observe(truth, bare, sites=sites_of(subject, case), backward=False, recorder=forks)
    end = whole.logits if part.stop is None else whole.values[f"blocks.{part.stop}.hook_in"]
    expected = Observation(end, {name: whole.values[name] for name in due})
    yield from compare_values(expected, seen, every, allowances=led_allowances(forks, case))


@check(
    "caching.layers",
    "With stop_at_layer and start_at_layer, counted from either end, just the blocks between are "
    "hooked and cached, with the reference's tensors; the output is the residual stream before "
    "the block, or the logits, and its gradient arrives where the run started; edits behind flags "
    "act there as in the whole run.",
    deep_cases,
    examples=0.5,
)
def layers(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Through run_with_cache or run_with_hooks, from what the reference has at the start.

    Always for logits: the loss of a run that starts late is the known defect start-at-layer-loss.
    """
    case = in_one_forward(case)
    truth, subject = reference(case.model), bridged(case.model, adapter, prepared=case.run.prepared)
    assert subject.bridge is not None
    every, part = sites_of(subject, case), _part(case)
    due = part.runs(list(every))
    expected = observe(truth, case, sites=every, backward=False)
    streams = _streams(truth, case)
    end = streams[-1 if part.stop is None else part.stop]
    entry, sources = inputs(case).tokens, _trained(subject, part)
    true_sources = _trained(truth, part)
    if part.start is not None:
        entry = streams[part.start].detach().clone().requires_grad_()
        sources, true_sources = (
            {**sources, "start": entry},
            {**true_sources, "start": streams[part.start]},
        )
    settle(subject, case)
    before = attached(subject)
    given: dict[str, Any] = {**options(subject, case), **part.named}
    if case.run.token_seed // 5 % 2:
        output, seen = run_cached(subject, case, entry, **given)
    else:
        log = Log()
        given["fwd_hooks"] = [(name, log.listener(name)) for name in every]
        with at_work("run_with_hooks"), started(subject, case):
            output = subject.bridge.run_with_hooks(entry, **given)
        fired = [name for name in log.order if name in due or name != "rotary_emb.hook_in"]
        yield from compare_firing(due, fired)
        seen = {name: tensors[0] for name, tensors in log.tensors.items() if tensors}
    yield from changes(before, attached(subject), f"after {part.named}")
    if part.start is not None:
        yield from bitwise("start, afterwards", streams[part.start].detach(), entry.detach())
        if case.run.batch == 1:
            with torch.no_grad(), at_work("a row without its batch"), started(subject, case):
                alone = subject.bridge(entry.detach()[0], return_type="logits", **given)
            yield from bitwise("output of a row without its batch", end.detach(), alone)
    gap = compare_tensors("output", end.detach(), output.detach(), exactly(end.dtype))
    yield from [gap] if gap else []
    if hasattr(subject.bridge, "input_to_embed"):  # of the younger releases
        mask = inputs(case).attention_mask
        with torch.no_grad(), at_work("input_to_embed"):
            begun, *_ = subject.bridge.input_to_embed(inputs(case).tokens, attention_mask=mask)
        yield from bitwise("input_to_embed", streams[0].detach(), begun)
    owner = {name: site for site in every.values() for name in (site.name, *site.aliases)}
    for name in due:
        if name not in seen:
            yield Gap(name, "missing", "in a block that runs, and not seen")
    for name, tensor in seen.items():
        site = owner[name]
        if site.name in due:
            yield from value_gaps(name, site, expected, tensor)
        elif site.name != "rotary_emb.hook_in":
            yield Gap(name, "extra", "outside of the blocks that run, and seen")
    if gap is None:
        with at_work("a backward"):
            actual = _gradients(output, sources, case)
        yield from compare_parameters(_gradients(end, true_sources, case), actual)
    with torch.no_grad(), at_work("a forward"), started(subject, case):
        again = subject.bridge(inputs(case).tokens, return_type="logits", **options(subject, case))
    gap = compare_tensors("logits afterwards", expected.logits, again, exactly(again.dtype))
    yield from [gap] if gap else []
    draw, blocks = drawing(case), range(case.model.num_hidden_layers)[part.start : part.stop]
    if blocks and is_exact(adapter) and draw(3) == 0:
        flagged = under_flags(case, draw, blocks)
        gaps = _flagged_gaps(truth, subject, flagged, part, entry.detach())
        yield from labelled(f"{part.named} under {', '.join(flagged.run.flags)}", gaps)
