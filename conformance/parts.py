"""The other table: each component and weight of a bridged OLMo, and where Hugging Face has it.

The rearrangements are written out head by head, so that nothing is shared with what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from conformance.spec import ModelSpec

Parameters = Mapping[str, torch.Tensor]
Rearrange = Callable[[torch.Tensor, int], torch.Tensor]


def rows_by_head(weight: torch.Tensor, d_head: int) -> torch.Tensor:
    """``[head * d_head, d_model]`` as ``[head, d_model, d_head]``."""
    return torch.stack([weight[i : i + d_head].T for i in range(0, len(weight), d_head)])


def columns_by_head(weight: torch.Tensor, d_head: int) -> torch.Tensor:
    """``[d_model, head * d_head]`` as ``[head, d_head, d_model]``."""
    starts = range(0, weight.shape[1], d_head)
    return torch.stack([weight[:, i : i + d_head].T for i in starts])


def entries_by_head(bias: torch.Tensor, d_head: int) -> torch.Tensor:
    """``[head * d_head]`` as ``[head, d_head]``."""
    return torch.stack([bias[i : i + d_head] for i in range(0, len(bias), d_head)])


def _turned(weight: torch.Tensor, d_head: int) -> torch.Tensor:
    return weight.T


def _kept(weight: torch.Tensor, d_head: int) -> torch.Tensor:
    return weight


@dataclass(frozen=True)
class Part:
    """One component of a bridged OLMo.

    Attributes:
        path: TransformerLens' path; ``{i}`` stands for the block's index.
        module: Path of the Hugging Face module.
        role: The kind of component it must be.
        weight: How its weight is rearranged, and under which accessor; none if it has none.
        bias: As ``weight``, of its bias.
    """

    path: str
    module: str
    role: type[GeneralizedComponent]
    weight: tuple[str, Rearrange] | None = None
    bias: tuple[str, Rearrange] | None = None

    def at(self, block: int) -> Part:
        """The same component in one block."""
        path, module = (text.replace("{i}", str(block)) for text in (self.path, self.module))
        return replace(self, path=path, module=module)


def _projection(letter: str, weight: Rearrange, bias: Rearrange) -> Part:
    return Part(
        f"blocks.{{i}}.attn.{letter}",
        f"model.layers.{{i}}.self_attn.{letter}_proj",
        LinearBridge,
        (f"W_{letter.upper()}", weight),
        (f"b_{letter.upper()}", bias),
    )


def _linear(name: str, module: str) -> Part:
    return Part(
        f"blocks.{{i}}.mlp.{name}",
        f"model.layers.{{i}}.mlp.{module}",
        LinearBridge,
        (f"W_{name}", _turned),
        (f"b_{name}", _kept),
    )


TABLE = (
    Part("embed", "model.embed_tokens", EmbeddingBridge, ("W_E", _kept)),
    Part("rotary_emb", "model.rotary_emb", RotaryEmbeddingBridge),
    Part("blocks.{i}", "model.layers.{i}", BlockBridge),
    Part("blocks.{i}.ln1", "model.layers.{i}.input_layernorm", NormalizationBridge),
    Part("blocks.{i}.attn", "model.layers.{i}.self_attn", AttentionBridge),
    *(_projection(letter, rows_by_head, entries_by_head) for letter in "qkv"),
    _projection("o", columns_by_head, _kept),
    Part("blocks.{i}.ln2", "model.layers.{i}.post_attention_layernorm", NormalizationBridge),
    Part("blocks.{i}.mlp", "model.layers.{i}.mlp", MLPBridge),
    _linear("gate", "gate_proj"),
    _linear("in", "up_proj"),
    _linear("out", "down_proj"),
    Part("ln_final", "model.norm", NormalizationBridge),
    Part("unembed", "lm_head", UnembeddingBridge, ("W_U", _turned), ("b_U", _kept)),
)


def _expand(rows: Iterable[Part], layers: int) -> Iterator[Part]:
    for repeated, run in groupby(rows, key=lambda part: "{i}" in part.path):
        group = tuple(run)
        for block in range(layers if repeated else 1):
            yield from (part.at(block) for part in group)


def parts(model: ModelSpec) -> list[Part]:
    """Every component of a model, in the order of execution."""
    return list(_expand(TABLE, model.num_hidden_layers))


def accessors(model: ModelSpec) -> Iterator[tuple[str, str, Rearrange]]:
    """Full name (``blocks.0.attn.W_Q``), Hugging Face's parameter, and how that is rearranged."""
    for part in parts(model):
        # An accessor stands on the attention or MLP that a projection is part of.
        holder = part.path.rpartition(".")[0] if part.role is LinearBridge else part.path
        for kind, accessor in (("weight", part.weight), ("bias", part.bias)):
            if accessor is not None:
                name, rearrange = accessor
                yield f"{holder}.{name}", f"{part.module}.{kind}", rearrange


def parameter(parameters: Parameters, name: str) -> torch.Tensor | None:
    """Hugging Face's parameter of a name. A tied unembedding is the embedding."""
    tied = "model.embed_tokens.weight" if name == "lm_head.weight" else name
    return parameters.get(name, parameters.get(tied))


def weights(parameters: Parameters, model: ModelSpec) -> dict[str, torch.Tensor | None]:
    """What each accessor of a component must be, by its full name.

    Args:
        parameters: Hugging Face's, under its own names.
        model: Whose they are.

    Returns:
        The tensors rearranged. None stands for a bias that the model has not, but for ``b_U``:
        transformer_lens gives every unembedding one, of zeros.
    """
    found: dict[str, torch.Tensor | None] = {}
    for full, name, rearrange in accessors(model):
        tensor = parameter(parameters, name)
        if full == "unembed.b_U" and tensor is None:
            tensor = parameters["model.embed_tokens.weight"].new_zeros(model.vocab_size)
        found[full] = None if tensor is None else rearrange(tensor, model.d_head)
    return found


def stacked(found: Mapping[str, torch.Tensor | None], model: ModelSpec) -> Parameters:
    """The weights of all blocks by the accessor of the whole bridge (``W_Q``), ``[layer, ...]``.

    Args:
        found: What `weights` gave. A bias that it has not has no stacked accessor either.
        model: Whose they are.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for full, tensor in found.items():
        holder, _, name = full.rpartition(".")
        if tensor is not None and holder.startswith("blocks."):
            groups.setdefault(name, []).append(tensor)
    return {name: torch.stack(tensors) for name, tensors in groups.items()}
