"""A site of the table as source: how it is seen, and edited, on Hugging Face's model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conformance.reproduce.text import WIDTH
from conformance.sites import Layout, Port, Site
from conformance.spec import Edit, ModelSpec

# The inside of attention that is seen without copying Hugging Face's code.
_SPIED = {Port.QUERY: "query", Port.KEY: "key"}
# Which of a module's outputs a tensor is.
_SECONDS = {Port.FIRST: 0, Port.SECOND: 1, Port.PATTERN: 1}


# What the functions below are called with: they keep a tensor, or its gradient, in ``seen``.
SEE = ["def see(x):", "    seen.append(x.detach().clone())"]
WATCH = [
    "def watch(x):",
    "    x = x.view_as(x)",
    "    x.register_hook(seen.append)",
    "    return x.clone()",
]


class NoTemplateError(Exception):
    """There is no way to write this down."""


@dataclass(frozen=True)
class Place:
    """A site on one model.

    Attributes:
        site: Of the table.
        model: The model's spec.
    """

    site: Site
    model: ModelSpec

    def _in_layout(self, tensor: str) -> str:
        if self.site.layout is Layout.HEADS:
            return f"{tensor}.unflatten(-1, (-1, {self.model.d_head}))"
        return f"{tensor}.transpose(1, 2)" if self.site.layout is Layout.SWAPPED else tensor

    def _from_layout(self, tensor: str) -> str:
        if self.site.layout is Layout.HEADS:
            return f"{tensor}.flatten(-2)"
        return f"{tensor}.transpose(1, 2)" if self.site.layout is Layout.SWAPPED else tensor

    @property
    def _module(self) -> str:
        return "model." + re.sub(r"\.(\d+)", r"[\1]", self.site.module)

    def _hook(self, register: str, function: str) -> list[str]:
        line = f"{self._module}.{register}({function})"
        if len(line) <= WIDTH:
            return [line]
        return [f"hooked = {self._module}", f"hooked.{register}({function})"]

    def _hooked(self, visit: str, *, gives_back: bool) -> list[str]:
        """A hook that shows its tensor to the function ``visit``, and may go on with its result."""
        port = self.site.port
        if port in _SPIED:
            return self._spied(visit, gives_back=gives_back)
        if port is Port.SCALE:
            return self._scale(visit, gives_back=gives_back)
        inside = port is Port.IN and self.site.module.endswith("self_attn")
        if inside or port in (Port.COS, Port.SIN):
            return self._given(visit, gives_back=gives_back)
        if port in (Port.IN, Port.OUT):
            tensor, kind = ("args[0]", "_pre") if port is Port.IN else ("out", "")
            shown = f"{visit}({self._in_layout(tensor)})"
            body = self._from_layout(shown) if gives_back else shown
            function = f"lambda m, args: {body}" if kind else f"lambda m, args, out: {body}"
            return self._hook(f"register_forward{kind}_hook", function)
        if port in _SECONDS and not gives_back:
            which = _SECONDS[port]
            return self._hook(
                "register_forward_hook", f"lambda m, args, out: {visit}(out[{which}])"
            )
        raise NoTemplateError(f"{self.site.name} is not seen from outside of Hugging Face's model")

    def _spied(self, visit: str, *, gives_back: bool) -> list[str]:
        name, layer = _SPIED[self.site.port], self.site.module.split(".")[2]
        shown = f"{visit}({self._in_layout(name)})"
        line = f"{name} = {self._from_layout(shown)}" if gives_back else shown
        if visit == "watch":  # nothing else uses it
            kept = f"lambda grad: seen.append({self._in_layout('grad')})"
            line = f"{name}.register_hook({kept})"
        there = [f"    if module.layer_idx == {layer}:", f"        {line}"]
        return [
            "eager = modeling_olmo.eager_attention_forward",
            "def spy(module, query, key, *rest, **more):",
            *(there if self.model.num_hidden_layers > 1 else [f"    {line}"]),
            "    return eager(module, query, key, *rest, **more)",
            "modeling_olmo.eager_attention_forward = spy",
        ]

    def _given(self, visit: str, *, gives_back: bool) -> list[str]:
        """What an attention is given by name."""
        name = "hidden_states" if self.site.port is Port.IN else "position_embeddings"
        new = {
            Port.IN: f"{visit}(given)",
            Port.COS: f"({visit}(given[0]), given[1])",
            Port.SIN: f"(given[0], {visit}(given[1]))",
        }[self.site.port]
        body = f'return args, {{**kwargs, "{name}": {new}}}' if gives_back else new
        return [
            "def before(module, args, kwargs):",
            f'    given = kwargs["{name}"]',
            f"    {body}",
            f"{self._module}.register_forward_pre_hook(before, with_kwargs=True)",
        ]

    def _scale(self, visit: str, *, gives_back: bool) -> list[str]:
        shown = f"{visit}((centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())"
        return [
            "def scaled(module, args, out):",
            "    centered = args[0].float() - args[0].float().mean(-1, keepdim=True)",
            f"    return (centered / {shown}).to(out.dtype)" if gives_back else f"    {shown}",
            f"{self._module}.register_forward_hook(scaled)",
        ]

    def value(self) -> list[str]:
        """Keep the tensor in ``seen``."""
        return ["seen = []", *SEE, *self._hooked("see", gives_back=False)]

    def gradient(self) -> list[str]:
        """Keep the gradient in ``seen``: of this use of the tensor alone."""
        if self.site.port is Port.SCALE:
            raise NoTemplateError(f"{self.site.name} is inside a fused kernel")
        watch = [] if self.site.port in _SPIED else WATCH
        return ["seen = []", *watch, *self._hooked("watch", gives_back=True)]

    def edited(self) -> list[str]:
        """Go on with the edited tensor."""
        return self._hooked("edit", gives_back=True)


def imports(lines: list[str]) -> dict[str, list[str]]:
    """What the lines above need of transformers, by module."""
    if not any("def spy" in line for line in lines):
        return {}
    return {"transformers.models.olmo": ["modeling_olmo"]}


def edit_function(edit: Edit, site: Site) -> list[str]:
    """``edit(x)``, which returns what the edit leaves of a tensor in the hook's layout."""
    if site.module == "model.embed_tokens" and site.port is Port.IN and edit.kind != "identity":
        return ["def edit(x):", "    return x.roll(1, -1)"]
    split = site.layout is not Layout.SAME or site.port in (Port.SCORES, Port.PATTERN)
    noise = (
        f"torch.randn(x.shape, generator=torch.Generator().manual_seed({edit.seed})).to(x.dtype)"
    )

    def without(dim: int) -> str:
        return f"x.index_fill({dim}, torch.tensor({edit.seed} % x.shape[{dim}]), 0)"

    left = {
        "identity": "x",
        "zero": "x * 0",
        "scale": "x * 0.5",
        "in_place": "x * 0.5",
        "noise": "x + 0.1 * noise",
        "replace": "noise",
        "one_head": without(2 if split else -1),
        "one_position": without(1),
        "one_row": without(0),
    }[edit.kind]
    drawn = [f"    noise = {noise}"] if edit.kind in ("noise", "replace") else []
    return ["def edit(x):", *drawn, f"    return {left}"]
