"""What `torch.func` makes of a bridge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.func import functional_call, grad, jvp, vmap

from conformance.checks.derivatives import watched
from conformance.checks.forked import is_exact
from conformance.checks.gates import FORKS, OTHERS
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward, turn
from conformance.compare import Gap, within
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import arguments, logits_of, module_of
from conformance.sites import observable
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.strategies import cases, edits, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly, of_sum_by_head
from conformance.verdict import NotApplicable

Weights = Mapping[str, torch.Tensor]
Logits = Callable[[Weights, torch.Tensor], torch.Tensor]

# What an edit may be inside of a transform, where a drawn tensor is an error of PyTorch's.
_PURE = ("scale", "zero", "one_head", "one_position")


def transformed_cases() -> SearchStrategy[Case]:
    """Cases without padding, since Hugging Face looks into a mask, with one edit."""

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        sites = [name for name, site in observable(model).items() if not site.derived]
        one = edits(sites=st.sampled_from(sites[1:]), kinds=st.sampled_from(_PURE))
        return run_specs(
            model,
            paddings=st.just("none"),
            positions=st.just("derived"),
            caches=st.just(False),
            trainings=st.just(False),
            edits=st.tuples(one),
        )

    return cases(runs=runs)


def _function(subject: Subject, case: Case) -> Logits:
    """The logits as a function of weights, by Hugging Face's names, and tokens ``[batch, pos]``."""
    module, given = module_of(subject), arguments(subject, case)
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    own = {name: named[id(parameter)] for name, parameter in subject.parameters.items()}
    tokens_as = "input" if subject.bridge is not None else "input_ids"

    def logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        called = {own[name]: weight for name, weight in weights.items()}
        return logits_of(functional_call(module, called, (), {**given, tokens_as: tokens}))

    return logits


def _transforms(logits: Logits, case: Case, weights: Weights) -> dict[str, Callable[[], Any]]:
    """What `torch.func` makes of the logits, each with other weights than the model's own."""
    tokens = inputs(case).tokens
    draw = torch.Generator().manual_seed(case.run.token_seed)

    def drawn(weight: torch.Tensor) -> torch.Tensor:
        return torch.randn(weight.shape, generator=draw).to(weight.dtype)

    ways = {name: drawn(weight) for name, weight in weights.items()}
    moved = {name: weight.detach() + 0.1 * ways[name] for name, weight in weights.items()}
    both = {name: torch.stack((weight.detach(), moved[name])) for name, weight in weights.items()}

    def score(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        return logits(weights, tokens).square().mean()

    def of_row(function: Logits) -> Logits:
        return lambda weights, row: function(weights, row[None])

    def along(function: Logits) -> Any:
        return jvp(lambda weights: function(weights, tokens), (moved,), (ways,))

    return {
        "functional_call": lambda: logits(moved, tokens),
        "grad": lambda: grad(score)(moved, tokens),
        "jvp": lambda: along(logits),
        "jvp of grad": lambda: along(grad(score)),
        "vmap over rows": lambda: vmap(of_row(logits), in_dims=(None, 0))(moved, tokens),
        "vmap over weights": lambda: vmap(logits, in_dims=(0, None))(both, tokens),
        "grad of each row": lambda: vmap(grad(of_row(score)), in_dims=(None, 0))(moved, tokens),
    }


def _leaves(result: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a transform returns, each with a name."""
    if isinstance(result, torch.Tensor):
        yield name, result.detach()
        return
    pairs = result.items() if isinstance(result, dict) else enumerate(result)
    for key, value in pairs:
        yield from _leaves(value, f"{name}: {key}")


# What heads read or write, and where the same edit of all of them is one of Hugging Face's tensor.
_BEHIND = {
    "use_hook_mlp_in": (("hook_mlp_in",), "ln2.hook_in"),
    "use_attn_result": (("attn.hook_result",), "attn.o.hook_in"),
    "use_attn_in": (("attn.hook_attn_in",), "ln1.hook_in"),
    "use_split_qkv_input": (
        ("attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input"),
        "ln1.hook_in",
    ),
}

_BY_HEAD = tuple(_BEHIND)[1:]


def _flagged(subject: Subject, case: Case, draw: Callable[[int], int]) -> tuple[str, Edit]:
    """Turn on a drawn flag, and edit behind it what all heads read or write.

    Returns:
        The flag, and the edit that is the same on the reference.
    """
    # What is summed by head is rounded otherwise: nothing is left of a second derivative.
    wide = case.model.dtype in ("float32", "float64")
    flag = list(_BEHIND)[draw(len(_BEHIND) if wide else 1)]
    block, kind = draw(case.model.num_hidden_layers), ("zero", "one_position")[draw(2)]
    hooks, twin = _BEHIND[flag]
    edit = Edit(site=f"blocks.{block}.{twin}", kind=kind, seed=draw(2**16))
    turn(subject, [flag], True)
    for hook in hooks:
        point = bridge_of(subject).hook_dict[f"blocks.{block}.{hook}"]
        point.add_hook(lambda tensor, hook: edited(edit, tensor))
    return flag, edit


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


@check(
    "derivatives.transformed",
    "torch.func's functional_call, grad, jvp, vmap (over rows and over weights) and their "
    "compositions give the reference's results, wherever Hugging Face's model allows them, with "
    "forward hooks on and an edit in one of them, or behind a flag, and under flags that nothing "
    "makes use of.",
    transformed_cases,
    examples=0.35,
)
def transformed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No backward hooks: PyTorch's own cannot be transformed, on Hugging Face's model neither."""
    case = in_one_forward(case)
    subject, truth = bridged(case.model, adapter, prepared=case.run.prepared), reference(case.model)
    (edit,), draw, flag = case.run.edits, drawing(case), ""
    at_sites: Edit | None = edit
    if is_exact(adapter) and draw(2):
        flag, edit = _flagged(subject, case, draw)
        at_sites = None
    elif is_exact(adapter):
        turn(subject, FORKS[draw(len(FORKS))] + OTHERS[draw(len(OTHERS))], True)
    due: dict[str, Any] = {}
    with warnings.catch_warnings(), watched(truth, case, edit):
        # One of a slow path in vmap comes from C++, which no filter of ours has seen yet.
        warnings.simplefilter("ignore")
        for name, run in _transforms(_function(truth, case), case, truth.parameters).items():
            with suppress(RuntimeError):
                due[name] = run()
    if not due:
        raise NotApplicable("Hugging Face's own model cannot be transformed on this PyTorch")
    with watched(subject, case, at_sites):
        runs = _transforms(_function(subject, case), case, subject.parameters)
        for name, expected in due.items():
            with at_work(f"{name} {flag}"):
                actual = dict(_leaves(runs[name](), name))
            leaves = dict(_leaves(expected, name))
            summed = of_sum_by_head(max(leaves.values(), key=_size))
            for leaf, tensor in leaves.items():
                allowance = summed if flag in _BY_HEAD else exactly(tensor.dtype)
                yield from within(allowance, f"{leaf} {flag}".strip(), tensor, actual[leaf])
