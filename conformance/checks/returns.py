"""What a forward returns: each return_type, and the losses with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from conformance.checks.caches import Chunk, from_the_seed
from conformance.checks.calls import differing_gradients, taken_gradients, told
from conformance.checks.hooking import Log
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, in_one_forward
from conformance.compare import Gap, bitwise, within
from conformance.inputs import Inputs, inputs
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.strategies import cases, run_specs
from conformance.subjects import Subject, at_work, bridged, reference
from conformance.tolerance import exactly, of_loss

IGNORED = -100  # the label that Hugging Face's losses leave out

Loss = Callable[..., torch.Tensor]


def predicting_cases() -> SearchStrategy[Case]:
    """Cases of two tokens and more, in one forward."""
    lengths = st.sampled_from((2, 3, 5, 8, 24))
    return cases(runs=partial(run_specs, lengths=lengths, chunks=st.just(1)))


def _labels(case: Case, data: Inputs) -> torch.Tensor:
    """Labels, the tokens or others, of which some are left out, but not the last."""
    draw = torch.Generator().manual_seed(case.run.token_seed + 1)
    drawn = torch.randint(0, case.model.vocab_size, data.tokens.shape, generator=draw)
    labels = data.tokens if case.run.token_seed % 2 else drawn
    left_out = torch.rand(labels.shape, generator=draw) < 0.3
    left_out[:, -1:] = False
    return labels.masked_fill(left_out, IGNORED)


def _counted(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The labels that count: transformer_lens leaves out a pair with a masked token."""
    labels = labels.clone()
    labels[:, 0] = IGNORED  # nothing predicts it
    if mask is not None:
        labels[:, 1:][(mask[:, :-1] == 0) | (mask[:, 1:] == 0)] = IGNORED
    return labels


def _any(labels: torch.Tensor) -> bool:
    """Whether a label counts. If none does there is no loss: 0 / 0 on both sides."""
    return bool((labels != IGNORED).any())


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits ``[batch, pos, d_vocab]`` with the next label, ``[batch, pos - 1]``.

    In the logits' dtype: transformer_lens' convention, where Hugging Face takes float32.
    """
    flat, due = logits[:, :-1].flatten(0, 1), labels[:, 1:]
    each = cross_entropy(flat, due.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view_as(due)


def _mean(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the labels that count, summed in float32 or longer."""
    wide = torch.promote_types(losses.dtype, torch.float32)
    return losses.sum(dtype=wide) / (labels != IGNORED).sum()


def _of_a_second_chunk(subject: Subject, case: Case, data: Inputs) -> Iterator[Gap]:
    """The losses of a text's last tokens, over a cache of the first: of pairs of the last alone."""
    length = case.run.seq_len
    if data.attention_mask is None or length < 3:
        return
    cut, truth = 1 + drawing(case)(length - 2), reference(case.model)
    first, second = Chunk(data, 0, cut), Chunk(data, cut, length)
    filled = [DynamicCache(config=who.model.config) for who in (truth, subject)]
    with from_the_seed(case, truth):
        first.forward(truth, filled[0])
        logits = second.forward(truth, filled[0]).logits
    with from_the_seed(case, subject), at_work("the loss of a second chunk"):
        first.forward(subject, filled[1])
        asked: dict[str, Any] = {"return_type": "loss", "loss_per_token": True}
        losses = second.forward(subject, filled[1], **asked)
    labels = _counted(data.tokens, data.attention_mask)[:, cut:]
    yield from bitwise("losses of a second chunk", _losses(logits, labels), losses)


