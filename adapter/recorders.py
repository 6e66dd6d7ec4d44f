"""Hugging Face's recorders of ``output_attentions`` and ``output_hidden_states``."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import output_capturing

_MARK = "_output_capturing_hooks_installed"


def forget_output_recorders(model: Any) -> None:
    """Take away the forward hooks that Hugging Face puts on when outputs are first asked for.

    They are local functions, so with them a model cannot be pickled any more; a `run_with_cache` is
    enough to have them. Hugging Face puts them on again at the next request.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                del module._forward_hooks[key]
        if getattr(module, _MARK, False):
            setattr(module, _MARK, False)


def record_attention(pattern: torch.Tensor) -> None:
    """Hand over a pattern, ``[batch, head, query, key]``, if attentions are asked for.

    Hugging Face collects patterns with forward hooks on its attention modules, which a bridge
    never calls.
    """
    recorded = _recorded("attentions")
    if recorded is not None:
        recorded.append(pattern)


def record_hidden_state(output: Any) -> None:
    """Hand over what a block's hooks have left, if hidden states are asked for.

    Hugging Face has recorded what its own layer, inside of the block, returned.
    """
    recorded = _recorded("hidden_states")
    if recorded and recorded[-1] is not None:
        recorded[-1] = output[0] if isinstance(output, tuple) else output


def _recorded(name: str) -> Any:
    """What Hugging Face has recorded in the call that runs; None if nobody asked for it."""
    return (output_capturing._active_collector.get() or {}).get(name)  # type: ignore[no-untyped-call]
