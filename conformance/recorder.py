"""What one run of a subject shows, and what collects it while the subject runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from conformance.edits import edited
from conformance.spec import Case
from conformance.taps import Turn, unturned

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Observation:
    """What one run of one subject showed.

    Attributes:
        logits: ``[batch, pos, d_vocab]``, of all chunks.
        values: Each site's tensor in the hook's layout, after any edit of it, in the order of
            firing. A later chunk's sites are called ``name#chunk``.
        gradients: Each site's gradient of the probed logits, in the order of the backward pass.
            Only of a run in one chunk: a backward hook does not know which forward it is of.
        parameter_gradients: By Hugging Face's parameter names; None where there is none.
        fired: Every firing of a forward hook, in order, repetitions included.
        fired_backward: Every firing of a backward hook, in order.
        random_state: PyTorch's random state after the last forward.
    """

    logits: torch.Tensor
    values: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    parameter_gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    fired: tuple[str, ...] = ()
    fired_backward: tuple[str, ...] = ()
    random_state: torch.Tensor | None = None


class Recorder:
    """Collects what the sites show while a subject runs, and performs the run's edits there.

    Attributes:
        hooking: Get gradients by hooks on a Hugging Face model's tensors and a plain backward:
            checkpointing refuses to be asked for those of tensors.
        asking: Get a bridge's gradients by asking for those of the tensors that its forward hooks
            are given, or by hooks on them if ``hooking``, and not by backward hooks.
        edits_gradients: Whether `gradient` may return another one.
        copying: Copy the values that a bridge shows, and detach all. If not, see `overwritten`, and
            values are part of a graph that has been walked through: it saves a call for each.
        wraps: Whether a gradient that is returned to a bridge is in a tuple, as PyTorch's own are.
        overwrites: Sites of a bridge whose gradient is edited where it lies, and whether the hook
            that did so hands it back as well.
        unnoticed: Whether such an edit is written past PyTorch, which counts the others.
    """

    hooking = False
    asking = False
    edits_gradients = False
    copying = True
    wraps = False
    overwrites: Mapping[str, bool] = {}
    unnoticed = False

    def begin(self, case: Case) -> None:
        """Forget the last run."""
        self.edits = {edit.site: edit for edit in case.run.edits}
        self.backward = case.run.chunks == 1
        self.chunk = 0
        self.values: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.fired: list[str] = []
        self.fired_backward: list[str] = []
        self.differentiable: dict[str, tuple[torch.Tensor, Turn]] = {}
        self.random_state: torch.Tensor | None = None
        self._versions: list[tuple[torch.Tensor, int]] = []

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of somebody else's tensor, to be kept."""
        if self.copying:
            return tensor.detach().clone()
        self._versions.append((tensor, tensor._version))
        return tensor

    def overwritten(self) -> bool:
        """Whether a tensor that was kept and not copied has been written to in place since."""
        return any(value._version != version for value, version in self._versions)

    def key(self, name: str) -> str:
        """What a site's tensor of the present chunk is called."""
        return f"{name}#{self.chunk}" if self.chunk else name

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that the run's edit of a site leaves; the same object if there is none."""
        return edited(self.edits[name], tensor) if name in self.edits else tensor

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's tensor; it must be nobody else's to change."""
        key = self.key(name)
        self.fired.append(key)
        self.values[key] = tensor

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a site's gradient. What is returned takes its place; nothing of a plain recorder."""
        if self.backward:
            self.fired_backward.append(name)
            self.gradients[name] = tensor
        return None

    def see(
        self, name: str, source: torch.Tensor, turn: Turn, value: torch.Tensor | None = None
    ) -> None:
        """Keep a site's value, and where its gradient comes from.

        Args:
            name: The site's.
            source: A tensor of the model's own graph.
            turn: Gives the site's tensor of the source, and the site's gradient of the source's.
            value: The site's value, if ``turn`` does not give it.
        """
        if value is None:
            plain = turn is unturned and not self.copying
            value = source if plain else turn(source.detach())
        self.value(name, value)
        self.differentiate(name, source, turn)

    def differentiate(self, name: str, source: torch.Tensor, turn: Turn) -> None:
        """Get a site's gradient from a tensor of the graph. See `see`."""
        if not (source.requires_grad and self.backward):
            return
        if self.hooking or self.edits_gradients:
            source.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self.gradient(name, turn(gradient).detach().clone())
            )
        else:
            self.differentiable[name] = source, turn

    def visit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Edit and keep a tensor of a tapped Hugging Face model (see `conformance.taps`)."""
        tensor = self.edit(name, tensor)
        self.value(name, tensor.detach())
        self.differentiate(name, tensor, unturned)
        return tensor
