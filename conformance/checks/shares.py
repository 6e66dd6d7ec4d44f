"""What a cache reads out of pieces: through a LayerNorm, into logits, and stacked over layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from conformance.checks.pieces import Piece
from conformance.checks.registry import Adapter, check
from conformance.checks.taken import Taken, taken, told_of
from conformance.compare import Gap, bitwise
from conformance.spec import Case
from conformance.strategies import cases
from conformance.subjects import at_work


def _some_rows(run: Taken) -> tuple[Any, Any]:
    """A batch_slice, and the same as an index of PyTorch's."""
    rows = run.case.run.batch
    if run.batchless or run.coin():
        return None, slice(None)
    one = run.draw(2 * rows) - rows
    stop = run.draw(rows) + 1
    some = [run.draw(2 * rows) - rows for _ in range(2)]
    ways: list[tuple[Any, Any]] = [(one, one), ((stop,), slice(stop)), (some, some)]
    return ways[run.draw(3)]


def _stack(run: Taken, pieces: list[Piece]) -> torch.Tensor:
    """The pieces as a user has them: in the model's dtype, at the positions asked for."""
    return torch.stack([run.view(piece.value).to(run.dtype) for piece in pieces])


def _picked(run: Taken, tensor: torch.Tensor, rows: Any) -> torch.Tensor:
    seen = run.view(tensor)
    return seen if run.batchless else seen[rows]


