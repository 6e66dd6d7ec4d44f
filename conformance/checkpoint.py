"""Load a real checkpoint: what it is and what it needs is known before any weight is read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from transformers import AutoConfig, AutoTokenizer, OlmoConfig, OlmoForCausalLM

from conformance.fields import SpecError

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 2**20  # bytes of a block that is mapped on its own
MEMORY = 1.2  # of the model alone: what judging may take


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be judged here.

    Attributes:
        source: Directory, or name on a hub.
        config: Its configuration.
        dtype: What its weights are loaded as.
        device: Where to.
        weight_bytes: Size of its weights there.
    """

    source: str
    config: OlmoConfig
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int

    def load(self) -> OlmoForCausalLM:
        """The model, in eval mode, with eager attention. No code that comes with it is run."""
        model: Any = OlmoForCausalLM.from_pretrained(
            self.source,
            config=self.config,
            dtype=self.dtype,
            attn_implementation="eager",
            weights_only=True,
        )
        model.to(self.device)
        model.eval()
        model.requires_grad_(False)
        loaded: OlmoForCausalLM = model
        return loaded


def return_memory() -> None:
    """Let every large block go back to the system when it is freed, where the C library can.

    glibc keeps blocks of up to 32 MiB once it has seen some freed, and what lies between them for
    good then holds the holes: gradients that are long forgotten took as much as the model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def find(source: str, *, dtype: str | None, device: str) -> Checkpoint:
    """What a source is, if it can be judged.

    Args:
        source: A directory, or the name of a model on a hub.
        dtype: ``float32`` and so on; None takes the checkpoint's own.
        device: As torch names it.

    Raises:
        SpecError: If there is no such checkpoint, it is no OLMo v1, the device does not exist or
            has not enough memory.
    """
    if not Path(source).exists() and Path(source).is_absolute():
        raise SpecError("model", source, "a directory that exists, or a model's name on a hub")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise SpecError("model", source, f"a checkpoint with a configuration ({told})") from None
    if not isinstance(config, OlmoConfig) or type(config) is not OlmoConfig:
        allowed = f"an OLMo v1 checkpoint (model_type 'olmo'); this is {config.model_type!r}"
        raise SpecError("model", source, allowed)
    named = dtype or str(config.dtype or "float32").removeprefix("torch.")
    picked: torch.dtype = getattr(torch, named)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except Exception as error:
        told = str(error).splitlines()[0]
        raise SpecError("device", device, f"a device that torch can use here ({told})") from None
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in OlmoForCausalLM(config).parameters())
    size = numel * torch.empty(0, dtype=picked).element_size()
    free, needed = _free(where), int(size * MEMORY)
    if needed > free:
        allowed = (
            f"a checkpoint that fits: its weights take {size / 2**30:.1f} GiB as "
            f"{named}, judging it {needed / 2**30:.1f} GiB, and "
            f"{where} has {free / 2**30:.1f} GiB free; a shorter --dtype may do"
        )
        raise SpecError("model", source, allowed)
    return Checkpoint(source, config, picked, where, size)


def tokens_of(checkpoint: Checkpoint, *, text: str | None, length: int, seed: int) -> torch.Tensor:
    """The input, ``[1, pos]``: a text in the checkpoint's own tokens, or drawn ones.

    Raises:
        SpecError: If there is a text and no tokenizer, or nothing is left of it, or it does not
            fit into the model.
    """
    room = checkpoint.config.max_position_embeddings
    if text is None:
        if not 2 <= length <= room:
            raise SpecError("tokens", length, f"in 2..{room} (max_position_embeddings)")
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, checkpoint.config.vocab_size, (1, length), generator=draw)
    folder = Path(checkpoint.source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise SpecError("text", text, f"absent: there is no tokenizer in {checkpoint.source}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise SpecError("text", text, f"absent: the checkpoint has no tokenizer ({told})") from None
    tokens: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :room]
    if tokens.shape[1] < 2:
        raise SpecError("text", text, "of at least two tokens")
    return tokens
