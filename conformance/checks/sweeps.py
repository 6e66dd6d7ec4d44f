"""The sweeps of transformer_lens.patching: each cell is one patch, made by hand on Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens import patching

from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, quiet
from conformance.compare import Gap, bitwise, labelled
from conformance.inputs import Inputs, inputs
from conformance.observe import sites_of, watched
from conformance.recorder import Observation, Recorder
from conformance.sites import Site
from conformance.spec import Case, Edit, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs, run_specs
from conformance.subjects import at_work, bridged, reference

CELLS = 6  # of a sweep at the most: others are left out through its index_df
SWEEPS_A_CASE = 3


@dataclass(frozen=True)
class Sweep:
    """One function of transformer_lens.patching.

    Attributes:
        name: What follows ``get_act_patch_``.
        row: The site that it patches, by canonical name or alias; ``{i}`` stands for the block.
        axes: Dimensions of the site's tensor that are swept beside the layers, and what the
            function calls them.
    """

    name: str
    row: str
    axes: tuple[tuple[int, str], ...]

    def site(self, every: dict[str, Site], layer: int) -> Site:
        """The site in a layer."""
        name = self.row.replace("{i}", str(layer))
        return next(site for site in every.values() if name in (site.name, *site.aliases))


_POS, _HEAD = (1, "pos"), (2, "head")
_ROW, _QUERY, _KEY = (1, "head_index"), (2, "dest_pos"), (3, "src_pos")
_OF_HEADS = {
    "out": "blocks.{i}.attn.hook_z",
    "q": "blocks.{i}.attn.hook_q",
    "k": "blocks.{i}.attn.hook_k",
    "v": "blocks.{i}.attn.hook_v",
}
_PATTERN = "blocks.{i}.attn.hook_pattern"
# On a bridge resid_mid is what ln2 reads: the residual that passes by it is not patched with it.
SWEEPS = (
    *(
        Sweep(name, f"blocks.{{i}}.hook_{name}", (_POS,))
        for name in ("resid_pre", "attn_out", "mlp_out", "resid_mid")
    ),
    *(Sweep(f"attn_head_{x}_all_pos", row, (_HEAD,)) for x, row in _OF_HEADS.items()),
    *(Sweep(f"attn_head_{x}_by_pos", row, (_POS, _HEAD)) for x, row in _OF_HEADS.items()),
    Sweep("attn_head_pattern_all_pos", _PATTERN, (_ROW,)),
    Sweep("attn_head_pattern_by_pos", _PATTERN, (_ROW, _QUERY)),
    Sweep("attn_head_pattern_dest_src_pos", _PATTERN, (_ROW, _QUERY, _KEY)),
)


class _ByHand(Recorder):
    """Puts a part of the clean run's tensors in their places, where the run has an edit.

    Attributes:
        clean: The clean run's tensors, by name.
        part: What of the edited tensor is taken from there.
    """

    clean: dict[str, torch.Tensor]
    part: tuple[int | slice, ...]

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor with the part replaced."""
        if name not in self.edits:
            return tensor
        mixed = tensor.clone()
        mixed[self.part] = self.clean[name][self.part]
        return mixed


def plain_runs(model: ModelSpec, most: int = 4) -> SearchStrategy[RunSpec]:
    """Runs as the tools of analysis make them: whole unpadded prompts, in eval mode.

    Args:
        model: The model.
        most: Greatest number of tokens.
    """
    return run_specs(
        model,
        batches=st.sampled_from((1, 2, 3)),
        lengths=st.sampled_from(range(most, 0, -1)),
        paddings=st.just("none"),
        positions=st.just("derived"),
        caches=st.just(True),  # a bridge that is given tokens alone has one
        chunks=st.just(1),
        trainings=st.just(False),
    )


def analysed_cases() -> SearchStrategy[Case]:
    """Cases of one or two layers, run as the tools of analysis run a bridge."""
    return cases(models=model_specs(layers=st.sampled_from((2, 1))), runs=plain_runs)


def pair(case: Case) -> tuple[Case, Inputs, Inputs]:
    """A case's clean prompts as a case of their own, their inputs, and the corrupted ones'."""
    clean = replace(case, run=replace(case.run, token_seed=case.run.token_seed ^ 1), tokens=())
    return clean, inputs(clean), inputs(case)


def logit_difference(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """A metric of logits ``[batch, pos, d_vocab]``: two drawn tokens at the last position."""
    vocabulary, seed = case.model.vocab_size, case.run.token_seed
    right = seed % vocabulary
    wrong = (right + 1 + seed // vocabulary % (vocabulary - 1)) % vocabulary

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, right] - logits[:, -1, wrong]).mean()

    return metric