@check(
    "decompositions.norms",
    "apply_ln_to_stack subtracts the mean and divides by the LayerNorm's own denominator, of the "
    "layer, positions and rows asked for; recomputed, by Hugging Face's final norm, bit for bit.",
    cases,
    examples=0.6,
)
def norms(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Of what the components before the layer have written."""
    run = taken(adapter, case)
    batch_slice, rows = _some_rows(run)
    recomputes = run.layer == case.model.num_hidden_layers and run.coin()
    pieces = run.due.writers(run.layer, run.mlp_input, "all", True)
    due = run.due.normalized(pieces, run.layer, run.mlp_input)
    if recomputes:
        due = run.due.through_final_norm(pieces)
    asked = {"layer": run.asked, "mlp_input": run.mlp_input, "pos_slice": run.pos_slice}
    asked |= {"batch_slice": batch_slice, "has_batch_dim": not run.batchless}
    name = f"apply_ln_to_stack({told_of({**asked, 'recompute_ln': recomputes})})"
    stack = _stack(run, pieces)
    with at_work(name), torch.no_grad():
        got = run.cache.apply_ln_to_stack(stack, **asked, recompute_ln=recomputes)
    yield from run.gaps(name, due, got, view=lambda tensor: _picked(run, tensor, rows))


def _some_tokens(run: Taken, shape: torch.Size) -> list[tuple[Any, torch.Tensor]]:
    """Two ways to name tokens, right and wrong ones, and what each is at ``[batch, pos]``.

    Args:
        run: What is asked.
        shape: Of the rows and positions that are left, of which one axis or both may be gone.
    """
    words = run.case.model.vocab_size
    generator = torch.Generator().manual_seed(run.draw(2**16))

    def drawn(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(words, size, generator=generator)

    kind = run.draw(4) if 0 not in shape else run.draw(2)
    found: list[tuple[Any, torch.Tensor]] = []
    by_row = not run.batchless and len(shape) == 2 and kind == 2
    for _ in range(2):
        one = drawn(())
        if kind == 0:
            found.append((int(one), one.expand(shape)))
        elif kind == 1:
            found.append((one, one.expand(shape)))
        else:
            each = drawn(tuple(shape[:1]) if by_row else tuple(shape))
            found.append((each, each[:, None].expand(shape) if by_row else each))
    return found


def shares_gaps(run: Taken) -> Iterator[Gap]:
    """Those of ``logit_attrs``: each component's share, and the sum of all."""
    last = run.case.model.num_hidden_layers
    batch_slice, rows = _some_rows(run)
    pieces = run.due.writers(last, False, "all", True)
    logits = _picked(run, run.due.logits, rows)
    shape = logits.shape[:-1]
    (right, where), (wrong, elsewhere) = _some_tokens(run, shape)
    onto, against = run.due.unembedding.T[where], run.due.unembedding.T[elsewhere]
    minus = bool(run.draw(3))
    asked = {"incorrect_tokens": wrong if minus else None, "pos_slice": run.pos_slice}
    asked |= {"batch_slice": batch_slice, "has_batch_dim": not run.batchless}
    name = f"logit_attrs({told_of({'tokens': right, **asked})})"
    stack = _stack(run, pieces)
    with at_work(name), torch.no_grad():
        got = run.cache.logit_attrs(stack, right, **asked)
    direction = onto - against if minus else onto
    size = onto.abs() + against.abs() if minus else onto.abs()
    due = []
    for piece in run.due.normalized(pieces, last, False):
        value = (_picked(run, piece.value, rows) * direction).sum(-1)
        sizes = (_picked(run, piece.sizes, rows) * size).sum(-1)
        due.append(replace(piece, value=value, size=sizes))
    yield from run.gaps(name, due, got, view=lambda tensor: tensor)
    said = logits.gather(-1, where[..., None])[..., 0]
    if minus:
        said = said - logits.gather(-1, elsewhere[..., None])[..., 0]
    whole = Piece("logits", said, normalized=True)
    yield from run.sum_gaps(name, due, got, whole, view=lambda tensor: tensor)
    if isinstance(right, int):
        try:
            run.cache.logit_attrs(stack, right, torch.zeros(2, dtype=torch.long))
        except ValueError:
            return
        except Exception as error:
            yield Gap("logit_attrs", "contract", f"{type(error).__name__}: {error}")
            return
        yield Gap("logit_attrs", "contract", "tokens of two shapes are not refused")


@check(
    "decompositions.logits",
    "logit_attrs gives each component's share of the logits of tokens, or of their difference to "
    "other tokens, and the shares sum to Hugging Face's own, for the tokens, positions and rows "
    "asked for.",
    cases,
    examples=0.3,
)
def logits(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Tokens are a number, a tensor of one, one for each row, or one for each position."""
    yield from shares_gaps(taken(adapter, case))


# Names that `stack_activation` takes, and where each tensor is.
_STACKED = {
    ("resid_pre", None): "hook_in",
    ("resid_mid", None): "ln2.hook_in",
    ("resid_post", None): "hook_out",
    ("attn_out", None): "attn.hook_out",
    ("mlp_out", None): "mlp.hook_out",
    ("q", None): "attn.q.hook_out",
    ("k", "attn"): "attn.k.hook_out",
    ("v", "a"): "attn.v.hook_out",
    ("z", None): "attn.o.hook_in",
    ("rot_q", "attn"): "attn.hook_rot_q",
    ("pattern", None): "attn.hook_pattern",
    ("attn_scores", None): "attn.hook_attn_scores",
    ("pre", None): "mlp.gate.hook_out",
    ("post", "mlp"): "mlp.out.hook_in",
}


@check(
    "decompositions.stacked",
    "stack_activation gives Hugging Face's own tensors of all layers before the one asked for, bit "
    "for bit, and so does the cache by name and layer, from the front and from the end.",
    cases,
    examples=0.2,
)
def stacked(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Five drawn names of a cache, some rows of which may have been sliced off before."""
    run = taken(adapter, case)
    batch_slice, rows = _some_rows(run)
    layers = case.model.num_hidden_layers
    cache = run.cache
    if batch_slice is not None:
        with at_work(f"apply_slice_to_batch_dim({batch_slice})"):
            cache = cache.apply_slice_to_batch_dim(batch_slice)
    elif not run.batchless:
        with at_work("apply_slice_to_batch_dim(0)"):
            run.cache.apply_slice_to_batch_dim(0)  # of which the cache itself knows nothing
    for name, held in run.cache.cache_dict.items():
        due = run.values.get(name)
        if due is not None and not run.batchless and held.shape != due.shape:
            yield Gap(name, "shape", f"{list(held.shape)}: a slice has cut the cache itself")
    for _ in range(5):
        (name, kind), site = list(_STACKED.items())[run.draw(len(_STACKED))]
        layer = 1 + run.draw(layers)
        asked: Any = (-1, None)[run.draw(2)] if layer == layers else layer
        shown = [run.values[f"blocks.{block}.{site}"] for block in range(layers)]
        due = torch.stack([t[0] if run.batchless else t[rows] for t in shown])
        with at_work(f"stack_activation({name!r}, {asked}, {kind!r})"):
            got = cache.stack_activation(name, asked, kind)
            single = cache[name, layer - 1 - layers, kind]
        yield from bitwise(f"stack_activation({name!r}, {asked}, {kind!r})", due[:layer], got)
        yield from bitwise(f"cache[{name!r}, {layer - 1 - layers}]", due[layer - 1], single)
