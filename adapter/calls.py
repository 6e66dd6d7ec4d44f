"""What a call asks for: positions that follow the mask, and Hugging Face's own generation."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter.partial_runs import call_of_its_own
from adapter.threads import OfTheThread

_MASK = 4  # where attention_mask stands behind the input, in a call by position
_WANTS_A_RECORD = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class OlmoCalls(TransformerBridge):
    """Ways to call a bridge that TransformerBridge leaves out.

    It derives positions from a mask for tokens, not for embeddings; it forgets the mask of
    embeddings after the first generated token; and its ``hf_generate`` needs a tokenizer where
    there is nothing to tokenize, and always uses a cache.
    """

    # Where a generation waits for the cache of a forward, and where it finds it.
    _capture_hf_cache = OfTheThread()
    _last_hf_cache = OfTheThread()

    @call_of_its_own()
    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on tokens, strings or embeddings ``[batch, pos, d_model]``."""
        embeddings = kwargs.get("inputs_embeds", input)
        if isinstance(embeddings, torch.Tensor) and embeddings.is_floating_point():
            mask = args[_MASK] if len(args) > _MASK else kwargs.get("attention_mask")
            if mask is None:
                mask = kwargs.get("one_zero_attention_mask")  # TransformerLens' older name
            positions = _positions(mask, embeddings.shape[-2])
            if positions is not None:
                kwargs.setdefault("position_ids", positions)
        return super().forward(input, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; in a hook, without ending what the generation around it waits for."""
        waiting = getattr(self, "_capture_hf_cache", False)
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._capture_hf_cache = waiting

    def _generate_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Generate from embeddings as from tokens: with a mask that grows with the text."""
        extra = kwargs.get("multimodal_kwargs") or {}
        if kwargs.get("_generate_from_embeds") and "initial_attention_mask" in kwargs:
            mask = extra.get("attention_mask")
            if mask is not None:
                rest = {name: value for name, value in extra.items() if name != "attention_mask"}
                kwargs |= {"initial_attention_mask": mask, "multimodal_kwargs": rest}
        return super()._generate_tokens(*args, **kwargs)

    @call_of_its_own()
    def hf_generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: Any = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        use_past_kv_cache: bool = True,
        return_type: str | None = "input",
        pixel_values: torch.Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Generate with Hugging Face's own loop. Tokens need no tokenizer."""
        optional = {"top_k": top_k, "top_p": top_p, "pixel_values": pixel_values}
        asked: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "use_cache": use_past_kv_cache,
            **{name: value for name, value in optional.items() if value is not None},
            **generation_kwargs,
        }
        if isinstance(input, str) and self.tokenizer is not None:
            # Nothing of one text is padding: left out, its ENDs might be, as ``pad_token_id``.
            tokens = self.tokenizer(input, return_tensors="pt")["input_ids"]
            asked.setdefault("attention_mask", torch.ones_like(tokens).to(self.cfg.device))
        if not isinstance(input, torch.Tensor):
            return super().hf_generate(
                input,
                stop_at_eos=stop_at_eos,
                eos_token_id=eos_token_id,
                use_past_kv_cache=use_past_kv_cache,
                return_type=return_type,
                **asked,
            )
        model: Any = self.original_model
        end = None if self.tokenizer is None else self.tokenizer.eos_token_id
        if not stop_at_eos:
            asked["eos_token_id"] = None  # left out, it would be the configuration's
        elif eos_token_id is not None or end is not None:
            asked["eos_token_id"] = end if eos_token_id is None else eos_token_id
        if end is not None and "pad_token_id" not in asked:
            asked["pad_token_id"] = end
            # By that number Hugging Face would look for other padding than the model's own.
            pad = model.generation_config.pad_token_id
            none = pad is None or pad in _numbers(asked.get("eos_token_id"))
            mask = torch.ones_like(input) if none else input != pad
            asked.setdefault("attention_mask", mask.long())
        if any(asked.get(name) for name in _WANTS_A_RECORD):
            asked.setdefault("return_dict_in_generate", True)
        with torch.no_grad():
            return model.generate(input.to(self.cfg.device), **asked)


def _numbers(ends: Any) -> list[int]:
    """Tokens that end a text, given as Hugging Face takes them: none, one or several."""
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _positions(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Positions of the last ``length`` slots of a mask, ``[batch, pos]``, as of tokens.

    They count what is attended to, in a row in which a masked slot precedes a real one; in all
    others they count every slot. None where that is all rows: there is nothing to tell.
    """
    if mask is None or mask.ndim != 2:
        return None
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    plain = torch.arange(mask.shape[1], device=mask.device).expand_as(counted)
    moved = ((counted != plain) & (mask != 0)).any(dim=1, keepdim=True)
    if not bool(moved.any()):
        return None
    return torch.where(moved, counted, plain)[:, -length:]
