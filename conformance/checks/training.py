"""Training: frozen parts, and steps of an optimizer that leave the reference's own weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from conformance.checks.frozen import parts_of
from conformance.checks.registry import Adapter, check
from conformance.checks.support import forward_as_it_is, in_one_forward, needs_patch, sites_to_hook
from conformance.compare import Gap, bitwise, labelled
from conformance.observe import module_of
from conformance.points import hook_points
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, bridged, patched, reference
from conformance.verdict import NotApplicable

STEPS = 10


def training_cases() -> SearchStrategy[Case]:
    """Cases whose embeddings are tied as often as not, and whose attention mostly drops."""
    ties = st.sampled_from((False, True))
    return cases(models=model_specs(ties=ties, dropouts=st.sampled_from((0.0, 0.1, 0.5))))


@dataclass(frozen=True)
class Plan:
    """How a case trains, drawn from its seed.

    Attributes:
        momentum: Of an SGD; None is an AdamW.
        weight_decay: Of either.
        most: Norm to which gradients are cut; None leaves them.
        frozen: Index of a part that is not trained; None trains all.
        hooked: Whether a forward and a backward hook look on at every site of the bridge.
    """

    momentum: float | None
    weight_decay: float
    most: float | None
    frozen: int | None
    hooked: bool

    @classmethod
    def of(cls, case: Case) -> Plan:
        """The plan of a case."""
        draw = torch.Generator().manual_seed(case.run.token_seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (), generator=draw))]

        return cls(
            momentum=pick(None, None, 0.9),
            weight_decay=pick(0.1, 0.0, 0.01),
            most=pick(0.1, None, 1.0),
            frozen=pick(None, *range(4)),
            hooked=pick(False, True),
        )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, built as a user builds it."""
        if self.momentum is None:
            return torch.optim.AdamW(parameters, lr=0.02, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=0.05, momentum=self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class _Step:
    """What a step of training came to.

    Attributes:
        losses: Of each micro-batch.
        weights: After it, by Hugging Face's names.
        cleared: Whether each still has a gradient, if only of zeros, after zero_grad().
    """

    losses: tuple[torch.Tensor, ...]
    weights: dict[str, torch.Tensor]
    cleared: dict[str, bool]


def _batch_loss(subject: Subject, case: Case) -> torch.Tensor:
    """Cross entropy with drawn targets, by the same operations on every subject's logits."""
    logits, _ = forward_as_it_is(subject, case)
    draw = torch.Generator().manual_seed(case.run.token_seed)
    targets = torch.randint(logits.shape[-1], (*logits.shape[:-1], 1), generator=draw)
    return -logits.log_softmax(-1).gather(-1, targets).mean()


def _look_on(subject: Subject, case: Case) -> None:
    """Put a forward and a backward hook that change nothing on every site of a bridge."""
    points = hook_points(subject)
    for name in sites_to_hook(subject, case):
        points[name].add_hook(lambda tensor, hook: None)
        points[name].add_hook(lambda tensor, hook: None, dir="bwd")


def _train(subject: Subject, case: Case, steps: int, micro_batches: int = 1) -> list[_Step]:
    """Train a subject on drawn batches, another one for every forward."""
    plan, module = Plan.of(case), module_of(subject)
    module.train(case.run.training)
    if plan.hooked and subject.bridge is not None:
        _look_on(subject, case)
    if plan.frozen is not None:
        parts_of(subject)[plan.frozen].requires_grad_(False)
    optimizer = plan.optimizer(module.parameters())
    seen = []
    seed = case.run.token_seed
    for _ in range(steps):
        losses = []
        for _ in range(micro_batches):
            seed += 1
            batch = replace(case, run=replace(case.run, token_seed=seed))
            losses.append(_batch_loss(subject, batch) / micro_batches)
            torch.autograd.backward(losses[-1])
        if plan.most is not None:
            # In Hugging Face's order on every subject: that of a sum decides how it is rounded.
            nn.utils.clip_grad_norm_(list(subject.parameters.values()), plan.most)
        optimizer.step()
        module.zero_grad(set_to_none=bool(case.run.token_seed % 2))
        weights = {name: weight.detach().clone() for name, weight in subject.parameters.items()}
        cleared = {name: weight.grad is not None for name, weight in subject.parameters.items()}
        seen.append(_Step(tuple(loss.detach() for loss in losses), weights, cleared))
    return seen


def _apart(expected: list[_Step], actual: list[_Step]) -> Iterator[Gap]:
    """The gaps of the first step after which two trainings are apart; all later ones follow."""
    for index, (due, got) in enumerate(zip(expected, actual, strict=True), start=1):
        gaps = [
            gap
            for part, pair in enumerate(zip(due.losses, got.losses, strict=True), start=1)
            for gap in bitwise(f"loss {part}", *pair)
        ]
        for name, weight in due.weights.items():
            gaps += bitwise(name, weight, got.weights[name])
        if due.cleared != got.cleared:
            wrong = sorted(name for name in due.cleared if due.cleared[name] != got.cleared[name])
            told = f"of {wrong} one side has zeros and the other None"
            gaps.append(Gap("zero_grad()", "contract", told))
        if gaps:
            yield from labelled(f"step {index}", gaps)
            return


def _what_is_trained(subject: Subject) -> Iterator[Gap]:
    """An optimizer of ``bridge.parameters()`` gets each of Hugging Face's once, in its order."""
    assert subject.bridge is not None
    given = list(subject.bridge.named_parameters())
    due = {id(parameter): name for name, parameter in subject.parameters.items()}
    counts = Counter(id(parameter) for parameter in subject.bridge.parameters())
    for key, name in due.items():
        if counts[key] != 1:
            yield Gap(name, "count", f"is {counts[key]} times in parameters()")
    for name, parameter in given:
        if id(parameter) not in due:
            yield Gap(name, "extra", "Hugging Face's model has no such parameter")
        elif not (parameter.is_leaf and parameter.requires_grad):
            yield Gap(name, "contract", "cannot be trained")
    if [id(parameter) for _, parameter in given] != list(due):
        yield Gap("named_parameters()", "order", "not Hugging Face's, by which optimizers save")


@check(
    "training.steps",
    "Ten steps of AdamW or SGD on bridge.parameters(), with weight decay, clipped norms, tied "
    "embeddings, a frozen part, dropout and hooks looking on, give the reference's losses and "
    "weights after every step; so does the model patched exactly.",
    training_cases,
    examples=0.15,
)
def steps(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Then what the bridge's state dict saves is what was trained."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    yield from labelled("bridged", _what_is_trained(subject))
    expected = _train(reference(case.model), case, STEPS)
    with at_work("training a bridge"):
        yield from labelled("bridged", _apart(expected, _train(subject, case, STEPS)))
    assert subject.bridge is not None
    other = replace(case.model, weight_seed=case.model.weight_seed ^ 1)
    loaded = bridged(other, adapter, prepared=case.run.prepared)
    assert loaded.bridge is not None
    with at_work("loading what was trained"):
        loaded.bridge.load_state_dict(  # type: ignore[no-untyped-call]
            subject.bridge.state_dict()  # type: ignore[no-untyped-call]
        )
    for name, weight in expected[-1].weights.items():
        yield from bitwise(f"saved: {name}", weight, loaded.parameters[name].detach())
    try:
        needs_patch(adapter, exact=True)
    except NotApplicable:
        return
    exact = patched(case.model, adapter, exact_clip=True)
    with at_work("training a patched model"):
        yield from labelled("patched exact", _apart(expected, _train(exact, case, STEPS)))


@check(
    "training.accumulation",
    "Gradients accumulate over micro-batches and zero_grad() of the bridge clears them as those of "
    "the reference, to the same losses and weights.",
    training_cases,
    examples=0.15,
)
def accumulation(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three steps of two micro-batches."""
    case = in_one_forward(case)
    expected = _train(reference(case.model), case, 3, 2)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    with at_work("training a bridge"):
        actual = _train(subject, case, 3, 2)
    yield from _apart(expected, actual)
