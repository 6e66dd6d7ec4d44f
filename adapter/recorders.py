"""Hugging Face's recorders of ``output_attentions`` and ``output_hidden_states``."""

from __future__ import annotations

from typing import Any

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
