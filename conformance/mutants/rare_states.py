"""Faults of hooks and what they keep that a first reading of the promises does not call to mind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from adapter import normalization, recompute
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import mutant

of_bridge = partial(mutant, owner=OlmoTransformerBridge)
of_point = partial(mutant, owner=OlmoHookPoint)


@of_point("caching.gradient_before_users", "incl_bwd", "caching.incl_bwd", attribute="add_hook")
def _(original: Any) -> Any:
    """run_with_cache keeps gradients as they are before the user's backward hooks."""

    def add_hook(self: Any, hook: Any, dir: Any = "fwd", *args: Any, **kwargs: Any) -> Any:
        of_cache = dir == "bwd" and "make_grad_cache_hook" in getattr(hook, "__qualname__", "")
        if of_cache:
            kwargs["prepend"] = True
        return original(self, hook, dir, *args, **kwargs)

    return add_hook


@of_bridge(
    "hook_api.level_left",
    "an error in run_with_cache",
    "hook_api.exceptions",
    attribute="run_with_cache",
)
def _(original: Any) -> Any:
    """A run_with_cache that fails leaves context_level one too high."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            self.context_level += 1
            raise

    return run


@mutant(
    "recompute.left_after_error",
    "a hook that fails in the backward",
    "firing.recomputed",
    recompute,
    "_put_back",
)
def _(_original: Any) -> Any:
    """An error in the recomputation of a block leaves the hooks of its forward on."""

    @contextmanager
    def put_back(settings: Any) -> Iterator[None]:
        today = [(own, {name: own[name] for name in then}) for own, then in settings]
        for own, then in settings:
            own.update(then)
        yield
        for own, now in today:
            own.update(now)

    return put_back


@mutant(
    "flags.one_of_two",
    "an edit by heads beside one of what the projection reads",
    "flags.refused",
    OlmoAttentionBridge,
    "_project",
)
def _(original: Any) -> Any:
    """The edit by heads is dropped, and nothing said."""

    def project(self: Any, hidden_states: Any, residual: Any) -> Any:
        try:
            return original(self, hidden_states, residual)
        except ValueError:
            return [linear(hidden_states) for linear in (self.q, self.k, self.v)]

    return project


@of_bridge(
    "generation.clears_contexts",
    "something in hook.ctx",
    "generation.leaves_nothing",
    attribute="generate",
)
def _(original: Any) -> Any:
    """A generation ends with clear_contexts()."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self.clear_contexts()

    return generate


@of_point(
    "copies.shared_context", "something in hook.ctx", "copies.hooked", attribute="__deepcopy__"
)
def _(original: Any) -> Any:
    """A copy keeps what its hooks keep in the original's hook.ctx."""

    def deepcopy(self: Any, memo: Any) -> Any:
        new = original(self, memo)
        new.ctx = self.ctx
        return new

    return deepcopy


@of_point("copies.given_the_original", "a copied hook", "copies.hooked", attribute="_take_over")
def _(_original: Any) -> Any:
    """The hooks of a copy are given the hook points of the original."""
    return lambda self, *args: None


@mutant(
    "flags.one_late",
    "a hook that turns use_attn_result, and a block behind it",
    "firing.gated",
    OlmoAttentionBridge,
    "_project_out",
)
def _(original: Any) -> Any:
    """use_attn_result is looked up in the first block, for all."""
    first: list[bool] = []

    def project_out(self: Any, z: Any) -> Any:
        now = self.config.use_attn_result
        if self.original_component.layer_idx == 0:
            first[:] = [now]
        vars(self.config)["use_attn_result"] = first[0] if first else now
        try:
            return original(self, z)
        finally:
            vars(self.config)["use_attn_result"] = now

    return project_out


@mutant(
    "flags.from_the_start",
    "a hook that turns on a flag of what heads read, behind ln1",
    "firing.gated",
    normalization,
    "run_of_norm",
)
def _(original: Any) -> Any:
    """Heads are shown the normalized stream if their flag was off at the LayerNorm."""

    def run_of_norm(norm: Any) -> Any:
        run = original(norm)
        return run if run is not None and run.attention.forks_input else None

    return run_of_norm
