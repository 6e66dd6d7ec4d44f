"""A bridge's cache beside the reference's run, and the gaps between what it gives and is due."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from conformance.checks.compatibility import process
from conformance.checks.pieces import ByHand, Piece, total
from conformance.checks.registry import Adapter
from conformance.checks.relations import WIDE, greatest_move, underived
from conformance.checks.support import bridge_of, drawing, in_one_forward, some_positions
from conformance.compare import Gap, within
from conformance.inputs import inputs
from conformance.observe import observe, options, sites_of, started
from conformance.sites import observable
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import LENGTHS, cases, model_specs, run_specs
from conformance.subjects import at_work, bridged, reference
from conformance.tolerance import exactly, of_pieces

MANY = 11  # the last block has a number of two digits
LONG = 40

View = Callable[[torch.Tensor], torch.Tensor]


def told_of(asked: Mapping[str, Any]) -> str:
    """Arguments as a gap names them, in one line; of a tensor of directions its shape."""

    def told(value: Any) -> str:
        if isinstance(value, Slice):
            return f"Slice({value.slice})"
        if not isinstance(value, torch.Tensor):
            return repr(value)
        if value.is_floating_point():
            return f"directions {list(value.shape)}"
        return f"tensor {value.tolist()}"

    return ", ".join(f"{name}={told(value)}" for name, value in asked.items())


@dataclass(frozen=True)
class Taken:
    """A bridge's cache of a run, and what its pieces must be.

    Attributes:
        case: The case, in one forward.
        bridge: The bridge.
        cache: What run_with_cache gave, without the batch axis if ``batchless``.
        due: The pieces by hand.
        values: What the reference showed, by site.
        batchless: Whether ``remove_batch_dim`` was called.
        pos_slice: The slice of positions to ask for.
        positions: The positions that it picks.
        layer: The layer to ask for, between 0 and the number of layers.
        mlp_input: Whether to ask for what the layer's MLP reads.
        draw: Draws whole numbers below a bound, for all else that is asked.
    """

    case: Case
    bridge: Any
    cache: ActivationCache
    due: ByHand
    values: Mapping[str, torch.Tensor]
    batchless: bool
    pos_slice: Any
    positions: Collection[int]
    layer: int
    mlp_input: bool
    draw: Callable[[int], int]

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        found: torch.dtype = getattr(torch, self.case.model.dtype)
        return found

    @property
    def asked(self) -> int | None:
        """The layer as it is asked for: the last has two other names."""
        last = self.layer == self.case.model.num_hidden_layers
        return (self.layer, -1, None)[self.draw(3)] if last else self.layer

    def coin(self) -> bool:
        """Heads or tails."""
        return bool(self.draw(2))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of ``[batch, pos, ...]`` is at the positions, in the cache's shape."""
        picked = tensor[:, list(self.positions)]
        picked = picked.squeeze(1) if isinstance(self.pos_slice, int) else picked
        return picked[0] if self.batchless else picked

    def gaps(
        self,
        name: str,
        pieces: Sequence[Piece],
        got: torch.Tensor,
        labels: Sequence[str] | None = None,
        view: View | None = None,
    ) -> Iterator[Gap]:
        """The gaps of a stack of pieces, and of its labels.

        Args:
            name: How the stack was asked for.
            pieces: What it must be.
            got: What it is, the pieces first.
            labels: What it calls them, if it does.
            view: What of a piece was asked for, if not what `view` leaves of it.
        """
        told = [piece.label for piece in pieces]
        if labels is not None and list(labels) != told:
            yield Gap(name, "contract", f"the labels are {list(labels)} instead of {told}")
        if len(got) != len(pieces):
            yield Gap(name, "count", f"{len(got)} pieces instead of {len(pieces)}")
            return
        for piece, tensor in zip(pieces, got, strict=True):
            yield from self._gap(f"{name}: {piece.label}", piece, tensor, view or self.view)

    def sum_gaps(
        self,
        name: str,
        pieces: Sequence[Piece],
        got: torch.Tensor,
        whole: Piece,
        view: View | None = None,
    ) -> Iterator[Gap]:
        """The gap between the sum of a stack and what the reference has as one tensor.

        Args:
            name: How the stack was asked for.
            pieces: What it must be.
            got: What it is, the pieces first.
            whole: What they are the parts of. Its own rounding, of each layer's sums, counts too.
            view: As for `gaps`.
        """
        size = total(pieces, "").sizes + whole.sizes
        layers = self.case.model.num_hidden_layers
        piece = replace(whole, size=size * (1 + layers))
        wide = got.detach().double().sum(0)
        yield from self._gap(f"{name}: the sum", piece, wide, view or self.view)

    def _gap(self, name: str, piece: Piece, got: torch.Tensor, view: View) -> Iterator[Gap]:
        narrow = torch.promote_types(self.dtype, torch.float32) if piece.normalized else self.dtype
        if torch.promote_types(got.dtype, narrow) != got.dtype:
            yield Gap(name, "dtype", f"{got.dtype} is narrower than {narrow}")
            return
        due, wide = view(piece.value), got.detach().double()
        if piece.size is None:
            yield from within(exactly(self.dtype), name, due, wide)
            return
        processed = bool(self.case.run.processing)
        size, dtype, normalized = piece.size, self.dtype, piece.normalized
        gaps = list(within(of_pieces(size, dtype, normalized, processed), name, due, wide))
        if gaps and processed and dtype in WIDE:
            moved = of_pieces(size, dtype, normalized, processed, moves=self._moves)
            gaps = list(within(moved, name, due, wide))
        yield from gaps

    @cached_property
    def _moves(self) -> float:
        """See `greatest_move`; few cases need it."""
        return greatest_move(self.due.truth, self.case, underived(observable(self.case.model)))


def large_cases() -> SearchStrategy[Case]:
    """Cases of which few have eleven blocks, of which all are asked for, and few forty tokens."""
    layers = st.sampled_from((1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, MANY))
    rooms = st.sampled_from((*range(4, 25), LONG, LONG))

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        long = model.max_position_embeddings == LONG
        return run_specs(model, lengths=st.just(LONG) if long else LENGTHS)

    return cases(models=model_specs(layers=layers, rooms=rooms), runs=runs)


def taken(adapter: Adapter, case: Case) -> Taken:
    """Run a bridge with a cache, in compatibility mode if processing is asked for."""
    case = in_one_forward(case)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    truth = reference(case.model)
    seen = observe(truth, case, sites=sites_of(subject, case), backward=False)
    if case.run.processing:
        process(subject, case)
    bridge = bridge_of(subject)
    draw = drawing(case)
    batchless = case.run.batch == 1 and bool(draw(2))
    pos_slice, positions = some_positions(case.run.seq_len, draw)
    layers = case.model.num_hidden_layers
    layer = draw(layers + 1) if draw(2) and layers < MANY else layers
    mlp_input = layer < layers and bool(draw(2))
    given = {"return_type": "logits", **options(subject, case)}
    with at_work("run_with_cache"), torch.no_grad(), started(subject, case):
        _, cache = bridge.run_with_cache(inputs(case).tokens, **given)
        if batchless:
            cache.remove_batch_dim()
    return Taken(
        case=case,
        bridge=bridge,
        cache=cache,
        due=ByHand(seen, truth, case),
        values=seen.values,
        batchless=batchless,
        pos_slice=pos_slice,
        positions=positions,
        layer=layer,
        mlp_input=mlp_input,
        draw=draw,
    )
