"""The tensors of a run, drawn from its spec alone, so that every subject gets the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conformance.spec import Case, RunSpec

# Small enough that a float16 gradient does not overflow on its way down.
PROBE_SCALE = 0.1


@dataclass(frozen=True)
class Inputs:
    """What a run feeds to a model.

    Attributes:
        tokens: ``[batch, pos]``, int64.
        attention_mask: ``[batch, pos]`` of 0 and 1, or None if nothing is masked.
        position_ids: ``[batch, pos]`` where they are given explicitly, or None where they follow
            from the mask: a bridge derives them itself, the reference is told `derived_positions`.
        probe: ``[batch, pos, d_vocab]``, float32: the gradient sent back through the logits.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    probe: torch.Tensor


def _row_mask(kind: str, length: int, draw: torch.Generator) -> torch.Tensor:
    """One row of the mask. At least one token stays, the last one if the padding is inside."""
    mask = torch.ones(length, dtype=torch.long)
    if length == 1 or kind == "none":
        return mask
    count = int(torch.randint(1, length, (), generator=draw))
    if kind == "left":
        mask[:count] = 0
    elif kind == "right":
        mask[-count:] = 0
    elif length == 2:
        mask[0] = 0
    else:
        inner = 1 + torch.randperm(length - 2, generator=draw)[: max(count - 1, 1)]
        mask[inner] = 0
    return mask


def _mask(run: RunSpec, draw: torch.Generator) -> torch.Tensor | None:
    if run.padding == "none":
        return None
    mixed = ("none", "left", "right", "gap")
    kinds = [run.padding if run.padding != "rows" else mixed[row % 4] for row in range(run.batch)]
    return torch.stack([_row_mask(kind, run.seq_len, draw) for kind in kinds])


def derived_positions(mask: torch.Tensor) -> torch.Tensor | None:
    """Positions that count the attended tokens: ``cumsum(mask) - 1``.

    Only real tokens' positions mean anything. The others follow transformer_lens, so that every
    site can be compared everywhere: a row that masks no token before a real one keeps 0, 1, 2, ...
    also on its padding, a slot before the first real token gets 0, and where no row moves there is
    nothing to tell (None).

    Args:
        mask: ``[batch, pos]`` of 0 and 1, of all tokens so far.
    """
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = torch.arange(mask.shape[1]).expand_as(mask)
    moved = ((counted != plain) & (mask != 0)).any(dim=1, keepdim=True)
    return torch.where(moved, counted, plain) if bool(moved.any()) else None


def _given(run: RunSpec, room: int, draw: torch.Generator) -> torch.Tensor:
    if run.positions == "shuffled":
        rows = [torch.randperm(room, generator=draw)[: run.seq_len] for _ in range(run.batch)]
        return torch.stack(rows)
    offset = torch.randint(0, room - run.seq_len + 1, (run.batch, 1), generator=draw)
    return offset + torch.arange(run.seq_len)


def inputs(case: Case) -> Inputs:
    """Draw the tensors of a case."""
    run, model = case.run, case.model
    draw = torch.Generator().manual_seed(run.token_seed)
    shape = (run.batch, run.seq_len)
    tokens = torch.randint(0, model.vocab_size, shape, generator=draw)
    if case.tokens:
        tokens = torch.tensor(case.tokens)
    mask = _mask(run, draw)
    if mask is not None:
        tokens = tokens.masked_fill(mask == 0, model.pad_token_id or 0)
    room = model.max_position_embeddings
    positions = None if run.positions == "derived" else _given(run, room, draw)
    probe = PROBE_SCALE * torch.randn((*shape, model.vocab_size), generator=draw)
    return Inputs(tokens, mask, positions, probe)
