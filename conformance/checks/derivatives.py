"""Other derivatives than a backward's: second ones, and those of `torch.func`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.func import functional_call, grad, jvp, vmap

from conformance.checks.forked import is_exact
from conformance.checks.gates import FORKS, OTHERS
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    drawing,
    forward_as_it_is,
    in_one_forward,
    sites_to_hook,
    turn,
)
from conformance.compare import Gap, bitwise
from conformance.edits import edited
from conformance.inputs import inputs
from conformance.observe import arguments, logits_of, module_of
from conformance.points import hook_points
from conformance.sites import observable
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.strategies import cases, edits, model_specs, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.taps import Taps
from conformance.verdict import NotApplicable

Weights = Mapping[str, torch.Tensor]
Logits = Callable[[Weights, torch.Tensor], torch.Tensor]


def bent_cases() -> SearchStrategy[Case]:
    """Cases most of which clip."""
    clips = st.sampled_from((1.0, 0.5, 1.5, 0.2, None))
    return cases(models=model_specs(clips=clips))


def _hessian_times(subject: Subject, case: Case) -> dict[str, torch.Tensor | None]:
    """The second derivative of the probed logits by all parameters, in a drawn direction."""
    module_of(subject).train(case.run.training)
    logits, _ = forward_as_it_is(subject, case)
    weights = list(subject.parameters.values())
    probed = (logits * inputs(case).probe.to(logits.dtype)).sum()
    draw = torch.Generator().manual_seed(case.run.token_seed)
    ways = [torch.randn(weight.shape, generator=draw).to(weight.dtype) for weight in weights]
    firsts = torch.autograd.grad(probed, weights, create_graph=True, allow_unused=True)
    along = [
        (first * way).sum() for first, way in zip(firsts, ways, strict=True) if first is not None
    ]
    seconds = torch.autograd.grad(torch.stack(along).sum(), weights, allow_unused=True)
    return dict(zip(subject.parameters, seconds, strict=True))


class _Tripled(torch.autograd.Function):
    """The same tensor, whose gradient is three times as great."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Not in place: it has a derivative too."""
        return gradients[0] * 3


@contextmanager
def _watched(
    subject: Subject, case: Case, edit: Edit | None = None, *, tripled: str = ""
) -> Iterator[None]:
    """Look at every site while in here, by the subject's own means, and edit one of them.

    The reference is watched, too, and not bare: a node at each site, as a hook makes one, changes
    the order in which PyTorch adds up a second derivative.

    Args:
        subject: The subject.
        case: The case, which says where the sites are.
        edit: What is done at one of them.
        tripled: A site whose gradient is replaced by three times itself; if there is one, every
            hook of a bridge has a backward hook beside it.
    """

    def visit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if subject.bridge is None and name == tripled:
            tensor = _Tripled.apply(tensor)  # type: ignore[no-untyped-call]
        return edited(edit, tensor) if edit is not None and name == edit.site else tensor

    sites = sites_to_hook(subject, case)
    if subject.bridge is None:
        d_head, clamps = case.model.d_head, subject.clamps
        with Taps(subject.model, sites, visit, d_head=d_head, clamps=clamps).attached():
            yield
        return
    points = hook_points(subject)
    try:
        for name in sites:
            points[name].add_hook(lambda tensor, hook, name=name: visit(name, tensor))
            if name == tripled:
                points[name].add_hook(lambda tensor, hook: tensor * 3, dir="bwd")
            elif tripled:
                points[name].add_hook(lambda tensor, hook: None, dir="bwd")
        yield
    finally:
        for point in points.values():
            point.remove_hooks("both")


@check(
    "derivatives.second",
    "Hessian-vector products through the logits, clamp and all, are the reference's for every "
    "parameter, bare and with forward and backward hooks on every site, one of which returns "
    "another gradient.",
    bent_cases,
    examples=0.25,
)
def second(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The hooks inside of the LayerNorms are left out: they have a check of their own."""
    case = in_one_forward(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    # Not past the clamp: taps on what is clamped in place lose such a node in the second pass.
    sites = [name for name in sites_to_hook(subject, case) if not name.endswith("_clipped")]
    site = sites[drawing(case)(len(sites))]
    for label in ("bare", "hooked"):
        with _watched(truth, case, tripled=site) if label == "hooked" else nullcontext():
            expected = _hessian_times(truth, case)
        with (
            at_work(f"double backward, {label}"),
            _watched(subject, case, tripled=site) if label == "hooked" else nullcontext(),
        ):
            actual = _hessian_times(subject, case)
        for name, due in expected.items():
            got = actual[name]
            if due is not None and got is not None:
                yield from bitwise(f"{label}: {name}", due, got, kind="gradient")
            elif due is not got:
                has = "missing" if got is None else "extra"
                yield Gap(f"{label}: {name}", has, "a second derivative on one side only")


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


@check(
    "derivatives.transformed",
    "torch.func's functional_call, grad, jvp, vmap (over rows and over weights) and their "
    "compositions give the reference's results, wherever Hugging Face's model allows them, with "
    "forward hooks on and an edit in one of them, and under flags that nothing makes use of.",
    transformed_cases,
    examples=0.15,
)
def transformed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No backward hooks: PyTorch's own cannot be transformed, on Hugging Face's model neither."""
    case = in_one_forward(case)
    subject, truth = bridged(case.model, adapter, prepared=case.run.prepared), reference(case.model)
    (edit,), draw = case.run.edits, drawing(case)
    if is_exact(adapter):
        turn(subject, FORKS[draw(len(FORKS))] + OTHERS[draw(len(OTHERS))], True)
    due: dict[str, Any] = {}
    with warnings.catch_warnings(), _watched(truth, case, edit):
        # One of a slow path in vmap comes from C++, which no filter of ours has seen yet.
        warnings.simplefilter("ignore")
        for name, run in _transforms(_function(truth, case), case, truth.parameters).items():
            with suppress(RuntimeError):
                due[name] = run()
    if not due:
        raise NotApplicable("Hugging Face's own model cannot be transformed on this PyTorch")
    with _watched(subject, case, edit):
        runs = _transforms(_function(subject, case), case, subject.parameters)
        for name, expected in due.items():
            with at_work(name):
                actual = dict(_leaves(runs[name](), name))
            for leaf, tensor in _leaves(expected, name):
                yield from bitwise(leaf, tensor, actual[leaf])
