"""Faults of streams, samples and other roads to the same numbers: seeded by an outsider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch

from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import Make, add, mutant

# What the present call is, for faults that hook points have in some calls alone.
_CALL = local()


def _told(name: str) -> Callable[[Any], Any]:
    """A method that hook points can see to be running, by a name."""

    def make(original: Any) -> Any:
        def method(self: Any, *args: Any, **named: Any) -> Any:
            with _running(name):
                return original(self, *args, **named)

        return method

    return make


@contextmanager
def _running(name: str) -> Iterator[None]:
    before = getattr(_CALL, "name", "")
    _CALL.name = name
    try:
        yield
    finally:
        _CALL.name = before


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


@mutant("streams.draws_first", "sampling", "sampling.draws", OlmoTransformerBridge, "generate_stream")
def draws_first(original: Any) -> Any:
    """generate_stream draws a number before it begins, so that it does not sample what generate does."""

    def stream(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        if named.get("do_sample", True):
            torch.rand(1)
        yield from original(self, *args, **named)

    return stream


@mutant(
    "streams.entangled", "two streams", "generation.stream", OlmoTransformerBridge, "generate_stream"
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
