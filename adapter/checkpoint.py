"""Say what is wrong with a checkpoint's files, where loading would say it badly or not at all.

Hugging Face gives a tensor that no file has random numbers, and warns; TransformerLens turns its
warnings off. A damaged file is reported without its name. So a directory is looked through first:
of each weights file only the header is read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PREFIX = "model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class CheckpointError(OSError):
    """A directory does not hold the OLMo that its configuration describes."""


def require_whole(directory: Path, config: Any) -> None:
    """Raise unless every weight that the configuration asks for is there, whole and of its shape.

    A directory with no safetensors in it is left to Hugging Face, which names what it looked for.

    Args:
        directory: The checkpoint.
        config: Its Hugging Face configuration.

    Raises:
        CheckpointError: The message is one line that names the file or the tensor.
    """
    if config.model_type != "olmo":
        raise CheckpointError(
            f"{directory / 'config.json'}: model_type is {config.model_type!r}, and the OLMo (v1) "
            "adapter takes 'olmo'"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).exists():
            _json(directory / name)
    found = _found(directory)
    # Quantized tensors have shapes, and company, of their method's own.
    if found is not None and getattr(config, "quantization_config", None) is None:
        _compare(directory, _wanted(config), found)


def require_text(tokenizer: Any) -> None:
    """Raise if a tokenizer knows no text: what Hugging Face makes up where there is no file."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no tokenizer.json, so that no text can "
            "be read; give boot_transformers a tokenizer"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable JSON: {error}") from None


def _found(directory: Path) -> dict[str, list[int]] | None:
    """The shape of every tensor in the files that Hugging Face would load; None if it has none."""
    if (directory / WEIGHTS).exists():
        return _header(directory / WEIGHTS)
    if not (directory / INDEX).exists():
        return None
    index = _json(directory / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise CheckpointError(f"{directory / INDEX}: has no weight_map")
    headers = {name: _header(directory / name) for name in sorted(set(places.values()))}
    # All that is in the files is loaded, whatever the index says of where.
    return {tensor: shape for header in headers.values() for tensor, shape in header.items()}


def _header(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file, which must be as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("it does not begin with the length of a header")
            tensors = {
                name: entry
                for name, entry in json.loads(file.read(length)).items()
                if name != "__metadata__"
            }
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"it has {size} bytes and should have {8 + length + end}")
            return {name: entry["shape"] for name, entry in tensors.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _wanted(config: Any) -> dict[str, list[int]]:
    """The shape of every tensor that a model of this configuration loads."""
    with torch.device("meta"):
        model = OlmoForCausalLM(copy.deepcopy(config))
    tied = model.lm_head.weight is model.model.embed_tokens.weight or config.tie_word_embeddings
    return {
        name: list(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == _HEAD)
    }


def _compare(
    directory: Path, wanted: Mapping[str, list[int]], found: Mapping[str, list[int]]
) -> None:
    # A file may also have been saved from the model below the head, which has no prefix.
    shapes = {**{_PREFIX + name: shape for name, shape in found.items()}, **found}
    if _HEAD not in wanted and _HEAD in found:  # tied, and saved under the other name
        shapes.setdefault(_EMBEDDING, found[_HEAD])
    missing = [name for name in wanted if name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: no weights file has {missing[0]}{more}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{directory}: {name} has the shape {shapes[name]}, and {shape} in config.json"
            )
