"""State dicts: what is in one, whose names it takes, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from conformance.checks.forward import logits_gap
from conformance.checks.parameters import WRAPPED
from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps
from conformance.checks.weights import accessor_gaps, read
from conformance.compare import Gap
from conformance.observe import observe
from conformance.parts import TABLE, parts, weights
from conformance.spec import DTYPES, Case, ModelSpec
from conformance.strategies import cases
from conformance.subjects import Subject, at_work, bridged, reference

State = dict[str, torch.Tensor]

# A component's path within its block, with either side's names.
PATHS = {part.path: (part.path.split("{i}.")[-1], part.module.split("{i}.")[-1]) for part in TABLE}


def lens_names(state: Mapping[str, Any], model: ModelSpec) -> dict[str, str]:
    """Hugging Face's names of a state dict, by the names that a bridge must have for them."""
    found = {}
    for part in parts(model):
        for kind in ("weight", "bias"):
            if f"{part.module}.{kind}" in state:
                found[f"{part.path}.{kind}"] = f"{part.module}.{kind}"
    return found


def _other(case: Case) -> ModelSpec:
    """The same model with other weights."""
    return replace(case.model, weight_seed=case.model.weight_seed ^ 1)


@check(
    "states.names",
    "A bridge's state dict has Hugging Face's tensors, shared and not copied, each once under its "
    "own name, and an unembedding's bias of zeros; forwards and flags change nothing of it.",
    cases,
    examples=0.2,
)
def names(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Read before and after; the adapter itself gives the same names for Hugging Face's."""
    case = replace(case, run=replace(case.run, use_cache=True))
    truth = reference(case.model).model.state_dict()
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = subject.bridge
    assert bridge is not None
    renamed = lens_names(truth, case.model)
    due: State = {name: truth[known] for name, known in renamed.items()}
    due["unembed.bias"] = truth["lm_head.weight"].new_zeros(case.model.vocab_size)
    with at_work("reading the state dict"):
        before = bridge.state_dict()  # type: ignore[no-untyped-call]
        for name, known in renamed.items():
            told = bridge.adapter.convert_hf_key_to_tl_key(known)
            if told != name:
                yield Gap(f"convert_hf_key_to_tl_key({known!r})", "contract", f"{told}, not {name}")
    yield from exact_gaps(due, before)
    held = {each.data_ptr() for each in subject.parameters.values()}
    for name, tensor in before.items():
        if name != "unembed.bias" and tensor.data_ptr() not in held:
            yield Gap(name, "contract", "a copy of the parameter, or of a part of it")
        if tensor.requires_grad:
            yield Gap(name, "contract", "requires a gradient")
    with at_work("state_dict(keep_vars=True)"):
        variables = bridge.state_dict(keep_vars=True)  # type: ignore[no-untyped-call]
        kept = {id(each) for each in variables.values()}
    for name, parameter in subject.parameters.items():
        if id(parameter) not in kept:
            yield Gap(f"{name} with keep_vars=True", "contract", "is not the parameter itself")
    order = list(before)
    observe(subject, case)
    with at_work("a forward under flags"):
        for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
            getattr(bridge, f"set_{flag}")(True)
        observe(subject, case, backward=False)
        after = bridge.state_dict()  # type: ignore[no-untyped-call]
    if list(after) != order:
        wrong = sorted(set(after) ^ set(order)) or "another order"
        yield Gap("keys after forwards", "contract", f"changed: {wrong}")
    for gap in exact_gaps(due, after):
        yield replace(gap, site=f"{gap.site} after forwards")


def _wrapped(bridge: Any, way: str) -> State:
    """A state dict with every name that a tensor has in the module tree."""
    around = nn.ModuleDict({"bridge": bridge})
    module = around if way == "a module around" else bridge.original_model
    found: State = module.state_dict()
    return found


@check(
    "states.loading",
    "A bridge takes a whole state dict under TransformerLens', Hugging Face's or its own wrapped "
    "model's names, copied or assigned, strictly, or inside of another module, and then is the "
    "model that it came from; what was frozen stays so.",
    cases,
    examples=0.4,
)
def loading(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Names, way and dtype of the state dict are derived from the case."""
    model, seed = case.model, case.run.token_seed
    truth = reference(model)
    subject = bridged(_other(case), adapter, prepared=case.run.prepared)
    bridge: Any = subject.bridge
    saved = truth.model.state_dict()
    ways = ("TransformerLens", "Hugging Face", "the wrapped model", "a module around")
    way = ways[seed // 16 % 4]
    # PyTorch's own assignment, which a module around does, unties also Hugging Face's model.
    assign = bool(seed & 1) and way != "a module around"
    if not assign and seed & 2:
        # Whatever its dtype, it is cast to the model's, as Hugging Face does.
        another = getattr(torch, DTYPES[seed // 4 % len(DTYPES)])
        saved = {name: tensor.to(another) for name, tensor in saved.items()}
        truth.model.load_state_dict(saved)
    holder = nn.ModuleDict({"bridge": bridge}) if way == "a module around" else bridge
    state: dict[str, Any]
    if way == "Hugging Face":
        state = saved
    elif way == "TransformerLens":
        state = {name: saved[known] for name, known in lens_names(saved, model).items()}
        state["unembed.bias"] = saved["lm_head.weight"].new_zeros(model.vocab_size)
    else:
        source = bridged(model, adapter, prepared=case.run.prepared)
        with at_work(f"reading the state dict of {way}"):
            state = _wrapped(source.bridge, way)
        state = {name: tensor.to(saved["lm_head.weight"].dtype) for name, tensor in state.items()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    stage = f" from {way}'s names, assign={assign}"
    given, trained = dict(state), subject.parameters["model.embed_tokens.weight"]
    trained.grad = kept = torch.ones_like(trained)
    for number, parameter in enumerate(bridge.parameters()):
        parameter.requires_grad_(bool((seed + number) % 3))
    wanted = {name: parameter.requires_grad for name, parameter in bridge.named_parameters()}
    with at_work(f"load_state_dict{stage}"):
        result = holder.load_state_dict(state, assign=assign)
    for kind in ("missing_keys", "unexpected_keys"):
        if (said := getattr(result, kind, None)) != []:
            yield Gap(f"{kind}{stage}", "contract", f"{said} though all is there")
    if [(name, id(t)) for name, t in state.items()] != [(n, id(t)) for n, t in given.items()]:
        yield Gap(f"the state dict{stage}", "contract", "is not what it was")
    if not assign and trained.grad is not kept:
        yield Gap(f"gradients{stage}", "contract", "of copied weights are lost")
    for name, parameter in bridge.named_parameters():
        if wanted.get(name, parameter.requires_grad) != parameter.requires_grad:
            told = f"requires_grad of {name.replace(WRAPPED, '')}{stage}"
            yield Gap(told, "contract", f"is {parameter.requires_grad} now")
    trained.grad = None
    due = weights({name: each.detach() for name, each in truth.parameters.items()}, model)
    with at_work("reading the weights"):
        got = read(bridge, model)
    for gap in exact_gaps(due, got):
        yield replace(gap, site=f"{gap.site}{stage}")
    tied = bridge.unembed.W_U.data_ptr() == bridge.embed.W_E.data_ptr()
    if tied != model.tie_word_embeddings:
        yield Gap(f"tying{stage}", "contract", f"now {tied}")
    observed = observe(subject, case, backward=False)
    yield from logits_gap(observe(truth, case, backward=False), observed, f"logits{stage}")


def _without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


def _misshapen(state: State, name: str) -> State:
    """One tensor of the right number of entries and a wrong shape."""
    tensor = state[name]
    shape = (1, *tensor.shape) if tensor.ndim == 1 else tensor.flatten().shape
    return {**state, name: tensor.reshape(shape)}


def _names(text: str, name: str) -> bool:
    """Whether an error, or a key in it, names a weight: as a bridge, Hugging Face or both do."""
    path, _, kind = name.rpartition(".")
    text = text.replace("._original_component", "").replace("layers.", "blocks.")
    ours, theirs = PATHS[re.sub(r"\d+", "{i}", path)]
    block = "".join(re.findall(r"blocks\.\d+\.", path))
    tails = (re.escape(f"{block}{tail}.{kind}") for tail in (ours, theirs))
    return any(re.search(rf"\b{tail}", text) for tail in tails)


def _refused(load: Callable[[], Any]) -> str | None:
    """The error that a load gives, or None."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


@check(
    "states.refused",
    "A state dict with a key missing or too many, or with a wrong shape, is refused with an error "
    "that names it and changes nothing; what is not strict takes the rest, and says what it lacks.",
    cases,
    examples=0.3,
)
def refused(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The key is derived from the case; every other tensor in the state dict is a new one."""
    model = case.model
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge: Any = subject.bridge
    saved = reference(_other(case)).model.state_dict()
    renamed = lens_names(saved, model)
    state: State = {name: saved[known] for name, known in renamed.items()}
    state["unembed.bias"] = saved["lm_head.weight"].new_zeros(model.vocab_size)
    candidates = sorted(renamed)
    name = candidates[case.run.token_seed % len(candidates)]
    extra = f"blocks.{model.num_hidden_layers}.attn.q.weight"
    broken = {
        f"without {name}": (_without(state, name), name),
        f"with a wrong shape of {name}": (_misshapen(state, name), name),
        f"with {extra}": ({**state, extra: torch.zeros(2, 2)}, extra),
    }
    for stage, (wrong, culprit) in broken.items():
        before = {known: each.detach().clone() for known, each in subject.parameters.items()}
        with at_work(f"load_state_dict {stage}"):
            said = _refused(partial(bridge.load_state_dict, wrong))
        if said is None:
            yield Gap(f"load_state_dict {stage}", "contract", "is not refused")
        elif not _names(said, culprit):
            yield Gap(f"load_state_dict {stage}", "contract", f"the error does not name it: {said}")
        now = {known: each.detach() for known, each in subject.parameters.items()}
        for gap in exact_gaps(before, now):
            yield replace(gap, site=f"{gap.site} after a refusal {stage}")
        yield from accessor_gaps(subject, model, f" after a refusal {stage}")
        if said is None:
            return
    with at_work("load_state_dict(strict=False)"):
        lacking = {**_without(state, name), extra: torch.zeros(2, 2)}
        result = bridge.load_state_dict(lacking, strict=False)
    if not result.missing_keys or not all(_names(key, name) for key in result.missing_keys):
        yield Gap("missing_keys", "contract", f"{result.missing_keys}, without {name}")
    if list(result.unexpected_keys) != [extra]:
        yield Gap("unexpected_keys", "contract", f"{result.unexpected_keys}, with {extra}")
    taken = {known: saved[known] for known in before if known != renamed[name]}
    yield from _partly(subject, {**before, **taken}, case, name)


def _partly(subject: Subject, due: State, case: Case, name: str) -> Iterator[Gap]:
    """What is there after a load that lacked one tensor. A tied pair lacks none of the two."""
    if case.model.tie_word_embeddings and name in ("embed.weight", "unembed.weight"):
        return
    now = {known: each.detach() for known, each in subject.parameters.items()}
    for gap in exact_gaps(due, now):
        yield replace(gap, site=f"{gap.site} after a load without {name}")
