"""What the hooks behind a flag carry, and what an edit there does, computed on the reference.

Hugging Face has no tensor for each head's input or result. But its weights say what they are: head
h of q is the LayerNorm of its own copy of the residual stream times rows of ``q_proj``, and what it
writes is its z times columns of ``o_proj``. So a tapped reference is made to read and write through
such copies. Its gradients are then those of a computation from scratch, parameters included.

A sum taken in another order is rounded otherwise, and no later value could be compared bit for bit.
So behind the copies the reference goes on with what the bridge showed there, and likewise with the
gradient that the bridge sends out of them. What it would have gone on with is what the bridge is
compared with, there and only there with an allowance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch

from conformance.edits import edited_head
from conformance.recorder import Observation, Recorder
from conformance.sites import behind_flags
from conformance.spec import Case, Edit
from conformance.subjects import Subject
from conformance.taps import LAYER_NORM_EPS

_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")
# What all heads read together. Once one of them reads a copy of its own, nothing says what share of
# the gradient passes here.
_SHARED = (
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.hook_in",
    *(f"attn.{letter}.hook_in" for letter in "qkv"),
)


def with_gradient_of(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The value of one tensor, bit for bit, with the gradient of another."""
    return value.detach() + (other - other.detach())


def _parts(name: str) -> tuple[str, str]:
    """A site's block, ``blocks.0``, and its name within that."""
    words = name.split(".")
    return ".".join(words[:2]), ".".join(words[2:])


def _most(tensor: torch.Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.detach().abs().max())


def _least(tensor: torch.Tensor) -> float:
    """The smallest normal number: what is below it is rounded no finer than that is."""
    return float(torch.finfo(tensor.dtype).smallest_normal)


class _Copies:
    """One copy of a residual stream for each head that reads it.

    Args:
        residual: ``[batch, pos, d_model]``.
        hooked: The copies, ``[batch, pos, head, d_model]``, as their hook leaves them.
        norm: The LayerNorm behind them.
    """

    def __init__(self, residual: torch.Tensor, hooked: torch.Tensor, norm: Any) -> None:
        self.plain, self.hooked = residual.detach().unsqueeze(2), hooked
        # The class's own forward: the module would show its tensors to the taps once more.
        self.normed = type(norm).forward(norm, hooked)
        self.normed_plain = type(norm).forward(norm, self.plain)

    @property
    def reach(self) -> float:
        """How much of a LayerNorm's output a head reads at most, edited and plain together."""
        return _most(self.normed) + _most(self.normed_plain)

    @property
    def steepness(self) -> float:
        """How much the LayerNorm multiplies a gradient at most, of the edited and the plain."""
        most = 0.0
        for x, normed in ((self.hooked, self.normed), (self.plain, self.normed_plain)):
            scale = (x.detach().float().var(-1, correction=0) + LAYER_NORM_EPS).sqrt()
            most += (2 + _most(normed)) / float(scale.min())
        return most


