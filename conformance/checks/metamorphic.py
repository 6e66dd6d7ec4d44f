"""Relations between inputs: how a second run of the same bridge must follow from the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint

from conformance.checks.forked import is_exact
from conformance.checks.registry import Adapter, check
from conformance.checks.relations import nudged, related_gaps, underived
from conformance.checks.support import turn
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    compare_values,
)
from conformance.inputs import Inputs, inputs
from conformance.observe import observe, sites_of
from conformance.points import OnPurposeError, hook_points
from conformance.spec import ROPE_TYPES, Case, ModelSpec, RunSpec
from conformance.strategies import WIDE_DTYPES, cases, legal_flags, model_specs, run_specs
from conformance.subjects import Subject, SubjectError, bridged, reference
from conformance.tolerance import exactly


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.run.token_seed + 1)


def _is_scores(name: str) -> bool:
    return name.endswith(("hook_attn_scores", "hook_pattern"))


def open_runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """Runs in which every query sees a key: one that sees none attends to all, later ones too."""
    paddings, lengths = st.sampled_from(("none", "right")), st.sampled_from(range(2, 12))
    return run_specs(model, paddings=paddings, lengths=lengths, chunks=st.just(1))


@check(
    "metamorphic.causality",
    "Other tokens later in the text change nothing before them, at no site and in no gradient "
    "that is sent back from there; and nothing after a position gets a gradient from before it.",
    lambda: cases(runs=open_runs),
    examples=0.25,
)
def causality(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bitwise: the shapes are the same, and what differs is multiplied by zeros."""
    data, draw = inputs(case), _generator(case)
    last = int(torch.randint(0, case.run.seq_len - 1, (), generator=draw))
    probe = data.probe.clone()
    probe[:, last + 1 :] = 0
    tokens = data.tokens.clone()
    later = tokens[:, last + 1 :]
    tokens[:, last + 1 :] = torch.randint(0, case.model.vocab_size, later.shape, generator=draw)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    observe(subject, case, backward=False)
    every = sites_of(subject, case)
    expected = observe(reference(case.model), case, sites=every, data=replace(data, probe=probe))
    changed = replace(data, tokens=tokens, probe=probe)
    actual = observe(subject, case, sites=underived(every), data=changed)

    def until(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if _is_scores(name):
            return tensor[:, :, : last + 1, : last + 1]
        return tensor[:, : last + 1]

    yield from related_gaps(
        expected, actual, every, lambda name, kind, *both: tuple(until(name, x) for x in both)
    )
    yield from compare_parameters(expected, actual)
    for name, gradient in actual.gradients.items():
        after = gradient[:, :, last + 1 :] if _is_scores(name) else gradient[:, last + 1 :]
        if name not in ("rotary_emb.hook_cos", "rotary_emb.hook_sin") and bool(after.any()):
            detail = f"not zero after position {last}, before which all of it comes from"
            yield Gap(name, "gradient", detail)


def whole_runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """Runs in eval mode and in one chunk: dropout would draw other numbers for other shapes."""
    return run_specs(model, chunks=st.just(1), trainings=st.just(False))


def runs_of_rows(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """As `whole_runs`, of several rows, most of them at positions of their own."""
    return run_specs(
        model,
        batches=st.sampled_from(range(2, 5)),
        paddings=st.sampled_from(("rows", "left", "gap", "none")),
        positions=st.sampled_from(("derived", "shuffled")),
        chunks=st.just(1),
        trainings=st.just(False),
    )


@check(
    "metamorphic.rows",
    "Rows of a batch know nothing of each other: in another order and twice, or alone, each has "
    "the values that it had, and no gradient goes from one to another.",
    lambda: cases(models=model_specs(dtypes=WIDE_DTYPES), runs=runs_of_rows),
    examples=0.25,
)
def rows(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Values but for rounding: PyTorch multiplies matrices of other sizes in other blocks."""
    data, batch = inputs(case), case.run.batch
    order = torch.randperm(batch, generator=_generator(case))
    subject, truth = bridged(case.model, adapter, prepared=case.run.prepared), reference(case.model)
    every = sites_of(subject, case)
    probe = torch.zeros_like(data.probe)
    probe[order[0]] = data.probe[order[0]]
    one = observe(subject, case, sites=underived(every), data=replace(data, probe=probe))
    for name, gradient in one.gradients.items():
        others = gradient[order[1:]] if len(gradient) == batch else gradient[:0]
        if bool(others.any()):
            yield Gap(name, "gradient", f"not zero outside of row {order[0]}, where it comes from")
    order = order[:1] if case.run.token_seed % 3 == 0 else torch.cat([order, order.flip(0)])
    picked = Inputs(
        data.tokens[order],
        None if data.attention_mask is None else data.attention_mask[order],
        None if data.position_ids is None else data.position_ids[order],
        data.probe[order],
    )
    again = replace(case, run=replace(case.run, batch=len(order)), tokens=())
    expected, moved = observe(truth, case, sites=every, backward=False), nudged(truth, case, every)
    actual = observe(subject, again, sites=underived(every), data=picked, backward=False)

    def of_rows(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        # Cosines and sines that are the same for all rows are there once.
        return (due[order], got) if len(due) == batch and len(got) == len(order) else None

    yield from related_gaps(expected, actual, every, of_rows, moved=moved)


def short_runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
    """Runs without padding that leave some of a model's positions."""
    return run_specs(
        model,
        paddings=st.just("none"),
        positions=st.just("derived"),
        lengths=st.sampled_from(range(1, max(2, model.max_position_embeddings - 3))),
        chunks=st.just(1),
        trainings=st.just(False),
    )


@check(
    "metamorphic.padding",
    "Padding of any content and number, on either side, changes nothing at real tokens: positions "
    "count those alone, and gradients know nothing of the rest.",
    lambda: cases(models=model_specs(dtypes=st.just("float32")), runs=short_runs),
    examples=0.2,
)
def padding(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Another number of pads, but for rounding, and bitwise another content of the same pads."""
    data, draw, run = inputs(case), _generator(case), case.run
    room = case.model.max_position_embeddings
    total = int(torch.randint(run.seq_len, room + 1, (), generator=draw))
    starts = torch.randint(0, total - run.seq_len + 1, (run.batch, 1), generator=draw)
    at = starts + torch.arange(run.seq_len)
    mask = torch.zeros(run.batch, total, dtype=torch.long).scatter(1, at, 1)
    padded = replace(case, run=replace(run, seq_len=total), tokens=())

    def filled() -> Inputs:
        pads = torch.randint(0, case.model.vocab_size, (run.batch, total), generator=draw)
        probe = torch.zeros(run.batch, total, case.model.vocab_size)
        probe = probe.scatter(1, at.unsqueeze(-1).expand_as(data.probe), data.probe)
        return Inputs(pads.scatter(1, at, data.tokens), mask, None, probe)

    subject, truth = bridged(case.model, adapter, prepared=run.prepared), reference(case.model)
    every = sites_of(subject, case)
    expected, moved = observe(truth, case, sites=every, backward=False), nudged(truth, case, every)
    plain = underived(every)
    first, second = (observe(subject, padded, sites=plain, data=filled()) for _ in range(2))

    rows = torch.arange(run.batch)[:, None]

    def real(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.expand(run.batch, *tensor.shape[1:])  # cosines may be there but once
        if not _is_scores(name):
            return tensor[rows, at]
        last = tensor.permute(0, 2, 3, 1)[rows[..., None], at[:, :, None], at[:, None, :]]
        return last.permute(0, 3, 1, 2)

    def unpadded(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        return due.expand(run.batch, *due.shape[1:]), real(name, got)

    def same(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        return real(name, due), real(name, got)

    yield from related_gaps(expected, first, every, unpadded, moved=moved, label="padded: ")
    yield from related_gaps(first, second, every, same, label="other pads: ")
    yield from compare_parameters(first, second)


@check(
    "metamorphic.positions",
    "Shifting all positions by as much turns queries and keys alike: what attention makes of them "
    "stays, in a bridge that has seen the same tokens elsewhere.",
    lambda: cases(
        models=model_specs(dtypes=WIDE_DTYPES, rooms=st.sampled_from(range(8, 25))), runs=short_runs
    ),
    examples=0.2,
)
def positions(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """But for rounding. Cosines and sines are those of the shifted positions, bitwise."""
    data = inputs(case)
    room = case.model.max_position_embeddings - case.run.seq_len
    shift = int(torch.randint(1, room + 1, (), generator=_generator(case)))
    at = torch.arange(case.run.seq_len)[None].expand(case.run.batch, -1)
    subject, truth = bridged(case.model, adapter, prepared=case.run.prepared), reference(case.model)
    every = sites_of(subject, case)
    expected = observe(truth, case, sites=every, backward=False)
    moved = nudged(truth, case, every, angles=4)
    observe(subject, case, backward=False)
    shifted = replace(data, position_ids=at + shift)
    actual = observe(subject, case, sites=underived(every), data=shifted, backward=False)
    turned = truth.model.model.rotary_emb(expected.values["embed.hook_out"], at + shift)
    due_there = dict(zip(("hook_cos", "hook_sin"), turned, strict=True))

    def related(name: str, kind: str, due: torch.Tensor, got: torch.Tensor) -> Any:
        hook = name.rpartition(".")[2]
        return None if hook in (*due_there, "hook_rot_q", "hook_rot_k") else (due, got)

    yield from related_gaps(expected, actual, every, related, moved=moved)
    for name, got in actual.values.items():
        if (due := due_there.get(name.rpartition(".")[2])) is not None:
            gap = compare_tensors(f"shifted: {name}", due, got, exactly(due.dtype))
            yield from [gap] if gap else []


def _interrupted(subject: Subject, case: Case) -> None:
    """A forward that a hook of ours ends, at a drawn site."""
    points = list(hook_points(subject).values())

    def end(tensor: torch.Tensor, hook: HookPoint) -> None:
        raise OnPurposeError

    point = points[case.run.token_seed % len(points)]
    point.add_hook(end)
    try:
        observe(subject, case, backward=False)
    except SubjectError as error:
        if not isinstance(error.__cause__, OnPurposeError):
            raise
    finally:
        point.remove_hooks("both")


@check(
    "metamorphic.history",
    "What a bridge did before, other shapes, longer texts, masks, caches, train mode, a backward "
    "or a forward that a hook ended, leaves nothing in what it does now.",
    lambda: cases(models=model_specs(rope_types=st.sampled_from((*ROPE_TYPES, "dynamic")))),
    examples=0.3,
)
def history(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bitwise at every site: a bridge with a past is a new one."""
    run, room = case.run, case.model.max_position_embeddings
    length = 1 + (run.seq_len + run.token_seed) % room
    other = RunSpec(
        token_seed=run.token_seed ^ 1,
        batch=1 + run.token_seed % 3,
        seq_len=length,
        padding="none" if run.padding != "none" else "right",
        positions="derived" if run.positions != "derived" else "shuffled",
        use_cache=not run.use_cache,
        chunks=min(2, length) if not run.use_cache else 1,
        training=not run.training,
    )
    same_shape = replace(run, token_seed=run.token_seed ^ 2, chunks=1)
    subject = bridged(case.model, adapter, prepared=run.prepared)
    observe(subject, replace(case, run=other, tokens=()))
    _interrupted(subject, replace(case, run=replace(same_shape, training=True), tokens=()))
    every = sites_of(subject, case)
    plain = underived(every)
    observe(subject, replace(case, run=same_shape, tokens=()), sites=plain)
    truth = reference(case.model)
    if case.model.rope_type == "dynamic":  # of which Hugging Face itself may remember a longer text
        roomy = replace(case.model, max_position_embeddings=2 * room)
        beyond = RunSpec(token_seed=run.token_seed, seq_len=room + 1 + run.token_seed % room)
        for who in (truth, subject):
            observe(who, replace(case, model=roomy, run=beyond, tokens=()), backward=False)
    expected = observe(truth, case, sites=every)
    actual = observe(subject, case, sites=plain)
    yield from compare_values(expected, actual, every)
    if run.chunks == 1:
        yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


@check(
    "metamorphic.identity",
    "Hooks that give back a copy of what they saw, at every site at once, change no bit.",
    lambda: cases(runs=lambda model: run_specs(model, flags=legal_flags())),
    examples=0.2,
)
def identity(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The derived sites included, and, of an adapter whose flags are exact, those behind flags."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    if is_exact(adapter):
        turn(subject, case.run.flags, True)
    expected = observe(reference(case.model), case)
    points = hook_points(subject).values()
    for point in points:
        point.add_hook(lambda tensor, hook: tensor.clone())
    try:
        actual = observe(subject, case)
    finally:
        for point in points:
            point.remove_hooks("both")
    gap = compare_tensors("logits", expected.logits, actual.logits, exactly(expected.logits.dtype))
    yield from [gap] if gap else []
    yield from compare_parameters(expected, actual)
