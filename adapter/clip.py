"""Hugging Face's in-place QKV clamp, skipped or made safe for backward hooks.

``OlmoAttention.forward`` runs ``query_states.clamp_()`` (and key, value) right on what its
projections returned. PyTorch forbids that on the output of a module with a full backward hook: it
is a view of ``BackwardHookFunction``, made after all forward hooks, so no hook can hand out a copy
in time. Instead a `_PatchedForward` stands before each attention's ``forward``. While that runs,
and only then, a few attributes of the attention are covered by stand-ins:

- by default ``config``, which then says ``clip_qkv=None``: the clamp is skipped;
- in exact mode ``q_proj``, ``k_proj`` and ``v_proj``, which then return a clone of what the
  projection and all its hooks made: the clamp hits the clone.

An attribute is covered by an entry in the instance's ``__dict__``, which Python looks at before the
methods of the class and before `torch.nn.Module`'s registry of submodules. So nothing is ever
unregistered, ``state_dict`` is unchanged, and taking the entry out restores everything. (A dynamic
subclass would need no lock, but would not do for plain objects and would break pickling.)
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from operator import attrgetter
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

# In OlmoForCausalLM, in OlmoModel, and in PEFT's wrapper, whose ``model`` is an OlmoForCausalLM.
_LAYERS = ("model.layers", "layers", "model.model.layers")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Where an attention keeps its patch. ``forward`` alone would not show one that something else
# (accelerate's dispatch, say) has wrapped since.
_RECORD = "_clip_patch"
# One for all: it is held for a few dict operations, and a lock inside a patch cannot be copied.
_LOCK = threading.Lock()


def patch_clip(hf_model: Any, *, exact_clip: bool = False) -> None:
    """Let backward hooks live with ``clip_qkv``: skip the clamp, or clamp a clone.

    The configuration is never changed, and an idle attention differs in nothing but ``forward``, so
    a bridge that is built around the model later finds ``clip_qkv`` and clamps. Calling again is
    harmless; the last mode wins. It is a no-op without ``config.clip_qkv`` and on attentions that
    are already bridged: those clamp exactly, out of place, in either mode. All that can fail
    happens before the first change, so a model is never half patched.

    Args:
        hf_model: Whatever has ``config.clip_qkv`` and ``model.layers[i].self_attn`` (or ``layers``
            alone, as `OlmoModel` has, or PEFT's wrapper around one of them).
        exact_clip: Equal the unpatched model bit for bit, at the price of one clone for each
            projection, instead of skipping the clamp.

    Raises:
        AttributeError: If the layers, an attention, or what the mode needs of it is missing.
        TypeError: If an attention does not let the attributes in question be covered.
    """
    if getattr(getattr(hf_model, "config", None), "clip_qkv", None) is None:
        return
    attentions = _attentions(hf_model)
    if attentions is None:
        name = type(hf_model).__name__
        raise AttributeError(f"cannot patch clip_qkv: {name} has none of {', '.join(_LAYERS)}")
    raw = {path: a for path, a in attentions.items() if not isinstance(a, GeneralizedComponent)}
    for path, attn in raw.items():
        _check(path, attn, exact_clip)
    once = _Once()
    patches = [_PatchedForward.of(attn, once) for attn in raw.values()]
    for patch in patches:
        patch.install("exact" if exact_clip else "skip")


def unpatch_model(hf_model: Any) -> None:
    """Undo `patch_clip`, bit for bit; a no-op on a model that is not patched.

    Args:
        hf_model: The model that was given to `patch_clip`. If it was bridged since, the attentions
            inside of the bridge are restored.
    """
    for attn in (_attentions(hf_model) or {}).values():
        raw = attn.original_component if isinstance(attn, GeneralizedComponent) else attn
        patch = getattr(raw, "__dict__", {}).get(_RECORD)
        if patch is not None:
            patch.remove()


def _attentions(hf_model: Any) -> dict[str, Any] | None:
    """Each layer's attention, or None where it has none, by path; None if there are no layers."""
    for path in _LAYERS:
        try:
            layers = attrgetter(path)(hf_model)
        except AttributeError:
            continue
        return {
            f"{path}[{i}].self_attn": getattr(layer, "self_attn", None)
            for i, layer in enumerate(layers)
        }
    return None


def _check(path: str, attn: Any, exact: bool) -> None:
    """Raise unless an attention has what the mode needs, and lets it be covered."""
    if attn is None:
        raise AttributeError(f"cannot patch clip_qkv: there is no {path}")
    where = f"cannot patch clip_qkv (exact_clip={exact}): {path}, a {type(attn).__name__},"
    needed = ("forward", *_PROJECTIONS) if exact else ("forward",)
    if missing := [name for name in needed if not callable(getattr(attn, name, None))]:
        raise AttributeError(f"{where} has no callable {', '.join(missing)}")
    # Properties and slots come before the instance's __dict__.
    on_class = {n: inspect.getattr_static(type(attn), n, None) for n in (*needed, "config")}
    fixed = [name for name, found in on_class.items() if inspect.isdatadescriptor(found)]
    if fixed or not hasattr(attn, "__dict__"):
        raise TypeError(f"{where} does not let {', '.join(fixed or on_class)} be replaced")


class _Once:
    """Say yes once. A copied or loaded model gets a new one, and so warns again."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self) -> bool:
        with _LOCK:
            first, self._said = not self._said, True
        return first

    def __reduce__(self) -> tuple[Any, ...]:
        return _Once, ()


class _StandIn:
    """Reads and writes go through to another object; a deep copy of this is one of that."""

    def __init__(self, real: Any, **own: Any) -> None:
        vars(self).update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._real,)


def _same(real: Any) -> Any:
    return real


class _CliplessConfig(_StandIn):
    """Has no clip for the threads inside of the attention, and the true one for all others."""

    @property
    def clip_qkv(self) -> Any:
        return None if self._inside[threading.get_ident()] else self._real.clip_qkv


class _CloningProjection(_StandIn):
    """Returns what may be written to in place."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._real(*args, **kwargs)
        return output.clone() if isinstance(output, torch.Tensor) else output


class _PatchedForward:
    """An attention's ``forward`` with stand-ins in place while at least one thread is inside.

    Threads share the attention: the first one to enter puts the stand-ins up, the last one to leave
    takes them down.
    """

    def __init__(self, attn: Any, once: _Once) -> None:
        self.attn = attn
        self.once = once
        self.mode = "off"
        # By this name inspect.signature, which bridges ask, finds the true parameters.
        self.__wrapped__ = attn.forward
        self.was_own = "forward" in vars(attn)
        self.inside: Counter[int] = Counter()  # thread -> depth
        self.stand_ins: dict[str, Any] = {}
        self.covered: dict[str, Any] = {}

    @classmethod
    def of(cls, attn: Any, once: _Once) -> _PatchedForward:
        """Return the patch that stands outermost on an attention, or a new one."""
        outermost = vars(attn).get("forward")
        return outermost if isinstance(outermost, cls) else cls(attn, once)

    def install(self, mode: str) -> None:
        """Stand before the attention's ``forward``, in this mode."""
        own = vars(self.attn)
        if own.get(_RECORD, self) is not self:  # wrapped since, it still runs further in
            own[_RECORD].mode = "off"
        self.mode = mode
        own["forward"] = own[_RECORD] = self

    def remove(self) -> None:
        """Give ``forward`` back, or, if something has wrapped it since, just let calls through."""
        self.mode = "off"
        own = vars(self.attn)
        del own[_RECORD]
        if own.get("forward") is self:
            del own["forward"]
            if self.was_own:
                own["forward"] = self.__wrapped__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention's ``forward``."""
        if self.mode == "skip":
            self._warn()
        thread = threading.get_ident()
        with _LOCK:
            if not self.inside:
                self._put_up()
            self.inside[thread] += 1
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            with _LOCK:
                self.inside[thread] -= 1
                if not self.inside[thread]:
                    del self.inside[thread]
                if not self.inside:
                    self._take_down()

    def _put_up(self) -> None:
        own = vars(self.attn)
        if self.mode == "exact":
            self.stand_ins = {n: _CloningProjection(getattr(self.attn, n)) for n in _PROJECTIONS}
        elif self.mode == "skip":
            config = getattr(self.attn, "config", None)
            self.stand_ins = {"config": _CliplessConfig(config, _inside=self.inside)}
        self.covered = {name: own[name] for name in self.stand_ins if name in own}
        own.update(self.stand_ins)

    def _take_down(self) -> None:
        own = vars(self.attn)
        for name, stand_in in self.stand_ins.items():
            if own.get(name) is not stand_in:
                continue  # somebody has set it during the forward, and meant it
            if name in self.covered:
                own[name] = self.covered[name]
            else:
                del own[name]
        self.stand_ins, self.covered = {}, {}

    def _warn(self) -> None:
        # Bridging replaces the attention by one that only calls the projections: a bridged model
        # never gets here. When it is patched nobody knows yet whether it will be bridged.
        clip = getattr(getattr(self.attn, "config", None), "clip_qkv", None)
        if clip is not None and self.once():
            warnings.warn(
                f"clip_qkv={clip} is skipped: this model was prepared for a bridge, which clamps "
                "on its own, but runs without one. For the exact clamp call prepare_model("
                "hf_model, exact_clip=True); unpatch_model(hf_model) undoes the patch.",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Nobody is inside of a copy."""
        return {**vars(self), "inside": Counter(), "stand_ins": {}, "covered": {}}
