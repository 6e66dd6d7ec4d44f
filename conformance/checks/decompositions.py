"""A cache's residual stream taken apart: by component, by head, by neuron, and into all of them."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from conformance.checks.pieces import Piece, total
from conformance.checks.registry import Adapter, check
from conformance.checks.taken import Taken, large_cases, taken, told_of
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import at_work

Asked = dict[str, Any]

# Releases before 4.2 stack neurons for an attention only.
_ASKS_MLP_INPUT = "mlp_input" in signature(ActivationCache.stack_neuron_results).parameters


def _call(run: Taken, name: str, **asked: Any) -> tuple[str, torch.Tensor, list[str]]:
    """What a method of the cache gives for what is asked: with how it was called, and labels."""
    told = f"{name}({told_of(asked)})"
    with at_work(told), torch.no_grad():
        stack, labels = getattr(run.cache, name)(**asked, return_labels=True)
    return told, stack, list(labels)


def _where(run: Taken) -> Asked:
    return {"layer": run.asked, "pos_slice": run.pos_slice}


def _less(run: Taken, pieces: list[Piece], mlp_input: bool = False) -> Piece:
    """What the pieces leave of the residual stream."""
    whole = run.due.residual(run.layer, mlp_input)
    left = whole.value - total(pieces, "").value if pieces else whole.value
    return Piece("remainder", left, total([whole, *pieces], "").sizes)


def _logits_gaps(run: Taken, name: str, got: torch.Tensor, pieces: list[Piece]) -> Iterator[Gap]:
    """The gap between Hugging Face's logits and the sum of what normalized pieces say of them."""
    if run.layer != run.case.model.num_hidden_layers:
        return
    onto = run.due.unembedding
    each = [piece.projected(onto) for piece in pieces]
    whole = Piece("logits", run.due.logits, normalized=True)
    yield from run.sum_gaps(f"{name} @ W_U", each, got.double() @ onto, whole)


def components_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``decompose_resid``."""
    mode = ("all", "attn", "mlp")[run.draw(3)]
    whole = mode == "all"
    asked = {"mode": mode, "mlp_input": run.mlp_input, "apply_ln": run.coin()}
    pieces = run.due.writers(run.layer, run.mlp_input, mode, True)
    less = pieces[1:]
    if less and run.draw(3) == 0:
        pieces, whole, asked["incl_embeds"] = less, False, False
    name, got, labels = _call(run, "decompose_resid", **_where(run), **asked)
    residual = run.due.residual(run.layer, run.mlp_input)
    if asked["apply_ln"]:
        pieces = run.due.normalized(pieces, run.layer, run.mlp_input)
        (residual,) = run.due.normalized([residual], run.layer, run.mlp_input)
        if whole:
            yield from _logits_gaps(run, name, got, pieces)
    yield from run.gaps(name, pieces, got, labels)
    if whole:
        yield from run.sum_gaps(name, pieces, got, residual)


def accumulated_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``accumulated_resid``; at the end each residual stream has a scale of its own."""
    layers, middle = run.case.model.num_hidden_layers, run.coin()
    asked = {"incl_mid": middle, "mlp_input": run.mlp_input, "apply_ln": run.coin()}
    name, got, labels = _call(run, "accumulated_resid", **_where(run), **asked)
    pieces = []
    for block in range(run.layer + 1):
        label = "final_post" if block == layers else f"{block}_pre"
        pieces.append(run.due.residual(block, False, label))
        if (middle and block < run.layer) or (run.mlp_input and block == run.layer):
            pieces.append(run.due.residual(block, True, f"{block}_mid"))
    if asked["apply_ln"] and run.layer == layers:
        pieces = run.due.through_final_norm(pieces)
    elif asked["apply_ln"]:
        pieces = run.due.normalized(pieces, run.layer, run.mlp_input)
    yield from run.gaps(name, pieces, got, labels)


