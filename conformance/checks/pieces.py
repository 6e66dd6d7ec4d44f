"""What a bridge's cache is taken apart into, by hand: from the reference's tensors and weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from conformance.parts import columns_by_head
from conformance.recorder import Observation
from conformance.spec import Case
from conformance.subjects import Subject
from conformance.taps import LAYER_NORM_EPS


@dataclass(frozen=True)
class Piece:
    """One summand of a residual stream, or of what is read from one.

    Attributes:
        label: What the cache must call it.
        value: ``[batch, pos, d_model]`` in float64, or whatever a projection leaves of d_model.
        size: The sum of the absolute values of its terms, or None where the reference itself holds
            the tensor, so that every bit must agree.
        normalized: Whether a LayerNorm's scale, a float32 number, is in it.
    """

    label: str
    value: torch.Tensor
    size: torch.Tensor | None = None
    normalized: bool = False

    @property
    def sizes(self) -> torch.Tensor:
        """The size, which is that of the value where the value is known to the bit."""
        return self.value.abs() if self.size is None else self.size

    def projected(self, onto: torch.Tensor) -> Piece:
        """What it has along directions ``[d_model, direction]``."""
        return replace(self, value=self.value @ onto, size=self.sizes @ onto.abs())


def total(pieces: Sequence[Piece], label: str) -> Piece:
    """Their sum."""
    value, size = pieces[0].value, pieces[0].sizes
    for piece in pieces[1:]:
        value, size = value + piece.value, size + piece.sizes
    return Piece(label, value, size, pieces[0].normalized)


class ByHand:
    """The pieces of the reference's residual stream, also as weight processing leaves them.

    Processing changes no piece but as this says: a writer without its mean along d_model writes a
    piece without its mean; a value bias that is folded leaves the heads and joins the output's.

    Args:
        seen: What the reference showed.
        truth: The reference.
        case: The case that it ran.
    """

    def __init__(self, seen: Observation, truth: Subject, case: Case) -> None:
        self.layers = case.model.num_hidden_layers
        self._values, self._logits, self._case = seen.values, seen.logits, case
        self.truth, self._model = truth, truth.model
        asked = case.run.processing
        self._centers = "center_writing_weights" in asked
        model = case.model
        self._folds = (
            "fold_value_biases" in asked and "v" in model.biases and model.clip_qkv is None
        )

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_parameter(name)
        return weight.detach().double()

    def _written(self, label: str, value: torch.Tensor, size: torch.Tensor | None = None) -> Piece:
        if not self._case.run.processing:
            return Piece(label, value.double(), size)
        wide = value.double()
        sizes = wide.abs() if size is None else size
        if self._centers:
            wide = wide - wide.mean(-1, keepdim=True)
            sizes = sizes + sizes.mean(-1, keepdim=True)
        return Piece(label, wide, sizes)

    def shown(self, label: str, site: str) -> Piece:
        """What the reference shows at a site of the residual stream, or of what is added to it."""
        return self._written(label, self._values[site])

    def residual(self, layer: int, mlp_input: bool, label: str = "residual") -> Piece:
        """What a layer's attention or MLP reads; the last layer is followed by the final norm."""
        return self.shown(label, f"{self._norm(layer, mlp_input)}.hook_in")

    def _norm(self, layer: int, mlp_input: bool) -> str:
        return "ln_final" if layer == self.layers else f"blocks.{layer}.ln{1 + mlp_input}"

    def writers(self, layer: int, mlp_input: bool, mode: str, embeds: bool) -> list[Piece]:
        """Each component's output before a layer, in the order of execution."""
        sites = {"attn": "attn.hook_out", "mlp": "mlp.hook_out"}
        found = [self.shown("embed", "embed.hook_out")] if embeds else []
        for block in range(layer + mlp_input):
            for kind, site in sites.items():
                if mode in ("all", kind) and (block < layer or kind == "attn"):
                    found.append(self.shown(f"{block}_{kind}_out", f"blocks.{block}.{site}"))
        return found

    def heads(self, layer: int) -> list[Piece]:
        """Each head's output before a layer: its z times its columns of o_proj."""
        model, found = self._case.model, []
        group = model.num_attention_heads // model.num_key_value_heads
        for block in range(layer):
            attention = f"model.layers.{block}.self_attn"
            output = columns_by_head(self._weight(f"{attention}.o_proj.weight"), model.d_head)
            z = self._values[f"blocks.{block}.attn.o.hook_in"].double()
            size = z.abs()
            if self._folds:
                bias = self._weight(f"{attention}.v_proj.bias").view(-1, model.d_head)
                bias = bias.repeat_interleave(group, dim=0)
                z, size = z - bias, size + bias.abs()
            for head in range(model.num_attention_heads):
                value, sizes = z[:, :, head] @ output[head], size[:, :, head] @ output[head].abs()
                found.append(self._written(f"L{block}H{head}", value, sizes))
        return found

    def neurons(self, layer: int, chosen: Collection[int]) -> list[Piece]:
        """Each neuron's output before a layer: its activation times its column of down_proj."""
        found = []
        for block in range(layer):
            down = self._model.get_parameter(f"model.layers.{block}.mlp.down_proj.weight").detach()
            activation = self._values[f"blocks.{block}.mlp.out.hook_in"]
            # Processed, an activation is rounded as the greatest at its position may be.
            greatest = activation.double().abs().amax(-1, keepdim=True)
            for neuron in chosen:
                value = activation[:, :, neuron, None] * down[:, neuron]
                most = greatest * down[:, neuron].double().abs()
                size = most if self._case.run.processing else None
                found.append(self._written(f"L{block}N{neuron}", value, size))
        return found

    def bias(self, layer: int, mlp_input: bool) -> Piece:
        """What biases alone have written before a layer, at every position."""
        model = self._case.model
        group = model.num_attention_heads // model.num_key_value_heads
        value = torch.zeros(model.hidden_size, dtype=torch.double)
        size = value
        for block in range(layer + mlp_input):
            attention = f"model.layers.{block}.self_attn"
            if "o" in model.biases:
                bias = self._weight(f"{attention}.o_proj.bias")
                value, size = value + bias, size + bias.abs()
            if self._folds:
                bias = self._weight(f"{attention}.v_proj.bias").view(-1, model.d_head)
                bias = bias.repeat_interleave(group, dim=0).flatten()
                output = self._weight(f"{attention}.o_proj.weight").T
                value, size = value + bias @ output, size + bias.abs() @ output.abs()
        shape = (*self._values["embed.hook_out"].shape[:-1], -1)
        return self._written("bias", value.expand(shape), size.expand(shape))

    def scale(self, layer: int, mlp_input: bool) -> torch.Tensor:
        """The denominator of the LayerNorm before a layer, ``[batch, pos, 1]``."""
        # An OlmoLayerNorm works in float32, also in a float64 model.
        wide = self._values[f"{self._norm(layer, mlp_input)}.hook_in"].float().double()
        variance = wide.var(-1, keepdim=True, unbiased=False)
        return (variance + LAYER_NORM_EPS).sqrt()

    def normalized(self, pieces: Sequence[Piece], layer: int, mlp_input: bool) -> list[Piece]:
        """Each as the LayerNorm before a layer leaves it, with that norm's own denominator."""
        scale = self.scale(layer, mlp_input)
        found = []
        for piece in pieces:
            centered = piece.value - piece.value.mean(-1, keepdim=True)
            size = (piece.sizes + piece.sizes.mean(-1, keepdim=True)) / scale
            found.append(Piece(piece.label, centered / scale, size, normalized=True))
        return found

    def through_final_norm(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Each as the final LayerNorm leaves it by itself, with a denominator of its own."""
        found = []
        for piece in pieces:
            if piece.size is None:
                native = piece.value.to(self._model.dtype)
                found.append(Piece(piece.label, self._model.model.norm(native).double()))
                continue
            variance = piece.value.var(-1, keepdim=True, unbiased=False)
            scale = (variance + LAYER_NORM_EPS).sqrt()
            centered = piece.value - piece.value.mean(-1, keepdim=True)
            found.append(Piece(piece.label, centered / scale, piece.sizes / scale))
        return found

    @cached_property
    def unembedding(self) -> torch.Tensor:
        """``[d_model, d_vocab]`` in float64."""
        weight = self._weight(
            "model.embed_tokens.weight"
            if self._case.model.tie_word_embeddings
            else "lm_head.weight"
        )
        return self._centered(weight.T)

    @cached_property
    def logits(self) -> torch.Tensor:
        """What all pieces together say, ``[batch, pos, d_vocab]`` in float64."""
        return self._centered(self._logits.double())

    def _centered(self, tensor: torch.Tensor) -> torch.Tensor:
        if "center_unembed" not in self._case.run.processing:
            return tensor
        return tensor - tensor.mean(-1, keepdim=True)
