"""Faults of the adapter's surface, and of the patch on unusual models and in threads."""

from __future__ import annotations

import threading
from typing import Any

from adapter import clip, loading, olmo
from adapter.olmo import OlmoArchitectureAdapter
from conformance.mutants.catalogue import add, mutant


@mutant("surface.flag", "any", "surface.constructor", OlmoArchitectureAdapter, "__init__")
def flag(original: Any) -> Any:
    """The configuration says that the last norm is an RMS norm."""

    def init(self: Any, cfg: Any) -> None:
        original(self, cfg)
        self.cfg.final_rms = True

    return init


@mutant("surface.shared_map", "any", "surface.constructor", OlmoArchitectureAdapter, "__init__")
def shared_map(original: Any) -> Any:
    """All adapters share the components of the first."""
    first: list[Any] = []

    def init(self: Any, cfg: Any) -> None:
        original(self, cfg)
        first.append(self.component_mapping)
        self.component_mapping = first[0]

    return init


add(
    "surface.bridge_required",
    "setup_component_testing cannot do without a bridge",
    "any",
    "surface.methods",
    OlmoArchitectureAdapter,
    "setup_component_testing",
    lambda original: lambda self, hf_model, bridge_model: original(self, hf_model, bridge_model),
)
add(
    "surface.six",
    "b_gate is not among the optional parameters",
    "any",
    "surface.optional_parameters",
    OlmoArchitectureAdapter,
    "optional_parameters",
    lambda original: tuple(name for name in original if not name.endswith("b_gate")),
)


@mutant("surface.registers", "any", "surface.entrances", loading, "bridge")
def registers(original: Any) -> Any:
    """Building one bridge makes every later OLMo of the process use this adapter."""

    def bridge(hf_model: Any, tokenizer: Any = None) -> Any:
        loading.register()
        return original(hf_model, tokenizer)

    return bridge


@mutant("patch.leaves_early", "threads", "patch.threads", clip._PatchedForward, "__call__")
def leaves_early(original: Any) -> Any:
    """The first thread to leave an attention takes down what hides the clip from the others."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with clip._LOCK:
            if not self.stand_ins:
                self._put_up()
            self.inside[threading.get_ident()] += 1
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            with clip._LOCK:
                self._take_down()

    return call


@mutant("patch.first_mode", "two modes", "patch.modes", clip._PatchedForward, "install")
def first_mode(original: Any) -> Any:
    """A model that is patched stays in its first mode."""
    return lambda self, mode: original(self, mode if self.mode == "off" else self.mode)


@mutant("patch.undone_once", "any", "patch.modes", clip._PatchedForward, "remove")
def undone_once(original: Any) -> Any:
    """Unpatching leaves the patched forward in place, switched off."""

    def remove(self: Any) -> None:
        self.mode = "off"

    return remove


add(
    "patch.half_patched",
    "what exact mode needs is looked for when it is already on",
    "a layer without v_proj",
    "patch.duck_typed",
    clip,
    "_check",
    lambda original: lambda path, attn, exact: None,
)


@mutant("patch.marks", "no clip", "patch.no_clip", olmo, "patch_clip")
def marks(original: Any) -> Any:
    """A model without a clip is patched all the same."""

    def patch(model: Any, *, exact_clip: bool = False) -> None:
        original(model, exact_clip=exact_clip)
        for layer in getattr(getattr(model, "model", None), "layers", ()):
            layer.self_attn.prepared = True

    return patch