@check(
    "decompositions.components",
    "decompose_resid and accumulated_resid give Hugging Face's own tensors, of the layers and "
    "positions asked for, in order and rightly named; through a LayerNorm with the scale of the "
    "layer that reads them; the components sum to its input and, at the end, to the logits.",
    large_cases,
    examples=0.8,
)
def components(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Bit for bit where no LayerNorm is applied, for one drawn combination of all options."""
    run = taken(adapter, case)
    yield from components_gaps(run)
    yield from accumulated_gaps(run)


def heads_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``stack_head_results``."""
    rest = bool(run.layer) and run.coin()
    asked = {"incl_remainder": rest, "apply_ln": run.coin()}
    pieces = run.due.heads(run.layer)
    if rest:
        pieces = [*pieces, _less(run, pieces)]
    if asked["apply_ln"]:
        pieces = run.due.normalized(pieces, run.layer, False)
    if run.coin():
        with at_work("compute_head_results"), torch.no_grad():
            run.cache.compute_head_results()  # type: ignore[no-untyped-call]
    name, got, labels = _call(run, "stack_head_results", **_where(run), **asked)
    yield from run.gaps(name, pieces, got, labels)
    if asked["apply_ln"] and rest:
        yield from _logits_gaps(run, name, got, pieces)


@check(
    "decompositions.heads",
    "stack_head_results gives each head's z times its columns of Hugging Face's output projection, "
    "also where heads share keys and values, and as remainder all that is left; with the remainder "
    "and the final LayerNorm it sums to the logits.",
    large_cases,
    examples=0.7,
)
def heads(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Of one layer, some positions and options that are drawn, before or after computing all."""
    yield from heads_gaps(taken(adapter, case))


def _some_neurons(run: Taken) -> tuple[Any, list[int]]:
    """A neuron_slice, and the neurons that it picks."""
    every = list(range(run.case.model.intermediate_size))
    count = len(every)
    one, start, stop = run.draw(2 * count) - count, run.draw(count + 1), run.draw(count + 1)
    some = [run.draw(2 * count) - count for _ in range(2)]
    ways: list[tuple[Any, list[int]]] = [
        (None, every),
        (one, [every[one]]),
        (Slice(one), [every[one]]),
        ((start, stop), every[start:stop]),
        ((start, None, 2), every[start::2]),
        (some, [every[at] for at in some]),
    ]
    return ways[run.draw(len(ways))]


def _projection(run: Taken, normalizes: bool) -> torch.Tensor | None:
    """Directions to project onto, ``[d_model]`` or ``[d_model, direction]``, or None."""
    which = run.draw(3)
    if which == 0 or (normalizes and run.dtype.itemsize < 4):
        return None  # known defect projection-of-short-dtypes
    size = run.case.model.hidden_size, which + 1
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(run.draw(2**16)))
    drawn = drawn.to(run.dtype)
    return drawn[:, 0] if which == 1 else drawn


def _projected(pieces: list[Piece], onto: torch.Tensor | None) -> list[Piece]:
    if onto is None:
        return pieces
    wide = onto.double()
    if onto.ndim == 2:
        return [piece.projected(wide) for piece in pieces]
    flat = [piece.projected(wide[:, None]) for piece in pieces]
    return [Piece(p.label, p.value[..., 0], p.sizes[..., 0], p.normalized) for p in flat]


def neurons_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``stack_neuron_results``."""
    chosen, neurons = _some_neurons(run)
    normalizes, mlp_input = run.coin(), run.mlp_input and _ASKS_MLP_INPUT
    rest = bool(run.layer or mlp_input) and run.coin()
    onto = _projection(run, normalizes)
    asked = {"neuron_slice": chosen, "apply_ln": normalizes}
    asked |= {"incl_remainder": rest, "project_output_onto": onto}
    if _ASKS_MLP_INPUT:
        asked["mlp_input"] = mlp_input
    if normalizes and onto is None and not rest and not neurons:
        return  # nothing to normalize
    pieces = run.due.neurons(run.layer, neurons)
    if rest:
        pieces = [*pieces, _less(run, pieces, mlp_input)]
    if normalizes:
        pieces = run.due.normalized(pieces, run.layer, mlp_input)
    name, got, labels = _call(run, "stack_neuron_results", **_where(run), **asked)
    yield from run.gaps(name, _projected(pieces, onto), got, labels)
    if normalizes and rest and onto is None:
        yield from _logits_gaps(run, name, got, pieces)


@check(
    "decompositions.neurons",
    "stack_neuron_results gives each asked neuron's activation times its column of Hugging Face's "
    "down projection, bit for bit, and as remainder all that is left, also projected onto "
    "directions and through a LayerNorm.",
    cases,
    examples=0.3,
)
def neurons(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Neurons are drawn one by one, as ranges and as lists."""
    yield from neurons_gaps(taken(adapter, case))


def full_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``get_full_resid_decomposition``, with neurons and without."""
    normalizes = run.coin()
    onto = _projection(run, normalizes)
    where, mlp_input = _where(run), run.mlp_input
    for expands in (True, False):
        asked = {"expand_neurons": expands, "apply_ln": normalizes, "mlp_input": mlp_input}
        name, got, labels = _call(
            run, "get_full_resid_decomposition", **where, **asked, project_output_onto=onto
        )
        every = range(run.case.model.intermediate_size)
        pieces = [
            *run.due.heads(run.layer + mlp_input),
            *(
                run.due.neurons(run.layer, every)
                if expands
                else run.due.writers(run.layer, False, "mlp", False)
            ),
            run.due.shown("embed", "embed.hook_out"),
            run.due.bias(run.layer, mlp_input),
        ]
        whole = run.due.residual(run.layer, mlp_input)
        if normalizes:
            pieces = run.due.normalized(pieces, run.layer, mlp_input)
            (whole,) = run.due.normalized([whole], run.layer, mlp_input)
        shown, (whole,) = _projected(pieces, onto), _projected([whole], onto)
        yield from run.gaps(name, shown, got, labels)
        yield from run.sum_gaps(name, shown, got, whole)
        if normalizes and onto is None:
            yield from _logits_gaps(run, name, got, pieces)


@check(
    "decompositions.full",
    "get_full_resid_decomposition is every head, every neuron (or MLP), the embedding and all "
    "biases: together the residual stream that they decompose and, through the final LayerNorm "
    "and the unembedding, Hugging Face's logits.",
    cases,
    examples=0.4,
)
def full(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """With neurons and without, in the same case."""
    yield from full_gaps(taken(adapter, case))
