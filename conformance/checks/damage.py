"""What can be wrong with a directory that a model is loaded from, done to a sound one in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"

# What is done to a directory, and what an error must name.
Fault = Callable[[Path], str]


def renamed(directory: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a directory's one weights file other names."""
    path = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def misplaced(directory: Path) -> None:
    """Have the index say wrongly which shard a tensor is in, and name one that is nowhere."""
    path = directory / INDEX
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    places = {name: last if file == first else file for name, file in index["weight_map"].items()}
    index["weight_map"] = {**places, "model.nowhere": first}
    path.write_text(json.dumps(index))


def _shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[-1]


def _configured(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _absent(directory: Path) -> str:
    shutil.rmtree(directory)
    return directory.name


def _no_config(directory: Path) -> str:
    (directory / "config.json").unlink()
    return directory.name


def _broken(name: str) -> Fault:
    def fault(directory: Path) -> str:
        path = directory / name
        path.write_text(path.read_text()[:-9])
        return name

    return fault


def _unknown_type(directory: Path) -> str:
    _configured(directory, model_type="olmoz", architectures=["OlmozForCausalLM"])
    return "olmoz"


def _no_language_model(directory: Path) -> str:
    _configured(directory, architectures=["OlmoModel"])
    return "OlmoModel"


def _other_type(directory: Path) -> str:
    _configured(directory, model_type="llama")
    return "llama"


def _no_weights(directory: Path) -> str:
    for path in directory.glob("model*"):
        path.unlink()
    return directory.name


def _no_places(directory: Path) -> str:
    path = directory / INDEX
    path.write_text(json.dumps({"metadata": json.loads(path.read_text())["metadata"]}))
    return path.name


def _no_shard(directory: Path) -> str:
    path = _shard(directory)
    path.unlink()
    return path.name


def _cut(keep: Callable[[bytes], bytes]) -> Fault:
    def fault(directory: Path) -> str:
        path = _shard(directory)
        path.write_bytes(keep(path.read_bytes()))
        return path.name

    return fault


def _rewritten(change: Callable[[dict[str, torch.Tensor], str], object]) -> Fault:
    def fault(directory: Path) -> str:
        path = _shard(directory)
        tensors = load_file(path)
        name = sorted(tensors)[0]
        change(tensors, name)
        save_file(tensors, path, metadata={"format": "pt"})
        return name

    return fault


def _no_tokenizer(directory: Path) -> str:
    for path in directory.glob("tokenizer*"):
        path.unlink()
    return "tokenizer"


FAULTS: dict[str, Fault] = {
    "no such directory": _absent,
    "no config.json": _no_config,
    "config.json is cut": _broken("config.json"),
    "an unknown model_type": _unknown_type,
    "no language model": _no_language_model,
    "another model_type": _other_type,
    "no weights": _no_weights,
    "the index is cut": _broken(INDEX),
    "the index has no weight_map": _no_places,
    "a shard is missing": _no_shard,
    "a shard is empty": _cut(lambda content: b""),
    "a shard's header is cut": _cut(lambda content: content[:40]),
    "a shard's end is cut": _cut(lambda content: content[:-2]),
    "a shard has bytes too many": _cut(lambda content: content + b"\0\0"),
    "a shard is a pointer": _cut(lambda content: b"version https://git-lfs.github.com/spec/v1\n"),
    "a tensor is missing": _rewritten(lambda tensors, name: tensors.pop(name)),
    "a tensor has another shape": _rewritten(
        lambda tensors, name: tensors.update({name: tensors[name][:-1].contiguous()})
    ),
    "no tokenizer": _no_tokenizer,
    "tokenizer.json is cut": _broken("tokenizer.json"),
    "tokenizer_config.json is cut": _broken("tokenizer_config.json"),
}
