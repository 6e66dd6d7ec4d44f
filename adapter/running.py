"""Which block's layer runs in this thread, and the residual stream that its attention forks.

Hugging Face's layer gives attention nothing but what ln1 has made of the stream, so ln1 leaves here
what it has read. It is left beside the modules and not on them: threads share those, and a copy
that a hook makes of them is no part of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Run:
    """One run of a layer. It calls ln1 first, then attention; other calls of them are of hooks.

    Attributes:
        norm: The ln1 that is still to be called.
        attention: The attention behind it.
        residual: What that ln1 has read, ``[batch, pos, d_model]``, until attention takes it.
    """

    def __init__(self, block: Any) -> None:
        self.norm: Any = block.ln1
        self.attention: Any = block.attn
        self.residual: torch.Tensor | None = None


class _Here(threading.local):
    run: Run | None = None


_HERE = _Here()


@contextmanager
def set_apart() -> Iterator[None]:
    """In here another block may run, or the same one; then goes on what has run around it."""
    around, _HERE.run = _HERE.run, None
    try:
        yield
    finally:
        _HERE.run = around


def begin(block: Any) -> None:
    """A block's layer runs next."""
    _HERE.run = Run(block)


def run_of_norm(norm: Any) -> Run | None:
    """The run that now calls its ln1, or None if it is another's LayerNorm, or a hook calls it."""
    run = _HERE.run
    if run is None or run.norm is not norm:
        return None
    run.norm = None
    return run


def residual_before(attention: Any) -> torch.Tensor | None:
    """What the ln1 before has read, or None if not its layer calls this attention. It asks once."""
    run = _HERE.run
    if run is None or run.attention is not attention:
        return None
    residual, run.residual = run.residual, None
    return residual
