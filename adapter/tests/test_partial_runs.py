"""A run of some blocks is no other run's: not one's in a hook, not a thread's, not a copy's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch

from adapter.block import OlmoBlockBridge
from adapter.tests import models
from adapter.tests.models import TOKENS, bridged, same

OTHER = TOKENS.flip(0)
PARTS: list[dict[str, int]] = [{"stop_at_layer": 1}, {"start_at_layer": 1}]
PLACE = "blocks.0.attn.hook_in"


def run_of(bridge: Any, part: dict[str, int]) -> Any:
    if "start_at_layer" in part and not hasattr(bridge, "_setup_start_at_layer"):
        pytest.skip("TransformerLens cannot start at a layer")
    return bridge(bridge.W_E[TOKENS] if "start_at_layer" in part else TOKENS, **part)


def within(bridge: Any, part: dict[str, int], inner: Callable[[], Any]) -> tuple[Any, Any]:
    """A run of some blocks, and what its first hook calls."""
    seen: list[Any] = []

    def once(tensor: torch.Tensor, hook: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(inner())

    with bridge.hooks(fwd_hooks=[(PLACE, once)]):
        return run_of(bridge, part), seen[1]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_in_a_hook(part: dict[str, int]) -> None:
    bridge = bridged(models.olmo())
    inners: list[Any] = [
        lambda: bridge(OTHER),
        lambda: bridge.hf_generate(OTHER, max_new_tokens=2, do_sample=False),
        lambda: run_of(bridge, {"stop_at_layer": 0}),
        lambda: run_of(bridge, part),
    ]
    for inner in inners:
        output, got = within(bridge, part, inner)
        assert same(output, run_of(bridge, part))
        assert same(got, inner())


def test_a_part_that_a_hook_calls_is_whole() -> None:
    bridge = bridged(models.olmo())
    stream = bridge.W_E[OTHER].detach()
    where = bridge.original_model.model.rotary_emb(stream, torch.arange(OTHER.shape[1])[None])
    parts: list[Callable[[], Any]] = [
        lambda: bridge.original_model(OTHER).logits,
        lambda: bridge.blocks[1](stream, position_embeddings=where)[0],
    ]
    for part in parts:
        _, got = within(bridge, {"stop_at_layer": 1}, part)
        assert same(got, part())


def test_in_a_hook_of_a_cached_run() -> None:
    bridge = bridged(models.olmo())
    inner: list[Any] = []

    def once(tensor: torch.Tensor, hook: Any) -> None:
        if not inner:
            inner.append(None)
            inner.append(bridge.run_with_cache(OTHER, stop_at_layer=1)[0])
            inner.append(bridge(OTHER))

    with bridge.hooks(fwd_hooks=[(PLACE, once)]):
        output, cache = bridge.run_with_cache(TOKENS, stop_at_layer=1)
    assert same(output, bridge(TOKENS, stop_at_layer=1))
    assert same(inner[1], bridge(OTHER, stop_at_layer=1))
    assert same(inner[2], bridge(OTHER))
    assert "blocks.1.hook_in" not in cache


@pytest.mark.parametrize("thread", [False, True], ids=["hook", "thread"])
def test_a_run_beside_a_cached_one_is_not_cached(thread: bool) -> None:
    bridge = bridged(models.olmo())
    _, expected = bridge.run_with_cache(TOKENS)
    ran: list[None] = []

    def other(tensor: torch.Tensor, hook: Any) -> None:
        if not ran:
            ran.append(None)
            if thread:
                beside = Thread(target=bridge, args=(OTHER,))
                beside.start()
                beside.join()
            else:
                bridge(OTHER)

    with bridge.hooks(fwd_hooks=[(PLACE, other)]):
        _, cache = bridge.run_with_cache(TOKENS)
    assert ran
    assert all(same(cache[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_in_a_thread(part: dict[str, int]) -> None:
    bridge = bridged(models.olmo())
    found: list[torch.Tensor] = []

    def elsewhere() -> None:
        thread = Thread(target=lambda: found.append(bridge(OTHER)))
        thread.start()
        thread.join()

    output, _ = within(bridge, part, elsewhere)
    assert same(output, run_of(bridge, part))
    assert same(found[0], bridge(OTHER))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_in_a_copy(part: dict[str, int]) -> None:
    bridge = bridged(models.olmo())
    with torch.no_grad():
        _, twin = within(bridge, part, lambda: copy.deepcopy(bridge))
    twin.reset_hooks()
    assert same(twin(OTHER), bridge(OTHER))


def test_after_an_error() -> None:
    bridge = bridged(models.olmo())
    due = bridge(TOKENS)
    with pytest.raises(TypeError):
        bridge(bridge.W_E[OTHER], start_at_layer=1, stop_at_layer="2")
    assert same(bridge(TOKENS), due)


def test_what_a_call_keeps_can_be_asked_of_the_class() -> None:
    assert "_start_residual" in dict(inspect.getmembers(OlmoBlockBridge))
