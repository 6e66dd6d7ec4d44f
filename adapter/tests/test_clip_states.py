"""The clip patch put on, taken off, put on again, copied and wrapped; and when it warns."""

from __future__ import annotations

import copy
import io
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapter.clip import patch_clip, unpatch_model
from adapter.tests.clipped import (
    CLIP,
    EXACT,
    TOKENS,
    assert_same,
    attention,
    build,
    on_q_proj,
    run,
    snapshot,
    standalone_warnings,
)

pytestmark = pytest.mark.filterwarnings("ignore:clip_qkv=")  # that the clamp is skipped


@EXACT
def test_unpatch_leaves_no_residue(exact: bool) -> None:
    model = build()
    attention(model).q_proj.register_forward_hook(lambda *_: None)
    attention(model, 1).forward = attention(model, 1).forward  # an instance's own, as others leave
    run(model)
    before, keys = snapshot(model), list(model.state_dict())
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) != before
    assert list(model.state_dict()) == keys
    run(model)
    assert list(model.state_dict()) == keys
    unpatch_model(model)
    assert snapshot(model) == before
    assert_same(run(model), run(build()))


def test_unpatch_without_a_patch_does_nothing() -> None:
    model = build()
    before = snapshot(model)
    unpatch_model(model)
    assert snapshot(model) == before
    unpatch_model(SimpleNamespace())


@EXACT
def test_patching_twice_is_patching_once(exact: bool) -> None:
    model = build()
    before = snapshot(model)
    patch_clip(model, exact_clip=exact)
    once = snapshot(model)
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) == once
    unpatch_model(model)
    assert snapshot(model) == before


@EXACT
def test_the_last_mode_wins(exact: bool) -> None:
    model = build()
    before = snapshot(model)
    patch_clip(model, exact_clip=not exact)
    run(model)
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), run(build(CLIP if exact else None)))
    unpatch_model(model)
    assert snapshot(model) == before


@EXACT
def test_without_clip_nothing_happens(exact: bool) -> None:
    model = build(None)
    before = snapshot(model)
    patch_clip(model, exact_clip=exact)
    assert snapshot(model) == before
    patch_clip(SimpleNamespace(), exact_clip=exact)


@EXACT
@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_patched_and_independent(exact: bool, how: str) -> None:
    def duplicate(model: Any) -> Any:
        if how == "deepcopy":
            return copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = build()
    patch_clip(model, exact_clip=exact)
    expected = run(model)
    twin = duplicate(model)
    assert_same(run(twin), expected)
    with torch.no_grad():
        attention(model).q_proj.weight.zero_()
        attention(model).q_proj.register_forward_hook(lambda *_: pytest.fail("crossed over"))
    assert_same(run(twin), expected)
    unpatch_model(twin)
    assert_same(run(twin), run(build()))
    assert "forward" not in vars(attention(twin))
    assert "forward" in vars(attention(model))


@EXACT
def test_copy_taken_during_a_forward(exact: bool) -> None:
    copies: list[Any] = []
    model = build()
    patch_clip(model, exact_clip=exact)
    handle = on_q_proj(model, lambda: copies.append(copy.deepcopy(model)))
    model(TOKENS)
    handle.remove()
    twin = copies[0]
    attention(twin).q_proj._forward_hooks.clear()
    assert attention(twin).config is twin.config
    assert attention(twin).config.clip_qkv == CLIP
    assert isinstance(attention(twin).q_proj, torch.nn.Linear)
    assert_same(run(twin), run(build(CLIP if exact else None)))


@EXACT
def test_a_wrapper_put_on_afterwards_survives(exact: bool) -> None:
    calls: list[int] = []
    model = build()
    patch_clip(model, exact_clip=not exact)
    patched = attention(model).forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return patched(*args, **kwargs)

    attention(model).forward = wrapper
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), run(build(CLIP if exact else None)))
    unpatch_model(model)
    assert_same(run(model), run(build()))
    assert attention(model).forward is wrapper
    assert len(calls) == 2


@EXACT
def test_unpatch_beneath_a_wrapper_lets_calls_through(exact: bool) -> None:
    model = build()
    patch_clip(model, exact_clip=exact)
    patched = attention(model).forward
    attention(model).forward = lambda *args, **kwargs: patched(*args, **kwargs)
    unpatch_model(model)
    assert_same(run(model), run(build()))
    attention(model).q_proj.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="is being modified inplace"):
        model(TOKENS)


@EXACT
def test_accelerate_hooks_before_and_after(exact: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build()
    hooks.add_hook_to_module(attention(model, 0), hooks.ModelHook())
    patch_clip(model, exact_clip=exact)
    hooks.add_hook_to_module(attention(model, 1), hooks.ModelHook())
    expected = run(build(CLIP if exact else None))
    assert_same(run(model), expected)
    for layer in (0, 1):  # takes the patch off layer 0 with it, and leaves it on layer 1
        hooks.remove_hook_from_module(attention(model, layer))
    patch_clip(model, exact_clip=exact)
    assert_same(run(model), expected)
    unpatch_model(model)
    assert_same(run(model), run(build()))


def test_first_standalone_forward_warns_once() -> None:
    model = build()
    assert standalone_warnings(lambda: patch_clip(model)) == []
    (message,) = standalone_warnings(lambda: model(TOKENS))
    assert str(CLIP) in message
    assert "prepare_model(hf_model, exact_clip=True)" in message
    patch_clip(model)
    assert standalone_warnings(lambda: model(TOKENS)) == []
    other = build()
    patch_clip(other)
    assert len(standalone_warnings(lambda: other(TOKENS))) == 1


@EXACT
def test_only_a_skipped_clamp_warns(exact: bool) -> None:
    model = build(CLIP if exact else None)
    patch_clip(model, exact_clip=exact)
    assert standalone_warnings(lambda: model(TOKENS)) == []


def test_a_clip_taken_away_since_does_not_warn() -> None:
    model = build()
    patch_clip(model)
    model.config.clip_qkv = None
    assert standalone_warnings(lambda: model(TOKENS)) == []


def test_a_copy_warns_again() -> None:
    model = build()
    patch_clip(model)
    model(TOKENS)
    twin = copy.deepcopy(model)
    assert len(standalone_warnings(lambda: (twin(TOKENS), twin(TOKENS)))) == 1


def test_warning_as_error_leaves_nothing() -> None:
    model = build()
    patch_clip(model)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="clip_qkv"):
            model(TOKENS)
    assert snapshot(model) == before
    assert_same(run(model), run(build(None)))
