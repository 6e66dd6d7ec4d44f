"""OLMo's attention, step for step as Hugging Face computes it, with a hook at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import dropout, softmax
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge
from transformers.models.olmo.modeling_olmo import apply_rotary_pos_emb, repeat_kv

from adapter.forks import (
    change_of_heads,
    head_contributions,
    is_known_in,
    mean_of_groups,
    project_change,
)
from adapter.hooks import drop_hook, is_hooked, new_hook
from adapter.layouts import HeadsAfterPositions, SplitHeads
from adapter.recorders import record_attention
from adapter.running import residual_before


class OlmoAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Mirror of ``OlmoAttention.forward`` with eager attention.

    Operations, layouts and dtypes follow Hugging Face's, so every value and gradient is equal bit
    for bit in every dtype. Hook points, in firing order:

    - ``hook_in``: ``[batch, pos, d_model]``
    - ``hook_q_input``, ``hook_k_input``, ``hook_v_input`` under ``use_split_qkv_input``, or
      ``hook_attn_in`` under ``use_attn_in``: the residual stream before ln1, once per head,
      ``[batch, pos, head, d_model]``; see ``adapter.forks``
    - ``q/k/v.hook_in``, ``q/k/v.hook_out`` (alias ``hook_q/k/v``): before the clamp,
      ``[batch, pos, head, d_head]``
    - ``hook_q_clipped``, ``hook_k_clipped``, ``hook_v_clipped``: what attention uses, after the
      clamp (equal to ``hook_q/k/v`` when the model has no ``clip_qkv``)
    - ``hook_cos``, ``hook_sin``: ``[batch, pos, d_head]``
    - ``hook_rot_q``, ``hook_rot_k``: after the rotation, ``[batch, pos, head, d_head]``; the KV
      cache stores what leaves them
    - ``hook_attn_scores``, ``hook_pattern`` (after dropout): ``[batch, head, query, key]``
    - ``o.hook_in`` (alias ``hook_z``), ``hook_result`` under ``use_attn_result``,
      ``[batch, pos, head, d_model]``, ``o.hook_out``, ``hook_out``
    """

    def __init__(self, name: str, config: Any, submodules: dict[str, Any] | None = None) -> None:
        super().__init__(name, config, submodules)
        self.hook_q_clipped = new_hook()
        self.hook_k_clipped = new_hook()
        self.hook_v_clipped = new_hook()
        drop_hook(self, "hook_hidden_states")
        # The inherited conversion changes nothing here and remembers every tensor it has seen.
        self.hook_in.hook_conversion = self.hook_out.hook_conversion = None

    def set_rotary_emb(self, rotary_emb: Any) -> None:
        """Remember the model's rotary embedding, outside the module tree: it is not ours."""
        object.__setattr__(self, "_rotary_emb", rotary_emb)

    def _setup_qkv_hook_reshaping(self) -> None:
        """Show every per-head tensor as ``[batch, pos, head, d_head]``."""
        hf: Any = self.original_component
        split = SplitHeads(hf.head_dim)
        for point in (
            *(self.q.hook_out, self.k.hook_out, self.v.hook_out),
            *(self.hook_q_clipped, self.hook_k_clipped, self.hook_v_clipped),
            self.o.hook_in,
        ):
            point.hook_conversion = split
        self.hook_rot_q.hook_conversion = self.hook_rot_k.hook_conversion = HeadsAfterPositions()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over ``hidden_states``, ``[batch, pos, d_model]``.

        Takes the arguments of ``OlmoAttention.forward`` and returns, like it, the output and the
        pattern ``[batch, head, query, key]``.
        """
        hf: Any = self.original_component
        if hf is None:
            raise RuntimeError(f"no attention is bound to {self.name!r} yet")
        named = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
        kwargs.update(zip(named, args, strict=False))

        residual = residual_before(self)
        hidden_states = self.hook_in(kwargs["hidden_states"])
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, hf.head_dim)
        projected = self._clip(*self._project(hidden_states, residual))
        query, key, value = (x.view(heads).transpose(1, 2) for x in projected)

        cos, sin = self._rotation(hidden_states, kwargs)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        query, key = self.hook_rot_q(query), self.hook_rot_k(key)
        key, value = self._update_kv_cache(key, value, **kwargs)

        key = repeat_kv(key, hf.num_key_value_groups)
        value = repeat_kv(value, hf.num_key_value_groups)
        scores = torch.matmul(query, key.transpose(2, 3)) * hf.scaling
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._mask_of_cache(scores, kwargs.get("past_key_values"))
        scores = self._masked(scores, mask)
        pattern = self._pattern_of(self.hook_attn_scores(scores), query.dtype)
        pattern = dropout(pattern, p=hf.attention_dropout, training=self.training)
        pattern = self.hook_pattern(pattern)
        record_attention(pattern)

        z = torch.matmul(pattern, value).transpose(1, 2).contiguous()
        output = self._project_out(z.reshape(*input_shape, -1).contiguous())
        return self.hook_out(output), pattern

    @property
    def forks_input(self) -> bool:
        """Whether a flag asks for one copy of the residual stream per head."""
        return any(getattr(self.config, f, False) for f in ("use_split_qkv_input", "use_attn_in"))

    def _project(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Flat queries, keys and values ``[batch, pos, head * d_head]``, before the clamp.

        Args:
            hidden_states: What they are projections of, ``[batch, pos, d_model]``.
            residual: What ln1 has made that of.
        """
        linears = (self.q, self.k, self.v)
        if not self.forks_input:
            return [linear(hidden_states) for linear in linears]
        hf: Any = self.original_component
        if residual is None or self._ln1_module is None:  # called alone: nothing precedes it
            residual, norm = hidden_states, torch.nn.Identity().forward
        else:  # not the module: PyTorch's hooks on it have seen their one call
            norm = self._ln1_module.forward

        def change_in(linear: Any, change: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            if is_known_in(change != 0) and is_known_in(source != norm(residual)):
                raise ValueError(
                    f"blocks.{hf.layer_idx}.attn: a per-head input hook and a hook between ln1 and "
                    f"{linear.name} both edited what {linear.name} reads; edit one of them"
                )
            flat: torch.Tensor = linear.original_component(source)
            return flat + project_change(change, linear.original_component, hf.head_dim)

        return [
            linear(hidden_states, through=partial(change_in, linear, change))
            if change is not None
            else linear(hidden_states)
            for linear, change in zip(linears, self._changes(residual, norm), strict=True)
        ]

    def _changes(
        self, residual: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """What edits of the per-head copies change for queries, keys and values, if any is hooked.

        Under ``use_attn_in`` there is one copy per query head. Key-value head j serves a group of
        them and reads the mean of the group's copies, so that no copy is without effect on it.
        """
        hf: Any = self.original_component
        groups = hf.num_key_value_groups
        n_heads = hf.config.num_attention_heads
        if getattr(self.config, "use_attn_in", False):
            change = change_of_heads(residual, norm, self.hook_attn_in, n_heads)
            grouped = None if change is None else mean_of_groups(change, groups)
            return [change, grouped, grouped]
        return [
            change_of_heads(residual, norm, self.hook_q_input, n_heads),
            change_of_heads(residual, norm, self.hook_k_input, n_heads // groups),
            change_of_heads(residual, norm, self.hook_v_input, n_heads // groups),
        ]

    def _clip(self, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Clamp as Hugging Face does, but out of place: hooked tensors stay what they were."""
        hf: Any = self.original_component
        clip = hf.config.clip_qkv
        if clip is not None:
            projections = tuple(x.clamp(min=-clip, max=clip) for x in projections)
        points = (self.hook_q_clipped, self.hook_k_clipped, self.hook_v_clipped)
        return tuple(point(x) for point, x in zip(points, projections, strict=True))

    def _rotation(
        self, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hooked cosines and sines, each ``[batch, pos, d_head]``."""
        embeddings = kwargs.get("position_embeddings")
        if embeddings is None:
            if self._rotary_emb is None:
                raise ValueError(
                    f"{self.name}: called without position_embeddings and without a rotary "
                    "embedding to compute them; pass (cos, sin) or call set_rotary_emb first"
                )
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
            embeddings = self._rotary_emb(hidden_states, positions)
        cos, sin = embeddings
        return self.hook_cos(cos), self.hook_sin(sin)

    def _mask_of_cache(self, scores: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """A causal mask ``[1, 1, query, key]`` where Hugging Face gives none and a cache has room.

        It gives none for sdpa, which counts from the first key. The mask that TransformerLens makes
        counts from the last, behind what the cache has room for.
        """
        hf: Any = self.original_component
        queries, keys = scores.shape[-2:]
        filled = keys if cache is None else int(cache.get_seq_length(hf.layer_idx))
        if filled == keys:
            return None
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
        return seen.tril(filled - queries)[None, None]

    def _masked(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Masked scores, ``[batch, head, query, key]``, in the wider dtype of scores and mask.

        So Hugging Face adds them. Under autocast the scores are short and the mask is not: its
        lowest number is -inf in a shorter dtype, and a query that sees no key would get NaN.
        """
        if mask is not None and mask.is_floating_point():
            scores = scores.to(torch.promote_types(scores.dtype, mask.dtype))
        queries, keys = scores.shape[-2:]
        masked: torch.Tensor = self._apply_reconstruct_attention_mask(scores, mask, keys, queries)
        return masked

    def _pattern_of(self, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Softmax over keys in float32, then the model's dtype, ``[batch, head, query, key]``.

        Compatibility mode masks with -inf. A query that sees no key then gets a row of zeros, and
        its scores a gradient of zeros, where plain softmax would give NaN for both.
        """
        if not self.compatibility_mode:
            return softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
        blind = torch.isneginf(scores).all(dim=-1, keepdim=True)
        pattern = softmax(scores.masked_fill(blind, 0.0), dim=-1, dtype=torch.float32)
        return pattern.masked_fill(blind, 0.0).to(dtype)

    def _project_out(self, z: torch.Tensor) -> torch.Tensor:
        """Output projection of ``[batch, pos, head * d_head]``."""
        if not (getattr(self.config, "use_attn_result", False) and is_hooked(self.hook_result)):
            output: torch.Tensor = self.o(z)
            return output
        hf: Any = self.original_component
        by_head = partial(
            head_contributions,
            projection=self.o.original_component,
            d_head=hf.head_dim,
            hook=self.hook_result,
        )
        output = self.o(z, through=by_head)
        return output
