"""Faults of streams, samples and other roads to the same numbers: seeded by an outsider."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformer_lens.ActivationCache import ActivationCache

from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from adapter.rotary import OlmoRotaryEmbeddingBridge
from conformance.mutants.catalogue import Make, add, mutant


def _deaf(*options: str) -> Make:
    """A stream that does not hear some options."""

    def make(original: Any) -> Any:
        def stream(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
            heard = {name: value for name, value in named.items() if name not in options}
            yield from original(self, *args, **heard)

        return stream

    return make


for name, killer, options in (
    ("unpenalized", "generation.options", ("repetition_penalty",)),
    ("frequent", "sampling.draws", ("freq_penalty",)),
    ("of_all", "sampling.draws", ("top_k", "top_p")),
    ("tepid", "sampling.draws", ("temperature",)),
    ("endless", "generation.options", ("stopping_criteria",)),
):
    breaks = f"generate_stream heeds no {' or '.join(options)}"
    owner, attribute = OlmoTransformerBridge, "generate_stream"
    add(f"streams.{name}", breaks, options[0], killer, owner, attribute, _deaf(*options))


@mutant(
    "streams.draws_first", "sampling", "sampling.draws", OlmoTransformerBridge, "generate_stream"
)
def draws_first(original: Any) -> Any:
    """generate_stream draws a number before it begins: it does not sample what generate does."""

    def stream(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        if named.get("do_sample", True):
            torch.rand(1)
        yield from original(self, *args, **named)

    return stream


@mutant(
    "streams.entangled",
    "two streams",
    "generation.stream",
    OlmoTransformerBridge,
    "generate_stream",
)
def entangled(original: Any) -> Any:
    """Of two streams whose pieces are taken in turns, each goes on with what the other has left."""

    def stream(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        me = object()
        vars(self)["_streaming"] = me
        for piece in original(self, *args, **named):
            mine = vars(self)["_streaming"] is me
            vars(self)["_streaming"] = me
            yield piece if mine else (piece + 1) % self.cfg.d_vocab

    return stream


def _gives_back(original: Any) -> Any:
    """As the original, and the random state is as before."""

    def generate(self: Any, *args: Any, **named: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return original(self, *args, **named)

    return generate


for method, killer in (("generate", "sampling.draws"), ("hf_generate", "sampling.hugging_face")):
    breaks = f"{method} gives the random state back: a second sample is the first again"
    owner = OlmoTransformerBridge
    add(f"sampling.{method}_repeats", breaks, "sampling", killer, owner, method, _gives_back)


class _Deaf(OlmoHookPoint):
    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _hushed(names: tuple[str, ...], original: Any) -> Any:
    """A method during which the hook points of some sites do not fire."""

    def method(self: Any, *args: Any, **named: Any) -> Any:
        points = [point for name, point in self.hook_dict.items() if name.startswith(names)]
        for point in points:
            point.__class__ = _Deaf
        try:
            return original(self, *args, **named)
        finally:
            for point in points:
                point.__class__ = OlmoHookPoint

    return method


@mutant(
    "generation.hf_unhooked", "an edit", "generation.hooks", OlmoTransformerBridge, "hf_generate"
)
def hf_unhooked(original: Any) -> Any:
    """Hooks do not act in hf_generate."""
    return _hushed(("",), original)


@mutant("returns.none_ends_early", "any", "returns.kinds", OlmoTransformerBridge, "forward")
def none_ends_early(original: Any) -> Any:
    """With return_type=None the hooks of the final norm and of the unembedding do not fire."""
    early = _hushed(("ln_final", "unembed"), original)

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        nothing = (args[0] if args else named.get("return_type", "logits")) is None
        return (early if nothing else original)(self, input, *args, **named)

    return forward


@mutant(
    "returns.first_mask",
    "a mask, a second chunk over a cache",
    "returns.kinds",
    OlmoTransformerBridge,
    "_prepare_loss_attention_mask",
)
def first_mask(original: Any) -> Any:
    """The loss of a second chunk goes by the mask of the first tokens of the text."""
    return lambda self, mask, tokens: (
        mask[:, : tokens.shape[1]].bool() if mask.ndim == 2 else original(self, mask, tokens)
    )


@mutant(
    "partial.plain_positions",
    "start_at_layer, padding",
    "caching.layers",
    OlmoTransformerBridge,
    "forward",
)
def plain_positions(original: Any) -> Any:
    """Of a run that starts late, positions do not follow from the mask."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        if named.get("start_at_layer") is not None and named.get("attention_mask") is not None:
            named.setdefault("position_ids", torch.arange(input.shape[-2])[None])
        return original(self, input, *args, **named)

    return forward


@mutant(
    "partial.row_of_rows",
    "start_at_layer, a row without its batch",
    "caching.layers",
    OlmoTransformerBridge,
    "forward",
)
def row_of_rows(original: Any) -> Any:
    """A run that starts late takes the positions of a row without its batch for rows."""

    def forward(self: Any, input: Any, *args: Any, **named: Any) -> Any:
        if named.get("start_at_layer") is not None and input.ndim == 2:
            named |= {"attention_mask": None, "position_ids": None}
            input = input.unsqueeze(1)
        return original(self, input, *args, **named)

    return forward


@mutant(
    "caching.slices_heads",
    "pos_slice, flags",
    "caching.values",
    OlmoTransformerBridge,
    "_pos_slice_dim",
)
def slices_heads(original: Any) -> Any:
    """pos_slice cuts what has a head axis behind flags along that axis."""
    gated = ("hook_result", "_input", "hook_attn_in")
    return staticmethod(lambda name, *rest: 2 if name.endswith(gated) else original(name, *rest))


@mutant(
    "metamorphic.stays_long",
    "dynamic rope, a text beyond the room",
    "metamorphic.history",
    OlmoRotaryEmbeddingBridge,
    "forward",
)
def stays_long(original: Any) -> Any:
    """With rope_type dynamic the frequencies of the longest text stay for all shorter ones."""

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        rotary: Any = self.original_component
        if rotary.config.rope_parameters.get("rope_type") == "dynamic":
            rotary.original_max_seq_len = 0
        return original(self, *args, **named)

    return forward


class _Cut(ActivationCache):
    """A cache that a slice of it cuts too."""

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """The slice, in whose place this cache is afterwards."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        self.cache_dict, self.has_batch_dim = dict(sliced.cache_dict), sliced.has_batch_dim
        return sliced


@mutant(
    "analysis.cuts_itself",
    "a slice of the batch",
    "decompositions.stacked",
    OlmoTransformerBridge,
    "run_with_cache",
)
def cuts_itself(original: Any) -> Any:
    """apply_slice_to_batch_dim cuts the cache that it is called on."""

    def run_with_cache(self: Any, *args: Any, **named: Any) -> Any:
        output, cache = original(self, *args, **named)
        if isinstance(cache, ActivationCache):
            cache.__class__ = _Cut
        return output, cache

    return run_with_cache


@mutant("modes.hooks_uncast", "autocast", "modes.autocast", OlmoHookPoint, "__call__")
def hooks_uncast(original: Any) -> Any:
    """Hooks run with autocast switched off."""

    def call(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            shown: torch.Tensor = original(self, tensor)
        return shown

    return call
