"""Steps that run a bridge: forwards, backwards, and every call that runs one with hooks on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from conformance.compare import Gap, bitwise, compare_parameters
from conformance.inputs import inputs
from conformance.machine.executor import Machine, named_parameters
from conformance.machine.invariant import values_gaps
from conformance.machine.moves import move
from conformance.machine.state import Tensors
from conformance.observe import observe, options, started
from conformance.recorder import Observation
from conformance.spec import Step
from conformance.subjects import at_work

NEW_TOKENS = 2


def fires(machine: Machine, step: Step) -> bool:
    """Whether the site of a step fires, and its edit means anything there.

    Compatibility mode masks scores with minus infinity, which no factor of zero takes away.
    """
    scores = machine.state.compatible and step.site.endswith("hook_attn_scores")
    zeroing = step.edit in ("zero", "one_head", "one_position", "one_row")
    return machine.fires(step.site) and not (scores and zeroing)


def differentiable(machine: Machine, step: Step) -> bool:
    """Whether there may be a backward: nothing writes in place."""
    return not machine.state.writes


def gradient_seen(machine: Machine, step: Step) -> bool:
    """Whether the gradient at a step's site can be compared: not at what the table derives."""
    plain = step.site in machine.sites and not machine.sites[step.site].derived
    return differentiable(machine, step) and machine.fires(step.site) and plain


@move("forward")
def forward(machine: Machine, step: Step) -> Iterator[Gap]:
    """As the case says, with a cache, in two chunks over a cache, or with padding."""
    case = machine.probe(step.seed // 4)
    padding = "right" if machine.state.compatible or machine.state.dtype == "float64" else "left"
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"use_cache": True},
        {"use_cache": True, "chunks": min(2, case.run.seq_len)},
        {"padding": padding},
    )
    case = replace(case, run=replace(case.run, **ways[step.seed % 4]))
    actual = observe(machine.subject, case, backward=False)
    yield from bitwise("logits", machine.expected(case).logits, actual.logits)


@move("backward", differentiable)
def backward(machine: Machine, step: Step) -> Iterator[Gap]:
    """The gradients accumulate, and each backward hook of the state sees its own once."""
    case, state = machine.probe(step.seed), machine.state
    listening = [hook for hook in state.hooks if hook.backward]
    expected = machine.expected(case, looks=bool(listening), backward=True)
    expected = replace(expected, parameter_gradients=_sums(state.gradients, expected))
    machine.heard.clear()
    actual = observe(machine.subject, case)
    yield from bitwise("logits", expected.logits, actual.logits)
    got = machine.gradients()
    yield from compare_parameters(expected, replace(actual, parameter_gradients=got))
    fired = Counter(hook for hook, _ in machine.heard)
    for hook in listening:
        due = int(hook.site in expected.gradients and machine.fires(hook.site))
        if fired[hook] != due:
            detail = f"a backward hook fired {fired[hook]} times instead of {due}"
            yield Gap(hook.site, "count", detail)
    for hook, seen in machine.heard:
        if seen is not None and hook.site in expected.gradients:
            yield from bitwise(f"{hook.site}, backward", expected.gradients[hook.site], seen)
    machine.now(gradients={name: held for name, held in got.items() if held is not None})


def _sums(before: Tensors, seen: Observation) -> Mapping[str, torch.Tensor | None]:
    """A run's gradients added to those that had accumulated before."""
    found = dict(seen.parameter_gradients)
    for name, gradient in before.items():
        new = found[name]
        found[name] = gradient if new is None else gradient + new
    return found


@move("zero_grad")
def zero_grad(machine: Machine, step: Step) -> Iterator[Gap]:
    """Of the whole bridge."""
    with at_work("zero_grad"):
        machine.bridge.zero_grad()
    machine.now(gradients={})
    yield from ()


@move("optimize")
def optimize(machine: Machine, step: Step) -> Iterator[Gap]:
    """One step of gradient descent along what has accumulated."""
    truth = machine.truth()
    for name, gradient in machine.state.gradients.items():
        truth.parameters[name].grad = gradient.clone()
    for parameters in (truth.parameters.values(), named_parameters(machine.bridge).values()):
        torch.optim.SGD(parameters, lr=0.05, weight_decay=0.1).step()
    held = truth.parameters.items()
    machine.now(weights={name: weight.detach().clone() for name, weight in held})
    yield from ()


