"""A bridge's weights as a whole: loaded from either side's names, all or nothing, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from adapter.configuration import configurations

_WRAPPED = "._original_component"


class WholeStateBridge(TransformerBridge):
    """A bridge that takes Hugging Face's own state dict, and never half of a wrong one.

    TransformerLens promises to take it, but then misses each weight under the names that it made up
    itself; and a tensor of a wrong shape is noticed when others are already loaded.
    """

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights under TransformerLens' or Hugging Face's names.

        ``unembed.bias`` may be missing: it is a constant of zeros, which no OLMo has.

        Raises:
            RuntimeError: If ``strict`` and a key is missing or unexpected, or if a tensor has a
                wrong shape. Nothing is loaded then.
        """
        known = self._tl_key_to_actual_keys()
        named = {self._lens_name(key, known): tensor for key, tensor in state_dict.items()}
        named.setdefault("unembed.bias", self.unembed.b_U)
        self._refuse_wrong_shapes(named, known)
        return super().load_state_dict(  # type: ignore[no-untyped-call]
            named, strict=strict, assign=assign
        )

    def _lens_name(self, key: str, known: Mapping[str, list[str]]) -> str:
        """TransformerLens' name of a weight that may have Hugging Face's."""
        name = self.adapter.convert_hf_key_to_tl_key(key)
        return name if name in known else key

    def _refuse_wrong_shapes(
        self, state_dict: Mapping[str, Any], known: Mapping[str, list[str]]
    ) -> None:
        current = self.original_model.state_dict()
        shapes = {name: tensor.shape for name, tensor in current.items()}
        shapes |= {name.replace(_WRAPPED, ""): shape for name, shape in shapes.items()}
        shapes |= {name: current[actual[0]].shape for name, actual in known.items()}
        wrong = [
            f"{name}: {list(getattr(tensor, 'shape', ()))} instead of {list(shapes[name])}"
            for name, tensor in state_dict.items()
            if name in shapes and getattr(tensor, "shape", None) != shapes[name]
        ]
        if wrong:
            raise RuntimeError(f"wrong shapes, nothing was loaded: {'; '.join(wrong)}")

    def to(self, *args: Any, **kwargs: Any) -> TransformerBridge:  # type: ignore[override]
        """Move or cast, and say so in every configuration."""
        super().to(*args, **kwargs)
        self._tell_dtype()
        return self

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> TransformerBridge:
        """What ``half()``, ``double()`` and the like come down to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tell_dtype()
        return self

    def _tell_dtype(self) -> None:
        for config in configurations(self):
            config.dtype = self.embed.W_E.dtype


class ExactStateDict(dict[str, Any]):
    """A state dict whose float64 tensors stay float64 while weights are processed.

    TransformerLens processes every dtype but float32 in float32: right for shorter ones, but a
    float64 model would lose half of its digits, even where nothing was asked for.
    """

    def __setitem__(self, name: str, tensor: Any) -> None:
        """Keep the tensor that is there if this is only its rounding to float32."""
        old = self.get(name)
        narrows = isinstance(old, torch.Tensor) and old.dtype == torch.float64
        if not (narrows and tensor.dtype == torch.float32):
            super().__setitem__(name, tensor)
