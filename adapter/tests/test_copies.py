"""Copies and saves of a bridge are whole and independent."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

from adapter.tests import models
from adapter.tests.models import SHAPES, TOKENS, same

EDITED = {
    "use_split_qkv_input": "blocks.0.attn.hook_q_input",
    "use_attn_in": "blocks.1.attn.hook_attn_in",
    "use_attn_result": "blocks.1.attn.hook_result",
    "use_hook_mlp_in": "blocks.0.hook_mlp_in",
}


def twist(tensor: Any, hook: Any) -> Any:
    return tensor * torch.linspace(-1, 1, tensor.shape[-1])


def copied(bridge: Any) -> Any:
    return copy.deepcopy(bridge)


def saved_and_loaded(bridge: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(bridge, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after-forward"])
@pytest.mark.parametrize("twin_of", [copied, saved_and_loaded])
@pytest.mark.parametrize("flag", EDITED)
def test_a_twin_is_independent(flag: Any, twin_of: Any, used: Any) -> None:
    bridge = models.bridged(models.olmo(**SHAPES["gqa-clip-bias"]))
    if used:
        setattr(bridge.cfg, flag, True)
        bridge(TOKENS)
        setattr(bridge.cfg, flag, False)
    twin = twin_of(bridge)
    plain = bridge(TOKENS)
    assert same(twin(TOKENS), plain)

    fired = []
    for point in bridge.hook_dict.values():
        point.add_hook(lambda tensor, hook: fired.append(hook.name))
    setattr(twin.cfg, flag, True)
    assert not getattr(bridge.cfg, flag)
    edited = twin.run_with_hooks(TOKENS, fwd_hooks=[(EDITED[flag], twist)])
    models.backward(edited)
    assert not fired
    assert all(p.grad is None for p in bridge.parameters())

    bridge.reset_hooks()
    setattr(bridge.cfg, flag, True)
    assert same(edited, bridge.run_with_hooks(TOKENS, fwd_hooks=[(EDITED[flag], twist)]))
    assert not same(edited, plain)


@pytest.mark.parametrize("twin_of", [copied, saved_and_loaded])
def test_a_bridge_that_has_shown_its_attentions_still_saves(twin_of: Any) -> None:
    bridge = models.bridged(models.olmo())
    bridge.run_with_cache(TOKENS)
    asked = {"output_attentions": True, "output_hidden_states": True}
    expected = models.olmo()(TOKENS, **asked)
    for each in (twin_of(bridge), bridge):
        seen = each.original_model(TOKENS, **asked)
        assert len(seen.attentions) == len(expected.attentions)
        assert all(map(same, seen.attentions, expected.attentions))
        assert all(map(same, seen.hidden_states, expected.hidden_states))


def test_a_copy_outlives_its_original() -> None:
    bridge = models.bridged(models.olmo())
    bridge.cfg.use_split_qkv_input = True
    expected = bridge(TOKENS)
    twin = copy.deepcopy(bridge)
    del bridge
    assert same(twin(TOKENS), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dicts_round_trip(shape: Any) -> None:
    bridge = models.bridged(models.olmo(**SHAPES[shape]))
    other = models.bridged(models.olmo(**SHAPES[shape]))
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(bridge.state_dict())
    assert same(other(TOKENS), bridge(TOKENS))


class Counter:
    """A hook with something in it that cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, tensor: torch.Tensor, hook: Any) -> None:
        with self.lock:
            hook.ctx["names"] = [*hook.ctx.get("names", []), hook.name]


@pytest.mark.parametrize("alias_names", [None, ["one", "other"]])
def test_hooks_of_a_copy_are_given_its_own_hook_points(alias_names: list[str] | None) -> None:
    bridge, name = models.bridged(models.olmo()), "blocks.0.hook_out"
    for direction in ("fwd", "bwd"):
        bridge.hook_dict[name].add_hook(Counter(), direction, alias_names=alias_names)
    twin = copy.deepcopy(bridge)
    twin(TOKENS).sum().backward()
    assert twin.hook_dict[name].ctx == {"names": (alias_names or [name]) * 2}
    assert bridge.hook_dict[name].ctx == {}
    twin.reset_hooks()
    assert not twin.hook_dict[name].has_hooks()
    assert bridge.hook_dict[name].has_hooks()


class Probe(torch.nn.Linear):
    """A module that is a hook as well."""

    def __call__(self, tensor: torch.Tensor, hook: Any = None) -> Any:
        return super().__call__(tensor) if hook is None else None


def test_a_module_that_is_a_hook_is_copied_as_any_module() -> None:
    bridge, name = models.bridged(models.olmo()), "blocks.0.hook_out"
    probe = bridge.probe = Probe(2, 2)
    bridge.hook_dict[name].add_hook(probe)
    bridge.again = probe
    twin = copy.deepcopy(bridge)
    assert twin.probe is twin.again
    assert twin.probe is not probe
    assert twin.hook_dict[name].fwd_hooks[0].user_hook is probe
