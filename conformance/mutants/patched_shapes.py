"""Faults of patches, copies and loading on models and directories of less common shapes."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from adapter import checkpoint, clip
from adapter.checkpoint import CheckpointError
from conformance.mutants.catalogue import Make, add, mutant

_MODES = "patch.modes"
of_patch = partial(mutant, killer=_MODES, owner=clip._PatchedForward)


@mutant(
    "loading.believes_the_index",
    "an index that is wrong about where",
    "loading.by_name",
    checkpoint,
    "_found",
)
def _(original: Any) -> Any:
    """A tensor is looked for in the shard that the index names, and only there."""

    def found(directory: Path) -> Any:
        if not (directory / checkpoint.INDEX).exists():
            return original(directory)
        places = json.loads((directory / checkpoint.INDEX).read_text())["weight_map"]
        headers = {name: checkpoint._header(directory / name) for name in set(places.values())}
        return {
            tensor: headers[name][tensor]
            for tensor, name in places.items()
            if tensor in headers[name]
        }

    return found


@mutant(
    "loading.index_whole",
    "an index without weight_map",
    "loading.refusal",
    checkpoint,
    "_json",
)
def _(original: Any) -> Any:
    """What has no weight_map is not told from any other error."""

    def read(path: Path) -> Any:
        found = original(path)
        return {"weight_map": found["weight_map"]} if path.name == checkpoint.INDEX else found

    return read


@mutant(
    "loading.one_tokenizer_file",
    "tokenizer_config.json is cut",
    "loading.refusal",
    checkpoint,
    "_json",
)
def _(original: Any) -> Any:
    """Of the tokenizer only tokenizer.json is looked at."""
    return lambda path: {} if path.name == "tokenizer_config.json" else original(path)


@mutant(
    "loading.bytes_too_many", "bytes behind the tensors", "loading.refusal", checkpoint, "_header"
)
def _(original: Any) -> Any:
    """A shard may be longer than its header says."""

    def header(path: Path) -> Any:
        try:
            return original(path)
        except CheckpointError as error:
            content = path.read_bytes() if path.exists() else b""
            length = int.from_bytes(content[:8], "little")
            if "bytes and should have" not in str(error):
                raise
            entries = json.loads(content[8 : 8 + length])
            held = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            if 8 + length + max(entry["data_offsets"][1] for entry in held.values()) > len(content):
                raise
            return {name: entry["shape"] for name, entry in held.items()}

    return header


@mutant(
    "loading.prefix_wanted",
    "a tied model saved below its head",
    "loading.by_name",
    checkpoint,
    "_compare",
)
def _(original: Any) -> Any:
    """A file that was saved from the model below the head is refused."""

    def compare(directory: Path, wanted: Any, found: Any) -> None:
        if "embed_tokens.weight" in found:
            raise CheckpointError(f"{directory}: no weights file has model.embed_tokens.weight")
        original(directory, wanted, found)

    return compare


@mutant(
    "loading.embedding_wanted",
    "a tied matrix under the head's name alone",
    "loading.by_name",
    checkpoint,
    "_compare",
)
def _(original: Any) -> Any:
    """A tied matrix must be there under the embedding's name."""

    def compare(directory: Path, wanted: Any, found: Any) -> None:
        if checkpoint._EMBEDDING in wanted and checkpoint._HEAD not in wanted:
            found = {name: shape for name, shape in found.items() if name != checkpoint._HEAD}
        original(directory, wanted, found)

    return compare


def _without(layers: str) -> Make:
    return lambda original: tuple(each for each in original if each != layers)


for layers in ("layers", "model.model.layers"):
    add(
        f"patch.without_{layers.replace('.', '_')}",
        f"what has {layers} cannot be patched",
        f"layers that lie at {layers}",
        "patch.duck_typed",
        clip,
        "_LAYERS",
        _without(layers),
    )


@mutant("patch.fixed", "a config that cannot be replaced", "patch.duck_typed", clip, "_check")
def _(original: Any) -> Any:
    """A configuration that no stand-in can cover is taken for covered."""

    def check(path: str, attn: Any, exact: bool) -> None:
        with suppress(TypeError):
            original(path, attn, exact)

    return check


@of_patch("patch.shallow", "a run within a run", attribute="__call__")
def _(original: Any) -> Any:
    """A run within an attention's forward uncovers the clip for the rest of that."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self.inside.clear()
            self._take_down()

    return call


@mutant("patch.writes_lost", "a write within a forward", _MODES, clip._StandIn, "__setattr__")
def _(original: Any) -> Any:
    """What is written to the configuration within a forward stays in its stand-in."""

    def write(self: Any, name: str, value: Any) -> None:
        self.__dict__[name] = value

    return write


@of_patch("patch.takes_all_down", "a config replaced within a forward", attribute="_take_down")
def _(original: Any) -> Any:
    """What took a stand-in's place during the forward is taken away with it."""

    def take_down(self: Any) -> None:
        vars(self.attn).update(self.stand_ins)
        original(self)

    return take_down


@mutant("patch.deep_stand_in", "a copy within a forward", _MODES, clip._StandIn, "__reduce__")
def _(_original: Any) -> Any:
    """What stands in during a forward is copied as any object is."""
    return lambda self: (object.__new__, (type(self),), vars(self))


@of_patch("patch.copied_inside", "a copy within a forward", attribute="__getstate__")
def _(_original: Any) -> Any:
    """In a copy made within a forward somebody is inside for good."""
    return lambda self: dict(vars(self))


@of_patch("patch.wrapper_lost", "a forward that was wrapped before", attribute="__init__")
def _(original: Any) -> Any:
    """Unpatch_model takes a forward that was the attention's own away with the patch."""

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        self.was_own = False

    return init


@of_patch(
    "patch.mode_beneath", "a forward that is wrapped between two patches", attribute="install"
)
def _(_original: Any) -> Any:
    """A patch that was wrapped since keeps its mode beneath the next one."""

    def install(self: Any, mode: str) -> None:
        self.mode = mode
        self.attn.__dict__.update({"forward": self, clip._RECORD: self})

    return install
