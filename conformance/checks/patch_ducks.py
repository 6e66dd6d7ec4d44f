"""The patch on whatever only looks like an OLMo."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from conformance.checks.patching import changed
from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing, exact_gaps, has_exact, needs_patch
from conformance.compare import Gap
from conformance.spec import Case
from conformance.strategies import clipped_cases
from conformance.subjects import at_work, hf_model, make_adapter, unpatcher


class _Projection:
    """Doubles what it is given, and keeps what it gave."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.gave = x * 2
        return self.gave


class _Attention:
    """An attention of nobody's library, which clamps as OLMo's does."""

    def __init__(self, config: Any, letters: str) -> None:
        self.config = config
        for letter in letters:
            setattr(self, f"{letter}_proj", _Projection())

    def forward(self, hidden: torch.Tensor, *, note: str) -> tuple[Any, ...]:
        projections = [getattr(self, f"{letter}_proj", _Projection()) for letter in "qkv"]
        given = [projection(hidden) for projection in projections]
        clip = self.config.clip_qkv
        for tensor in given if clip is not None else ():
            tensor.clamp_(min=-clip, max=clip)
        return (*given, clip, note)


class _Fixed(_Attention):
    """Has a configuration that nothing can take the place of."""

    @property
    def config(self) -> Any:
        return vars(self)["config"]


@check(
    "patch.duck_typed",
    "Whatever has config.clip_qkv and model.layers[i].self_attn is patched, in either mode, and "
    "where there is an exact one also layers alone and model.model.layers; an exact mode without "
    "q_proj, k_proj and v_proj, and a config that nothing can replace, are refused before anything "
    "is touched.",
    clipped_cases,
    examples=0.1,
)
def duck_typed(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Plain objects with three layers, of which the last lacks one projection at the end."""
    needs_patch(adapter)
    made: Any = make_adapter(adapter, hf_model(case.model))
    clip = case.model.clip_qkv
    config = SimpleNamespace(clip_qkv=clip)

    def duck(*letters: str) -> tuple[Any, list[_Attention]]:
        attentions = [_Attention(config, each) for each in letters]
        layers = [SimpleNamespace(self_attn=each) for each in attentions]
        model = SimpleNamespace(layers=layers)
        for _ in range(depth):
            model = SimpleNamespace(model=model)
        model.config = config
        return model, attentions

    # In OlmoForCausalLM they lie one deep, in OlmoModel not at all, in PEFT's wrapper two.
    depth = drawing(case)(3) if has_exact(adapter) else 1
    draw = torch.Generator().manual_seed(case.run.token_seed)
    # Half of it is clamped: as large as the clip before it is doubled.
    hidden = torch.randn((2, 3), generator=draw) * (clip or 1.0)
    plain = hidden * 2
    for exact in (False, True) if has_exact(adapter) else (False,):
        depth = (depth + exact) % 3
        model, attentions = duck("qkv", "qkv", "qkv")
        before = [dict(vars(each)) for each in attentions]
        with at_work(f"prepare_model of what only looks like an OLMo, exact_clip={exact}"):
            made.prepare_model(model, **({"exact_clip": True} if exact else {}))
            made.prepare_model(model, **({"exact_clip": True} if exact else {}))
            given = [each.forward(hidden, note="kept") for each in attentions]
        due = plain.clamp(-clip, clip) if exact and clip is not None else plain
        for index, (*tensors, seen, note) in enumerate(given):
            name = f"layers[{index}].self_attn, exact_clip={exact}"
            yield from exact_gaps(
                {f"{name}: {letter}": due for letter in "qkv"},
                {f"{name}: {letter}": each for letter, each in zip("qkv", tensors, strict=True)},
            )
            kept = {x: getattr(attentions[index], f"{x}_proj").gave for x in "qkv"}
            yield from exact_gaps(
                {f"{name}: what {x}_proj gave": plain for x in "qkv"},
                {f"{name}: what {x}_proj gave": each for x, each in kept.items()},
            )
            if (seen, note) != (clip if exact else None, "kept"):
                yield Gap(name, "contract", f"was called with {note!r}, saw the clip {seen}")
        if config.clip_qkv != clip:
            yield Gap("config.clip_qkv", "contract", f"now says {config.clip_qkv}")
        undo = unpatcher(adapter)
        if undo is not None:
            with at_work("unpatch_model"):
                undo(model)
            for index, attention in enumerate(attentions):
                for name in changed(before[index], dict(vars(attention))):
                    yield Gap(f"layers[{index}].self_attn.{name}", "contract", "not what it was")
    if has_exact(adapter):
        yield from _refused(made, *duck("qkv", "qkv", "qk"), "v_proj", exact_clip=True)
        model, attentions = duck("qkv", "qkv", "qkv")
        attentions[-1].__class__ = _Fixed
        yield from _refused(made, model, attentions, "config")


def _refused(
    made: Any, model: Any, attentions: list[_Attention], culprit: str, **mode: bool
) -> Iterator[Gap]:
    before = [dict(vars(each)) for each in attentions]
    try:
        made.prepare_model(model, **mode)
    except Exception as error:
        if culprit not in str(error):
            yield Gap(culprit, "contract", f"the error does not name it: {error}")
    else:
        yield Gap(culprit, "contract", "is missing, or cannot be replaced, and nothing said so")
    for index, attention in enumerate(attentions):
        for name in changed(before[index], dict(vars(attention))):
            yield Gap(f"layers[{index}].self_attn.{name}", "contract", "was touched, then refused")