def _drawn(case: Case) -> tuple[list[Sweep], torch.Generator]:
    draw = torch.Generator().manual_seed(case.run.token_seed)
    order = torch.randperm(len(SWEEPS), generator=draw)[:SWEEPS_A_CASE]
    return [SWEEPS[int(index)] for index in order], draw


def _cells(
    sweep: Sweep, layers: int, tensor: torch.Tensor, draw: torch.Generator
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The ranges of a sweep, and those of its cells that are visited."""
    ranges = [layers, *(tensor.shape[dim] for dim, _ in sweep.axes)]
    cells = list(product(*(range(size) for size in ranges)))
    picked = torch.randperm(len(cells), generator=draw)[:CELLS].tolist()
    return ranges, cells if len(cells) <= CELLS else [cells[index] for index in picked]


def _swept(
    sweep: Sweep, ranges: Sequence[int], cells: Sequence[tuple[int, ...]]
) -> Callable[..., torch.Tensor]:
    """The function of transformer_lens, told to visit those cells."""
    function: Any = getattr(patching, f"get_act_patch_{sweep.name}")
    names = ["layer", *(name for _, name in sweep.axes)]
    chosen: dict[str, Any] = {}
    if len(cells) < torch.Size(ranges).numel():
        frame = patching.make_df_from_ranges(ranges, names)
        every = list(product(*(range(size) for size in ranges)))
        rows = [every.index(cell) for cell in cells]
        chosen = {"index_axis_names": None, "index_df": frame.iloc[rows]}

    def run(*given: Any) -> torch.Tensor:
        with quiet():
            effects: torch.Tensor = function(*given, **chosen)
        return effects

    return run


@check(
    "patching.sweeps",
    "Every sweep of transformer_lens.patching (residual stream, attention and MLP outputs, each "
    "head's z, q, k, v and pattern, by position or not) gives the logits and the metrics of the "
    "same patches made by hand on Hugging Face, with and without a gradient.",
    analysed_cases,
    examples=0.8,
)
def sweeps(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Three drawn sweeps a case: of large ones some cells, of others all, in their own shape."""
    clean_case, clean, corrupted = pair(case)
    truth = reference(case.model)
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    bridge = bridge_of(subject)
    every, by_hand, metric = sites_of(truth, case), _ByHand(), logit_difference(case)
    layers = case.model.num_hidden_layers
    drawn, draw = _drawn(case)
    with torch.no_grad(), at_work("run_with_cache"):
        _, cache = bridge.run_with_cache(clean.tokens)
    rows = {sweep.row: [sweep.site(every, layer) for layer in range(layers)] for sweep in drawn}
    patched = {site.name: site for sites in rows.values() for site in sites}
    with watched(truth, case.model.d_head, sites=patched, backward=False, recorder=by_hand) as look:
        by_hand.clean = dict(look(clean_case, clean).values)

        def due_at(cell: tuple[int, ...], sweep: Sweep) -> Observation:
            layer, *indices = cell
            site = rows[sweep.row][layer]
            part: list[int | slice] = [slice(None)] * by_hand.clean[site.name].ndim
            for (dim, _), index in zip(sweep.axes, indices, strict=True):
                part[dim] = index
            by_hand.part = tuple(part)
            edits = (Edit(site=site.name, kind="replace"),)
            return look(replace(case, run=replace(case.run, edits=edits)), corrupted)

        for number, sweep in enumerate(drawn):
            tensor = by_hand.clean[rows[sweep.row][0].name]
            ranges, cells = _cells(sweep, layers, tensor, draw)
            due = [due_at(cell, sweep).logits for cell in cells]
            seen: list[torch.Tensor] = []

            def see(logits: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(logits.detach().clone())
                return metric(logits)

            graded = bool(case.run.token_seed >> number & 1)
            run = _swept(sweep, ranges, cells)
            with torch.set_grad_enabled(graded), at_work(f"get_act_patch_{sweep.name}"):
                effects = run(bridge, corrupted.tokens, cache, see)
            told = f"{sweep.name}{', with a gradient' if graded else ''}"
            yield from labelled(told, _gaps(cells, due, seen))
            table = torch.stack([metric(logits) for logits in due]).float()
            whole = len(cells) == torch.Size(ranges).numel()
            table = table.reshape(ranges) if whole else table
            yield from labelled(told, bitwise("metrics", table, effects))


def _gaps(
    cells: Sequence[tuple[int, ...]], due: Sequence[torch.Tensor], seen: Sequence[torch.Tensor]
) -> Iterator[Gap]:
    if len(seen) != len(cells):
        yield Gap("cells", "count", f"{len(seen)} patched runs instead of {len(cells)}")
        return
    for cell, wanted, got in zip(cells, due, seen, strict=True):
        yield from bitwise(f"logits of cell {cell}", wanted, got)
