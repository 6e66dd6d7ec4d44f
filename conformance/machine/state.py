"""The state that a bridge should be in, and a fresh Hugging Face model in that state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from conformance.sites import Status, sites
from conformance.spec import DTYPES, Edit, ModelSpec
from conformance.subjects import Subject, hf_model

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook that is on a bridge. Two hooks are never the same one, however alike.

    Attributes:
        site: Where it is.
        edit: What it does there; a backward hook only looks.
        permanent: Whether it survives a plain ``reset_hooks``.
        backward: Whether it sees the gradient.
    """

    site: str
    edit: Edit
    permanent: bool = False
    backward: bool = False


@dataclass(frozen=True, eq=False)
class State:
    """All that decides what a bridge computes next. Its tensors are never changed in place.

    Attributes:
        model: The model as it was built.
        weights: By Hugging Face's names. Without ``lm_head.weight`` the embeddings are tied.
        gradients: Those that have accumulated; a parameter without one is left out.
        frozen: Parameters that require no gradient.
        casts: The dtypes that the model was moved to, in order: each rounds the rotary frequencies.
        training: Train mode.
        flags: Those that are on.
        hooks: In the order in which they act on one site.
        compatible: Compatibility mode, which masks with minus infinity.
    """

    model: ModelSpec
    weights: Tensors
    gradients: Tensors = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    casts: tuple[str, ...] = ()
    training: bool = False
    flags: frozenset[str] = frozenset()
    hooks: tuple[Hook, ...] = ()
    compatible: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return self.casts[-1] if self.casts else self.model.dtype

    @property
    def wide(self) -> bool:
        """Whether that is at least float32."""
        return self.dtype in DTYPES[:2]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What a reference must do for the hooks of the bridge.

        `hook_mlp_in` is where the MLP's branch leaves the residual stream: what is done there is
        done to the input of ln2, before the hooks of that. The hooks on the copies of single heads
        only look.
        """
        known = sites(self.model)
        first, then = [], []
        for hook in self.hooks:
            site = known[hook.site]
            if hook.backward or (site.flag and site.flag not in self.flags):
                continue
            if site.flag == "use_hook_mlp_in":
                first.append(replace(hook.edit, site=ln2_of(hook.site)))
            elif not site.flag:
                then.append(hook.edit)
        return (*first, *then)

    @property
    def writes(self) -> bool:
        """Whether a hook writes in place, which PyTorch refuses at most sites under a gradient."""
        return any(edit.kind == "in_place" for edit in self.edits)

    def fires(self, name: str) -> bool:
        """Whether a hook point fires in a forward, if the bridge has it."""
        site = sites(self.model)[name]
        return site.status is not Status.DEAD and (not site.flag or site.flag in self.flags)


def ln2_of(mlp_in: str) -> str:
    """The site of ln2's input in the block of a ``hook_mlp_in``."""
    return f"{mlp_in.rpartition('.')[0]}.ln2.hook_in"


def fresh(state: State) -> Subject:
    """A reference that was never anything but what the state says, gradients left out.

    Weight processing unties the embeddings and may give a projection a bias, as a Hugging Face
    model of these weights has it.
    """
    tied = "lm_head.weight" not in state.weights
    built = hf_model(replace(state.model, tie_word_embeddings=tied))
    for dtype in state.casts:
        built.to(getattr(torch, dtype))
    known = dict(built.named_parameters())
    for name, weight in state.weights.items():
        if name in known:
            known[name].data = weight.clone()
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(built.get_submodule(owner), leaf, nn.Parameter(weight.clone()))
    parameters = dict(built.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in state.frozen)
    clamps = state.model.clip_qkv is not None
    return Subject(built, parameters, clamps=clamps, under_test=False)