@check(
    "returns.kinds",
    "return_type logits, loss, both, None and logits_and_cache, with and without loss_per_token "
    "and labels, give the reference's logits and their cross entropy over the pairs that count, "
    "those of a second chunk over a cache too, and as a hook at the unembedding leaves them; every "
    "hook fires where nothing is returned.",
    predicting_cases,
    examples=0.2,
)
def kinds(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every return_type, of one bridge, in train mode too where nothing is dropped."""
    training = case.run.training and not case.model.attention_dropout
    case = in_one_forward(case, training=training)
    data = inputs(case)
    expected = observe(reference(case.model), case, backward=False).logits
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject).train(training)
    rest, log = told(case, data, derived=False), Log()
    with at_work("return_type"), torch.no_grad():
        with bridge.hooks(fwd_hooks=[(lambda name: True, log.listener(""))]):
            nothing = bridge(data.tokens, return_type=None, **rest)
        logits, _ = bridge(data.tokens, return_type="logits_and_cache", **rest)
    if nothing is not None:
        yield Gap("return_type=None", "contract", f"returned a {type(nothing).__name__}")
    # An adapter may declare more than it must, and need not show what is known to be dead.
    for name in sorted(observable(case.model).keys() - log.told[""]):
        yield Gap(name, "missing", "never fired with return_type=None")
    yield from bitwise("logits of logits_and_cache", expected, logits)
    yield from _of_a_second_chunk(subject, case, data)
    hooks: list[tuple[Any, Any]] = []
    if drawing(case)(2):
        hooks, expected = [("unembed.hook_out", lambda tensor, hook: tensor / 2)], expected / 2
    for given in (None, _labels(case, data)):
        name = "loss" if given is None else "loss of labels"
        labels = _counted(data.tokens if given is None else given, data.attention_mask)
        asked = rest if given is None else {**rest, "labels": given}
        with at_work(name), torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            logits = bridge(data.tokens, **asked)
            each = bridge(data.tokens, return_type="loss", loss_per_token=True, **asked)
            beside, mean = bridge(data.tokens, return_type="both", **asked)
            alone = bridge(data.tokens, return_type="loss", **asked)
        yield from bitwise(f"logits without {name}", expected, logits)
        yield from bitwise(f"logits beside {name}", expected, beside)
        losses = _losses(expected, labels)
        yield from bitwise(f"{name} per token", losses, each)
        yield from bitwise(f"{name}, alone and beside logits", mean, alone)
        if _any(labels):
            due = _mean(losses, labels)
            yield from within(of_loss(expected.dtype), name, due, mean.to(due.dtype))


@check(
    "returns.labels",
    "The wrapped model, called with labels of which some are -100, has Hugging Face's loss and "
    "gradients bit for bit; the bridge's own loss, with labels and without, in all, by token or "
    "from the logits beside it, has the gradients of a cross entropy of the reference's logits.",
    predicting_cases,
    examples=0.15,
)
def labels(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three losses, with a backward of each, beside the reference's."""
    data = inputs(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    marked = _counted(_labels(case, data), data.attention_mask)
    plain = _counted(data.tokens, data.attention_mask)
    derived = told(case, data, derived=True)
    rest = told(case, data, derived=False)

    def run(who: Subject, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss and the gradients of the parameters."""
        (who.bridge or who.model).train(case.run.training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.run.token_seed)
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return {"loss": value.detach(), **taken_gradients(who)}

    def theirs(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(data.tokens, labels=marked, **derived).loss
        return loss

    def by_hand(labels: torch.Tensor) -> torch.Tensor:
        return _mean(_losses(truth.model(data.tokens, **derived).logits, labels), labels)

    ours = partial(bridge, data.tokens, return_type="loss", **rest)

    def beside() -> torch.Tensor:
        """The loss by way of what is returned beside it."""
        logits, _ = bridge(data.tokens, return_type="both", **rest)
        return _mean(_losses(logits, plain), plain)

    def each() -> torch.Tensor:
        return _mean(ours(loss_per_token=True), plain)

    ways: dict[str, tuple[torch.Tensor, Loss, Loss]] = {
        "the wrapped model": (marked, lambda: theirs(truth.model), lambda: theirs(subject.model)),
        "labels": (marked, lambda: by_hand(marked), partial(ours, labels=marked)),
        "tokens": (plain, lambda: by_hand(plain), ours),
        "the logits of both": (plain, lambda: by_hand(plain), beside),
        "each token": (plain, lambda: by_hand(plain), each),
    }
    for name, (counted, reference_loss, loss) in ways.items():
        if not _any(counted):
            continue
        due = run(truth, reference_loss)
        with at_work(f"the loss of {name}"):
            got = run(subject, loss)
        value, loss_value = due.pop("loss"), got.pop("loss")
        dtype = loss_value.dtype
        allowance = exactly(dtype) if name == "the wrapped model" else of_loss(dtype)
        yield from within(allowance, f"loss of {name}", value, loss_value.to(value.dtype))
        yield from differing_gradients(due, got, of=f", loss of {name}")
