"""Faults of patches, copies and loading on models and directories of less common shapes."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import output_capturing

from adapter import checkpoint, clip, compatibility
from adapter.checkpoint import CheckpointError
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import Make, add, mutant

_MODES = "patch.modes"
of_point = partial(mutant, killer="copies.hooked", owner=OlmoHookPoint, attribute="_take_over")
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


def _forgetting(_original: Any) -> Any:
    """Recorders are taken away, and Hugging Face's note that they are there is not."""

    def forget(model: Any) -> None:
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == output_capturing.__name__:
                    del module._forward_hooks[key]

    return forget


for how in ("pickle", "deepcopy"):
    add(
        f"copies.no_states_after_{how}",
        "a bridge that was copied, and its copy, give no hidden states any more",
        "output_hidden_states=True before and after",
        f"copies.{how}",
        compatibility,
        "forget_output_recorders",
        _forgetting,
    )


@of_point("copies.one_name", "a copied hook with alias_names")
def _(original: Any) -> Any:
    """A hook that goes by several names goes by its hook point's own in a copy."""

    def take_over(self: Any, dir: str, handles: list[Any], hooks: dict[int, Any]) -> None:
        for handle in handles:
            handle.alias_names = None
        original(self, dir, handles, hooks)

    return take_over


@of_point("copies.taken_off_back", "a hook that PyTorch's handle took off before the copying")
def _(original: Any) -> Any:
    """A hook that its handle has taken off is on a copy again."""

    def take_over(self: Any, dir: str, handles: list[Any], hooks: dict[int, Any]) -> None:
        gone = [handle for handle in handles if handle.hook.id not in hooks]
        original(self, dir, handles, hooks)
        for handle in gone:
            self.add_hook(handle.user_hook, dir, alias_names=handle.alias_names)

    return take_over


@mutant(
    "alive.no_attentions_processed",
    "output_attentions=True in compatibility mode",
    "alive.output_attentions",
    OlmoTransformerBridge,
    "enable_compatibility_mode",
)
def _(original: Any) -> Any:
    """In compatibility mode output_attentions=True gives no layer's pattern."""

    def enable(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for block in self.blocks:
            given = block.attn.hook_pattern.forward
            block.attn.hook_pattern.forward = partial(_unseen, given)

    return enable


def _unseen(given: Any, pattern: Any) -> Any:
    """Pass a pattern on while nobody collects any."""
    collected = output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
    if collected is not None:
        collected.pop("attentions", None)
    return given(pattern)
