"""The invariant: a bridge equals a fresh Hugging Face model in the same state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from conformance.compare import Gap, bitwise, compare_firing, compare_values, labelled
from conformance.edits import edited
from conformance.machine.executor import Machine, Original, named_parameters
from conformance.machine.state import State, Tensors
from conformance.observe import observe
from conformance.recorder import Observation
from conformance.spec import FLAGS


def gaps(machine: Machine) -> Iterator[Gap]:
    """Everything that can be compared without a change of the state.

    Of a state that every site has been compared in, the logits are enough.
    """
    yield from _standing(machine, machine.bridge, machine.state)
    news = machine.news
    case, expected = machine.shown()
    machine.heard.clear()
    logits = observe(machine.subject, case, backward=False).logits
    yield from _heard(machine)
    yield from bitwise("logits, unobserved", expected.logits, logits)
    if news:
        actual = observe(machine.subject, case, sites=machine.known, backward=False)
        yield from _every_value(machine, expected, actual)
    if machine.original is not None:
        yield from _stayed(machine, machine.original)


def values_gaps(machine: Machine, expected: Observation, actual: Observation) -> Iterator[Gap]:
    """Firing, order and value of every site that fires without a flag, and the logits."""
    if machine.state.compatible:
        expected, actual = _masked(expected), _masked(actual)
    sites = {name: site for name, site in machine.sites.items() if name in expected.values}
    yield from compare_values(expected, actual, sites)


def _every_value(machine: Machine, expected: Observation, actual: Observation) -> Iterator[Gap]:
    """The sites under a flag too. Where among the others these fire is promised elsewhere."""
    gated = [name for name, site in machine.known.items() if site.flag]
    plain = tuple(name for name in actual.fired if name not in gated)
    yield from values_gaps(machine, expected, replace(actual, fired=plain))
    due = [name for name in gated if machine.fires(name)]
    fired = [name for name in actual.fired if name in gated]
    yield from compare_firing(due, sorted(fired, key=gated.index))
    for name, tensor in _gated_values(machine, expected.values).items():
        if name in actual.values:
            yield from bitwise(name, tensor, actual.values[name])


def _standing(machine: Machine, bridge: TransformerBridge, state: State) -> Iterator[Gap]:
    """What can be seen of a bridge at rest: parameters, gradients, modes, flags and hooks."""
    held = named_parameters(bridge)
    for name in state.weights.keys() - held.keys():
        yield Gap(name, "missing", "no such parameter")
    for name, parameter in held.items():
        if name not in state.weights:
            yield Gap(name, "extra", "a parameter that the reference has not")
            continue
        yield from bitwise(name, state.weights[name], parameter.detach())
        if parameter.requires_grad != (name not in state.frozen):
            yield Gap(name, "contract", f"requires_grad is {parameter.requires_grad}")
        due, got = state.gradients.get(name), parameter.grad
        if due is not None and got is not None:
            yield from bitwise(f"{name}.grad", due, got)
        elif due is not got:
            yield Gap(f"{name}.grad", "contract", f"is {'there' if due is None else 'gone'}")
    model: Any = bridge.original_model
    config: Any = bridge.cfg
    for module in (*bridge.modules(), model, model.model):
        if module.training != state.training:
            yield Gap(type(module).__name__, "contract", f"training is {module.training}")
            break
    if config.dtype != getattr(torch, state.dtype):
        yield Gap("cfg.dtype", "contract", f"{config.dtype} instead of {state.dtype}")
    if model.config.clip_qkv != state.model.clip_qkv:
        yield Gap("config.clip_qkv", "contract", f"is {model.config.clip_qkv}")
    for flag in FLAGS:
        if bool(getattr(config, flag)) != (flag in state.flags):
            yield Gap(f"cfg.{flag}", "contract", f"is {getattr(config, flag)}")
    yield from _hooks(machine, bridge, state)


def _hooks(machine: Machine, bridge: TransformerBridge, state: State) -> Iterator[Gap]:
    """Each hook point has the hooks of the state, and none that has been left behind."""
    forward = Counter(hook.site for hook in state.hooks if not hook.backward)
    backward = Counter(hook.site for hook in state.hooks if hook.backward)
    counts = machine.hook_counts(bridge)
    for name in dict.fromkeys([*machine.bare, *counts]):
        before = machine.bare.get(name, (0, 0, 0, 0))
        more = (forward[name], backward[name]) * 2
        due = tuple(a + b for a, b in zip(before, more, strict=True))
        if counts.get(name) != due:
            detail = f"has {counts.get(name)} hooks instead of {due} (forward, backward; PyTorch's)"
            yield Gap(name, "contract", detail)


def _heard(machine: Machine) -> Iterator[Gap]:
    """In one forward each hook of the state fires once, if its site does."""
    fired = Counter(hook for hook, _ in machine.heard)
    for hook in machine.state.hooks:
        due = int(not hook.backward and machine.fires(hook.site))
        if fired[hook] != due:
            yield Gap(hook.site, "count", f"a hook fired {fired[hook]} times instead of {due}")


def _gated_values(machine: Machine, values: Tensors) -> dict[str, torch.Tensor]:
    """What sites under a flag carry: the residual stream, in a copy for each head or as it is.

    The summands of ``hook_result`` have a check of their own.
    """
    state, model, found = machine.state, machine.case.model, {}
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    for block in range(model.num_hidden_layers):
        at = f"blocks.{block}"
        copies = {
            f"{at}.attn.hook_q_input": heads,
            f"{at}.attn.hook_k_input": groups,
            f"{at}.attn.hook_v_input": groups,
            f"{at}.attn.hook_attn_in": heads,
        }
        for name, count in copies.items():
            found[name] = values[f"{at}.ln1.hook_in"].unsqueeze(2).expand(-1, -1, count, -1)
        between = values[f"{at}.hook_in"] + values[f"{at}.attn.hook_out"]
        for hook in state.hooks:
            if hook.site == f"{at}.hook_mlp_in" and not hook.backward:
                between = edited(hook.edit, between)
        found[f"{at}.hook_mlp_in"] = between
    return found


def _masked(seen: Observation) -> Observation:
    """The same with minus infinity wherever a score is masked, as compatibility mode writes it."""
    values = dict(seen.values)
    for name, tensor in values.items():
        if name.endswith("hook_attn_scores"):
            bound = torch.finfo(tensor.dtype).min / 4
            values[name] = tensor.masked_fill(tensor < bound, -torch.inf)
    return replace(seen, values=values)


def _stayed(machine: Machine, original: Original) -> Iterator[Gap]:
    """What was copied has not noticed anything of what the copy went through since."""
    resting = _standing(machine, original.bridge, original.state)
    yield from labelled("the copy's original", resting)
    again = observe(machine.as_subject(original.bridge), original.case, backward=False)
    yield from bitwise("the copy's original: logits", original.logits, again.logits)
