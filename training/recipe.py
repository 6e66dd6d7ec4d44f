"""How the model is made: its configuration and the steps that train it, the same every time."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from transformers import OlmoConfig, OlmoForCausalLM

from training.corpus import END_ID, LENGTH, PAD_ID, VOCABULARY, batch

SEED = 0
STEPS = 3000
WARMUP = 100
RATE = 2e-3
LAST_RATE = 0.05  # of the greatest
INITIAL = 0.03
COMMON = 0.06


def config() -> OlmoConfig:
    """Three layers, two query heads to a key-value head, and a clip that binds once it learns."""
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    return OlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=INITIAL,
        clip_qkv=3.0,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        **eager,
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """One thread, and no operation that may add up in another order; all as before afterwards."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


def versions() -> dict[str, str]:
    """All that the weights' last bits depend on."""
    named = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    vectors = torch.backends.cpu.get_cpu_capability()
    return {**named, "machine": platform.machine(), "vectors": vectors}


def fingerprint(model: OlmoForCausalLM) -> str:
    """SHA-256 of every parameter, name and bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def rate(step: int) -> float:
    """The learning rate: a short rise, then half a cosine."""
    fall = (1 + math.cos(math.pi * step / STEPS)) / 2
    return RATE * min((step + 1) / WARMUP, 1) * (fall + (1 - fall) * LAST_RATE)


def learn(
    tokens: torch.Tensor, done: Callable[[int, float, OlmoForCausalLM], None], *, until: int = STEPS
) -> OlmoForCausalLM:
    """Train a new model on a text; to be called under `deterministic`.

    Args:
        tokens: The learned text.
        done: Called after each step with its number, its loss and the model.
        until: Stop after so many steps of the `STEPS` that the learning rate is planned for.
    """
    torch.manual_seed(SEED)
    model = OlmoForCausalLM(config())
    with torch.no_grad():
        # Something that all embeddings have in common lets heads look by position alone: OLMo has
        # no biases that could.
        model.model.embed_tokens.weight.add_(COMMON * torch.randn(model.config.hidden_size))
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(until):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        rows, labels = batch(tokens, draw)
        loss = model(rows, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done(step + 1, loss.item(), model)
    model.train(False)
    return model
