"""The registry of mutants: each is one attribute of the project's adapter, replaced for a while.

A mutant breaks the bridge, the adapter or its patch; it never touches transformers or torch, whose
model is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from adapter import OlmoArchitectureAdapter
from adapter.hooks import OlmoHookPoint

# From what an attribute was to what takes its place.
Make = Callable[[Any], Any]
# How a broken hook point treats a tensor: it is given the way a sound one fires.
Call = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault.

    Attributes:
        name: Stable name, ``surface.fault``.
        breaks: What is wrong.
        trigger: What a case must have for the fault to show.
        killer: Name of the check that must find it.
        apply: Puts the fault in place, and takes it away again.
    """

    name: str
    breaks: str
    trigger: str
    killer: str
    apply: Callable[[], AbstractContextManager[None]]

    @property
    def crashes(self) -> bool:
        """Whether it shows as an exception. All others must show as a difference."""
        return self.name in CRASHES

    def __str__(self) -> str:
        return self.name


CRASHES = {
    "attention.upstream",
    "cache.expected",
    "clamp.in_place",
    "copies.in_midst",
    "copies.loose_handles",
    "derivatives.flagged",  # vmap lets nothing ask
    "deep.still_starts",
    "deep.still_stops",
    "frozen.overflown",  # the same NaN, not equal to itself, looks like another edit's
    "interventions.viewed",  # an expanded tensor has less memory than its strides say
    "loading.believes_the_index",
    "loading.embedding_wanted",
    "loading.prefix_wanted",
    "machine.not_pickled_again",
    "machine.shared_by_copies",
    "nested.first_norm",  # what heads and what projections read then differs, as after two edits
    "nested.threads",  # so here
    "patch.deep_stand_in",
    "patch.no_clone",
    "patch.without_layers",
    "patch.without_model_model_layers",
    "recompute.flags_of_today",  # as the next one
    "recompute.forgotten",  # PyTorch notices where an edit has saved another number of tensors
    "state.biases_required",
    "states.lens_names_only",
    "text.prompt_without_bos",  # beside a mask that is given it is too short for that
}
CATALOGUE: dict[str, Mutant] = {}
PAD_TOKEN = 1  # OlmoConfig's default, that of half the models drawn

_ABSENT = object()


@contextmanager
def replaced(owner: Any, attribute: str, make: Make) -> Iterator[None]:
    """Put ``make(original)`` in the place of an attribute of a class or module.

    Raises:
        AttributeError: If there is no such attribute: the adapter has changed, and the mutant with
            it must change.
    """
    own = vars(owner).get(attribute, _ABSENT)
    setattr(owner, attribute, make(getattr(owner, attribute)))
    try:
        yield
    finally:
        if own is _ABSENT:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)


def add(
    name: str, breaks: str, trigger: str, killer: str, owner: Any, attribute: str, make: Make
) -> None:
    """Register a mutant that replaces ``owner.attribute``. See `Mutant` for the rest."""
    assert name not in CATALOGUE, f"two mutants are called {name}"
    apply = partial(replaced, owner, attribute, make)
    CATALOGUE[name] = Mutant(name, breaks, trigger, killer, apply)


def mutant(
    name: str, trigger: str, killer: str, owner: Any, attribute: str
) -> Callable[[Make], None]:
    """As `add`, for a function that makes the replacement; its docstring says what is wrong."""

    def register(make: Make) -> None:
        add(name, _told_by(make), trigger, killer, owner, attribute, make)

    return register


def bridge_mutant(name: str, trigger: str, killer: str) -> Callable[[Callable[[Any], None]], None]:
    """As `mutant`, for a function that breaks a finished bridge."""

    def register(fault: Callable[[Any], None]) -> None:
        _add_to_bridge(name, _told_by(fault), trigger, killer, fault)

    return register


def _told_by(function: Callable[..., object]) -> str:
    return " ".join((function.__doc__ or "").split()).rstrip(".")


def _add_to_bridge(
    name: str, breaks: str, trigger: str, killer: str, fault: Callable[[Any], None]
) -> None:
    def make(original: Any) -> Any:
        def setup(self: OlmoArchitectureAdapter, bridge: TransformerBridge) -> None:
            original(self, bridge)
            fault(bridge)

        return setup

    owner, attribute = OlmoArchitectureAdapter, "setup_hook_compatibility"
    add(name, breaks, trigger, killer, owner, attribute, make)


def points(bridge: TransformerBridge, site: str) -> list[HookPoint]:
    """The hook points of a site in every block; ``{i}`` stands for the block's index."""
    blocks = len(bridge.blocks) if "{i}" in site else 1
    return [bridge.hook_dict[site.replace("{i}", str(block))] for block in range(blocks)]


def hook_mutant(name: str, breaks: str, trigger: str, killer: str, site: str, call: Call) -> None:
    """Register a mutant whose hook points at a site treat tensors as ``call`` does."""

    class Broken(OlmoHookPoint):
        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            return call(super().__call__, tensor)

    def fault(bridge: Any) -> None:
        for point in points(bridge, site):
            point.__class__ = Broken

    _add_to_bridge(name, breaks, trigger, killer, fault)


def shared(*sites: str) -> Make:
    """Hook points at some sites hand their hooks the tensor that their neighbours read too."""
    return lambda original: lambda self, x: x if self.name.endswith(sites) else original(self, x)