@move("run_with_hooks", fires)
def run_with_hooks(machine: Machine, step: Step) -> Iterator[Gap]:
    """By a name, by an alias or by a filter."""
    case, hook = machine.probe(step.seed), machine.hook_of(step)
    named: Any = machine.name_of(step.site, step.seed // 2)
    if step.seed % 2:
        named = step.site.__eq__
    tokens, given = inputs(case).tokens, options(machine.subject, case)
    with at_work("run_with_hooks"), started(machine.subject, case), torch.no_grad():
        logits = machine.bridge.run_with_hooks(
            tokens, fwd_hooks=[(named, machine.function_of(hook))], **given
        )
    yield from bitwise("logits", machine.expected(case, hook).logits, logits)


@move("run_with_cache", differentiable)
def run_with_cache(machine: Machine, step: Step) -> Iterator[Gap]:
    """Everything, or one block's values, is in the cache.

    Not while a hook writes in place: a cache keeps tensors, not copies.
    """
    case = machine.probe(step.seed)
    picked = [name for name in machine.sites if step.seed % 2 == 0 or name.startswith("blocks.0.")]
    tokens, given = inputs(case).tokens, options(machine.subject, case)
    with at_work("run_with_cache"), started(machine.subject, case), torch.no_grad():
        logits, cache = machine.bridge.run_with_cache(
            tokens, return_cache_object=False, names_filter=picked, **given
        )
    expected = machine.expected(case, looks=True)
    held = {name: cache[name] for name in picked if name in cache}
    # The names of a cache are in no order; that of firing is seen elsewhere.
    actual = Observation(logits, values=held, fired=tuple(held))
    expected = replace(expected, values={name: expected.values[name] for name in picked})
    yield from values_gaps(machine, expected, actual)


@move("output_attentions")
def output_attentions(machine: Machine, step: Step) -> Iterator[Gap]:
    """Asked of the wrapped model."""
    case = machine.probe(step.seed)
    tokens, given = inputs(case).tokens, {"output_attentions": True, "use_cache": True}
    with machine.tapped(case) as (model, new_cache):
        expected = model(tokens, past_key_values=new_cache(), **given).attentions
    with at_work("output_attentions=True"), started(machine.subject, case), torch.no_grad():
        bridged: Any = machine.bridge.original_model
        actual = bridged(tokens, **given).attentions or ()
    if len(actual) != len(expected):
        yield Gap("attentions", "count", f"{len(actual)} layers instead of {len(expected)}")
        return
    for block, (due, got) in enumerate(zip(expected, actual, strict=True)):
        yield from bitwise(f"attentions[{block}]", due, got)


def has_room(machine: Machine, step: Step) -> bool:
    """Whether there are positions for what would be generated."""
    return machine.case.run.seq_len + NEW_TOKENS <= machine.case.model.max_position_embeddings


def generates(machine: Machine, step: Step) -> bool:
    """Whether what is generated can be compared.

    Cosine and sine have one row for all or one for each, as transformer_lens tells the positions or
    leaves them out: edits that depend on the number of rows then differ.
    """
    rowwise = ("noise", "replace", "one_row")
    edits = [edit for edit in machine.state.edits if edit.kind in rowwise]
    return has_room(machine, step) and not any(
        edit.site.endswith(("hook_cos", "hook_sin")) for edit in edits
    )


@move("generate", generates)
def generate(machine: Machine, step: Step) -> Iterator[Gap]:
    """Greedily, with and without a cache; every hook acts at every token."""
    case, cached = machine.probe(step.seed), step.seed % 2 == 0
    tokens = inputs(case).tokens
    with at_work("generate"), started(machine.subject, case):
        made: Any = generated(machine, tokens, cached)
    with machine.tapped(case) as (model, new_cache):
        due, logits = _greedy(model, new_cache, tokens, cached)
    if made.sequences.tolist() != due.tolist():
        yield Gap("tokens", "value", f"{made.sequences.tolist()} instead of {due.tolist()}")
    for index, (wanted, got) in enumerate(zip(logits, made.logits, strict=True)):
        yield from bitwise(f"logits of new token {index}", wanted, got)


def generated(machine: Machine, tokens: torch.Tensor, cached: bool) -> Any:
    """What the bridge generates."""
    return machine.bridge.generate(
        tokens,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=cached,
        output_logits=True,
        verbose=False,
    )


def _greedy(
    model: Any, new_cache: Callable[[], DynamicCache], tokens: torch.Tensor, cached: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What greedy decoding makes of a Hugging Face model, and the logits of every new token."""
    seen: list[torch.Tensor] = []
    cache: DynamicCache | None = None
    fed = tokens
    for _ in range(NEW_TOKENS):
        if cache is None or not cached:
            cache = new_cache()
        logits = model(fed, past_key_values=cache, use_cache=True).logits[:, -1]
        seen.append(logits)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        fed = tokens[:, -1:] if cached else tokens
    return tokens, seen