class Forks(Recorder):
    """Leads a reference through copies while it runs the case without the edits behind flags.

    Args:
        case: What runs.
        subject: The reference.
        seen: What the bridge showed of the same run; None if the reference is to go on alone.
        exact: Whether a bridge must equal Hugging Face bit for bit wherever nothing is edited.
        everywhere: Go through copies in every block, and not only where one is edited.
        of_gradients: Edits of the gradients at hooks behind flags.

    Attributes:
        sizes: How much is added up at most, in absolute terms, in each value that a bridge may sum
            in another order.
        gradient_sizes: The same of gradients at sites.
        parameter_sizes: The same of gradients of parameters.
    """

    edits_gradients = True  # and any value, not only those that a run edits

    def __init__(
        self,
        case: Case,
        subject: Subject,
        seen: Observation | None,
        *,
        exact: bool,
        everywhere: bool,
        of_gradients: Collection[Edit] = (),
    ) -> None:
        self.spec, self.model = case.model, subject.model
        self.seen, self.exact = seen, exact
        self.gates = behind_flags(case.model, case.run.flags)
        self.gate_edits = {edit.site: edit for edit in case.run.edits}
        self.gradient_edits = {edit.site: edit for edit in of_gradients}
        edited = {*self.gate_edits, *self.gradient_edits}
        self.led = {gate for gate in self.gates if everywhere or gate in edited}
        self.copies: dict[str, _Copies] = {}
        self.z: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, float] = {}
        self.gradient_sizes: dict[str, float] = defaultdict(float)
        self.parameter_sizes: dict[str, float] = {}

    def visit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See `Recorder.visit`."""
        block, hook = _parts(name)
        if hook in ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out"):
            return self.read(block, hook.split(".")[1], tensor)
        if hook == "attn.o.hook_out":
            return self.write(block, tensor)
        if hook == "ln2.hook_in":
            tensor = self.through_gate(f"{block}.hook_mlp_in", tensor)
        tensor = super().visit(name, tensor)
        if hook == "ln1.hook_in":
            self.fork(block, tensor)
        elif hook == "attn.o.hook_in":
            self.z[block] = tensor
        return tensor

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep the gradient that is due at a site; behind copies the bridge's own goes on."""
        super().gradient(name, tensor)
        if name in self.gradient_edits:
            return edited_head(self.gradient_edits[name], tensor)
        block, hook = _parts(name)
        behind = {"hook_in": self.inputs_of(block), "attn.o.hook_in": [f"{block}.attn.hook_result"]}
        if not self.seen or not self.led.intersection(behind.get(hook, ())):
            return None
        seen = self.seen.gradients.get(name)
        alike = seen is not None and (seen.shape, seen.dtype) == (tensor.shape, tensor.dtype)
        return seen if alike else None

    def inputs_of(self, block: str) -> list[str]:
        """The hooks on what a block's heads read."""
        return [gate for name in _INPUTS if (gate := f"{block}.attn.{name}") in self.gates]

    def through_gate(self, gate: str, tensor: torch.Tensor) -> torch.Tensor:
        """Edit and keep the tensor of a hook behind a flag, if that is on."""
        if gate not in self.gates:
            return tensor
        if gate in self.gate_edits:
            tensor = edited_head(self.gate_edits[gate], tensor)
        # What comes later has a gradient of its own.
        return super().visit(gate, tensor).view_as(tensor)

    def go_on_with_value(
        self, names: list[str], plain: torch.Tensor, due: torch.Tensor, touched: torch.Tensor
    ) -> torch.Tensor:
        """Keep what is due at a site, and go on with what the bridge showed instead.

        Args:
            names: The site, and any other that shows the same tensor, should this one be silent.
            plain: What Hugging Face computed.
            due: What it is through copies.
            touched: Where the two may differ, if they are equal wherever nothing was edited.
        """
        due = due.to(plain.dtype)  # under autocast a bias is wider than what it is added to
        value = torch.where(touched, due, plain) if self.exact else due
        due = super().visit(names[0], with_gradient_of(value, due))
        shown = [self.seen.values.get(self.key(name)) for name in names] if self.seen else []
        seen = next((tensor for tensor in shown if tensor is not None), None)
        if seen is None or seen.shape != due.shape:
            return due
        seen = seen.to(plain.dtype)
        return with_gradient_of(torch.where(touched, seen, due) if self.exact else seen, due)

    def fork(self, block: str, residual: torch.Tensor) -> None:
        """Copy the residual stream for each head that reads it."""
        norm, spec = self.layer(block).input_layernorm, self.spec
        for gate in self.inputs_of(block):
            of_queries = gate.endswith(("hook_q_input", "hook_attn_in"))
            heads = spec.num_attention_heads if of_queries else spec.num_key_value_heads
            hooked = self.through_gate(gate, residual.unsqueeze(2).repeat(1, 1, heads, 1))
            self.copies[gate] = _Copies(residual, hooked, norm)

    def read(self, block: str, letter: str, plain: torch.Tensor) -> torch.Tensor:
        """Q, k or v, ``[batch, pos, head, d_head]``, of what each of its heads reads.

        Where there are fewer heads than copies, each reads the mean of its group's.
        """
        name, own = f"{block}.attn.{letter}.hook_out", f"{block}.attn.hook_{letter}_input"
        gate = own if own in self.gates else f"{block}.attn.hook_attn_in"
        copies, (batch, pos, heads, d_head) = self.copies.get(gate), plain.shape
        if copies is None:
            return super().visit(name, plain)

        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(batch, pos, heads, -1, x.shape[-1])

        linear = self.projection(block, letter)
        weight, bias = linear.weight.view(heads, d_head, -1), linear.bias
        if gate in self.led:
            due = torch.einsum("bphm,hdm->bphd", by_head(copies.normed).mean(3), weight)
            due = due if bias is None else due + bias.view(heads, d_head)
            touched = by_head(copies.hooked != copies.plain).flatten(3).any(-1, keepdim=True)
            self.sizes[self.key(name)] = copies.reach * _most(weight.abs().sum(-1)) + _most(bias)
            due = self.go_on_with_value([name], plain, due, touched)
        else:
            due = super().visit(name, plain)

        def size(gradient: torch.Tensor) -> None:
            back = _most(gradient) * _most(weight.abs().sum(1)) + 4 * _least(gradient)
            back *= copies.steepness
            for above in (f"{block}.ln1.hook_in", f"{block}.hook_in"):
                self.gradient_sizes[above] += back * heads
            if gate in self.led:
                self.gradient_sizes[gate] += back
                self.size_parameters(block, letter, gradient, copies.reach)

        if self.led.intersection(self.inputs_of(block)):
            self.when_backward(due, size)
        return due

    def write(self, block: str, plain: torch.Tensor) -> torch.Tensor:
        """The sum of what the heads write, ``[batch, pos, d_model]``."""
        name, gate = f"{block}.attn.o.hook_out", f"{block}.attn.hook_result"
        if gate not in self.gates:
            return super().visit(name, plain)
        z, linear = self.z[block], self.projection(block, "o")
        weight, bias = linear.weight.view(plain.shape[-1], *z.shape[2:]), linear.bias
        results = torch.einsum("bphd,mhd->bphm", z, weight)
        hooked = self.through_gate(gate, results)
        each = _most(z) * _most(weight.abs().sum(-1))
        self.sizes[self.key(gate)] = each
        if gate not in self.led:
            return super().visit(name, plain)
        due = hooked.sum(2) if bias is None else hooked.sum(2) + bias
        touched = (hooked != results).flatten(2).any(-1, keepdim=True)
        added = each * z.shape[2] + _most(hooked.abs().sum(2)) + _most(bias)
        self.sizes[self.key(name)] = added
        due = self.go_on_with_value([name, f"{block}.attn.hook_out"], plain, due, touched)

        def size(gradient: torch.Tensor) -> None:
            back = _most(gradient) * _most(weight.abs().sum(0)) + 4 * _least(gradient)
            self.gradient_sizes[f"{block}.attn.o.hook_in"] = back
            self.size_parameters(block, "o", gradient, _most(z))

        self.when_backward(due, size)
        return due

    def layer(self, block: str) -> Any:
        """Hugging Face's module of a block."""
        return self.model.model.layers[int(block.split(".")[1])]

    def projection(self, block: str, letter: str) -> torch.nn.Linear:
        """Hugging Face's module of q, k, v or o of a block."""
        linear: torch.nn.Linear = getattr(self.layer(block).self_attn, f"{letter}_proj")
        return linear

    def size_parameters(
        self, block: str, letter: str, gradient: torch.Tensor, reach: float
    ) -> None:
        """Keep the sizes of the gradients of a projection's weight and bias."""
        added = float(gradient.abs().sum((0, 1)).max())
        module = f"model.layers.{block.split('.')[1]}.self_attn.{letter}_proj"
        self.parameter_sizes[f"{module}.weight"] = added * reach + 4 * _least(gradient)
        self.parameter_sizes[f"{module}.bias"] = added + 4 * _least(gradient)

    def when_backward(self, tensor: torch.Tensor, do: Callable[[torch.Tensor], None]) -> None:
        """Call a function with the gradient of a tensor."""
        if tensor.requires_grad and self.backward:
            tensor.register_hook(do)  # type: ignore[no-untyped-call]

    def has_gradient(self, name: str) -> bool:
        """Whether the gradient at a site is that of a computation from scratch."""
        block, hook = _parts(name)
        if name in self.gates and hook != "hook_mlp_in":
            return name in self.led
        return hook not in _SHARED or not self.led.intersection(self.inputs_of(block))
