"""Parameters as a whole: whose they are, what a cast makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps, quiet
from conformance.checks.weights import accessor_gaps, read
from conformance.compare import Gap
from conformance.observe import observe
from conformance.parts import weights
from conformance.spec import DTYPES, Case
from conformance.strategies import cases
from conformance.subjects import at_work, bridged, reference

WRAPPED = "_original_component."


@check(
    "parameters.same",
    "The parameters of a bridge are Hugging Face's, in its order and under its names, all of them "
    "trained and none else, on its own and inside of another module, before and after a forward; "
    "apply() comes to each module of a weight once, in that order.",
    cases,
    examples=0.2,
)
def same(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The very same tensors. A buffer more is right: the unembedding's zero bias."""
    case = replace(case, run=replace(case.run, use_cache=True))
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    due = {name: id(each) for name, each in subject.parameters.items()}
    weighted = [id(each) for name, each in subject.parameters.items() if name.endswith("weight")]
    weighted += weighted[:1] if case.model.tie_word_embeddings else []
    buffers = {name for name, _ in reference(case.model).model.named_buffers()}
    buffers = {name.rpartition(".")[2] for name in buffers} | {"bias"}
    for stage in ("", " after a forward"):
        with at_work("reading the parameters"):
            named = [(n.replace(WRAPPED, ""), id(p)) for n, p in bridge.named_parameters()]
            inside = {id(p) for p in nn.ModuleList([bridge]).parameters()}
            listed = [id(p) for p in bridge.parameters()]
            twice = [id(p) for _, p in bridge.named_parameters(remove_duplicate=False)]
        if named != list(due.items()):
            wrong = [name for name, _ in set(named) ^ set(due.items())] or ["the order"]
            yield Gap(f"named_parameters(){stage}", "contract", f"not Hugging Face's: {wrong}")
        if listed != list(due.values()):
            yield Gap(f"parameters(){stage}", "contract", "not Hugging Face's, or not in its order")
        # A tied pair is there under both of its names.
        every = bridge.original_model.named_parameters(remove_duplicate=False)
        if twice != [id(p) for _, p in every]:
            told = f"named_parameters(remove_duplicate=False){stage}"
            yield Gap(told, "contract", "not the wrapped model's")
        visited: list[nn.Module] = []
        bridge.apply(visited.append)
        met = [id(each.weight) for each in visited if type(each) in (nn.Embedding, nn.Linear)]
        if met != weighted:
            yield Gap(f"apply(){stage}", "contract", f"{len(met)} weights, not {len(weighted)}")
        if inside != set(due.values()):
            extra = len(inside - set(due.values()))
            yield Gap(f"a module around the bridge{stage}", "contract", f"{extra} extra parameters")
        if not all(each.requires_grad and each.is_leaf for each in bridge.parameters()):
            yield Gap(f"parameters(){stage}", "contract", "one is not trained")
        held = {name.rpartition(".")[2] for name, _ in bridge.named_buffers()}
        if held != buffers:
            yield Gap(f"buffers{stage}", "contract", f"{sorted(held)}, not {sorted(buffers)}")
        if not stage:
            observe(subject, case)
    total = sum(each.numel() for each in subject.parameters.values())
    with at_work("n_params_total"):
        counted = bridge.n_params_total
    if counted != total:
        yield Gap("n_params_total", "contract", f"{counted}, not {total}")
    bridge.requires_grad_(False)
    if any(each.requires_grad for each in subject.parameters.values()):
        yield Gap("requires_grad_(False)", "contract", "leaves a parameter trained")


def _casts(name: str) -> list[tuple[str, Callable[[Any], Any]]]:
    """All ways to cast a module, with what each is called."""
    dtype = getattr(torch, name)
    method = {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)
    return [
        (f".{method}()", lambda module: getattr(module, method)()),
        (f".to({name})", lambda module: module.to(dtype)),
        (f".to(dtype={name})", lambda module: module.to(dtype=dtype)),
        (f".to('cpu', {name})", lambda module: module.to("cpu", dtype)),
        (f".to(a tensor of {name})", lambda module: module.to(torch.empty(1, dtype=dtype))),
    ]


@check(
    "parameters.cast",
    "After any way of casting, of a bridge or of its deep copy, the accessors are Hugging Face's "
    "tensors cast, every configuration tells the dtype, and the logits are those of its own cast.",
    cases,
    examples=0.35,
)
def cast(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The way and the dtype are derived from the case; a copy leaves the original as it was."""
    seed, model = case.run.token_seed, case.model
    case = replace(case, run=replace(case.run, padding="none"))
    there = [name for name in DTYPES if name != model.dtype][seed % 3]
    ways = _casts(there)
    way, act = ways[seed // 3 % len(ways)]
    truth = reference(model)
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge: Any = subject.bridge
    # transformer_lens prints what it does.
    with at_work(way), quiet():
        before = bridge
        if seed & 16:
            bridge = copy.deepcopy(bridge)
        bridge = act(bridge)
        moved = dict(zip(subject.parameters, bridge.parameters(), strict=True))
        changed = replace(subject, bridge=bridge, model=bridge.original_model, parameters=moved)
    act(truth.model)
    truth = replace(truth, parameters=dict(truth.model.named_parameters()))
    due = weights({name: each.detach() for name, each in truth.parameters.items()}, model)
    with at_work(f"reading the weights after {way}"):
        got = read(bridge, model)
    for gap in exact_gaps(due, got):
        yield replace(gap, site=f"{gap.site} after {way}")
    configs = {"cfg": bridge.cfg}
    for block in range(model.num_hidden_layers):
        configs[f"blocks.{block}.attn.config"] = bridge.blocks[block].attn.config
    for name, config in configs.items():
        if config.dtype != getattr(torch, there):
            yield Gap(f"{name}.dtype after {way}", "contract", f"is {config.dtype}")
    observed = observe(changed, case, backward=False)
    yield from logits_gap(observe(truth, case, backward=False), observed, f"logits after {way}")
    if before is not bridge:
        yield from accessor_gaps(subject, model, " of the original, after its copy was cast")
