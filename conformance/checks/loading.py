"""Loading by name: a bridge booted from a directory is Hugging Face's model of that directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.model_bridge import TransformerBridge
from transformers import OlmoForCausalLM

from conformance.checks.damage import FAULTS, misplaced, renamed
from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import quiet, registry
from conformance.compare import Gap, compare_parameters, compare_tensors
from conformance.data import TRAINED
from conformance.observe import observe
from conformance.spec import DTYPES, PROJECTIONS, Case
from conformance.strategies import GEOMETRIES, cases, model_specs, on_trained
from conformance.subjects import ARCHITECTURE, Subject, at_work, hf_model
from conformance.tolerance import exactly

LAYOUTS = ("one file", "shards", "snapshot", "shards elsewhere")
TIED_LAYOUTS = (*LAYOUTS, *3 * ("below the head", "the head alone"))
SHARD = 32  # bytes: a file for each tensor, also of the smallest drawn model
FAULTS_A_CASE = 5
_EMBEDDING = "model.embed_tokens.weight"


def saved_cases(geometries: SearchStrategy[str] = GEOMETRIES) -> SearchStrategy[Case]:
    """Cases that Hugging Face can save: it knows all biases or none. A quarter are trained."""
    models = model_specs(
        biases=st.sampled_from(((), PROJECTIONS)),
        geometries=geometries,
        ties=st.sampled_from((False, True, True)),
    )
    trained = st.sampled_from((False, False, False, True))
    drawn = cases(models=models)
    return st.builds(lambda case, on: on_trained(case) if on else case, drawn, trained)


def common_cases() -> SearchStrategy[Case]:
    """Cases whose configuration is one of any model: Llama wants its heads to divide its width."""
    return saved_cases(st.sampled_from(("divided", "stated")))


def save(case: Case, home: Path, layout: str) -> Path:
    """Put a case's model and the tokenizer on disk; returns the directory to load from.

    A snapshot is laid out as in the cache of the model hub: links into a folder of blobs. Shards
    elsewhere are not where the index says. A tied model may have been saved below its head, or
    have its one matrix under the head's name alone.
    """
    directory = home / "olmo"
    size = SHARD if layout in ("snapshot", "shards", "shards elsewhere") else "1GB"
    with quiet():
        hf_model(case.model).save_pretrained(directory, max_shard_size=size)
    for path in TRAINED.glob("tokenizer*.json"):
        shutil.copy(path, directory)
    if layout == "shards elsewhere":
        misplaced(directory)
    elif layout == "below the head":
        renamed(directory, lambda name: name.removeprefix("model."))
    elif layout == "the head alone":
        renamed(directory, lambda name: {_EMBEDDING: "lm_head.weight"}.get(name, name))
    if layout != "snapshot":
        return directory
    snapshot = home / "models--conformance--olmo" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    shutil.move(directory, blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    return snapshot


def boot(adapter: Adapter, directory: Path, **asked: Any) -> Any:
    """``boot_transformers`` of a directory, with the adapter registered meanwhile."""
    with registry() as adapters, quiet():
        adapters[ARCHITECTURE] = adapter
        return TransformerBridge.boot_transformers(str(directory), device="cpu", **asked)


def _frequencies(model: torch.nn.Module) -> torch.Tensor:
    """The rotary frequencies, which no file has: they are float32 whatever the dtype."""
    named = dict(model.named_buffers())
    return next(buffer for name, buffer in named.items() if name.endswith(".inv_freq"))


@check(
    "loading.by_name",
    "boot_transformers of a directory gives a bridge with the weights, logits and gradients of "
    "Hugging Face's model of that directory, in the dtype and with the clip that are asked for: "
    "tied or not, in one file, in shards, wherever the index says they are, or in a snapshot of "
    "links; a tied one also if it was saved below its head, or under the head's name alone.",
    saved_cases,
    examples=0.5,
)
def by_name(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Both load from the same files; the dtype is left out, or any."""
    padding = "none" if case.run.padding == "none" else "right"  # a row may be all float64 can bear
    case = replace(case, run=replace(case.run, padding=padding, chunks=1))
    pick = Random(case.run.token_seed)
    layouts = TIED_LAYOUTS if case.model.tie_word_embeddings else LAYOUTS
    layout, asked = pick.choice(layouts), pick.choice((None, *DTYPES))
    dtype = getattr(torch, asked or "float32")
    named: dict[str, Any] = {} if asked is None else {"dtype": dtype}
    over: dict[str, Any] = {}
    if case.model.clip_qkv is not None and pick.random() < 0.5:
        over["clip_qkv"] = case.model.clip_qkv / 4
        named["hf_config_overrides"] = over
    with TemporaryDirectory() as home:
        directory = save(case, Path(home), layout)
        with quiet():
            model = OlmoForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="eager", **over
            )
        with at_work(f"boot_transformers of {layout}, dtype={asked}, overrides={over}"):
            bridge = boot(adapter, directory, **named)
    truth = Subject(model, dict(model.named_parameters()), under_test=False)
    loaded: Any = bridge.original_model
    parts = list(loaded.parameters())
    if len(parts) != len(truth.parameters):
        yield Gap("parameters", "count", f"{len(parts)} instead of {len(truth.parameters)}")
        return
    # Bridging renames the modules and keeps their order.
    names = dict(zip(truth.parameters, parts, strict=True))
    pairs = {name: (due, names[name]) for name, due in truth.parameters.items()}
    for name, (due, got) in {
        **pairs,
        "rotary_emb.inv_freq": (_frequencies(model), _frequencies(loaded)),
    }.items():
        gap = compare_tensors(name, due.detach(), got.detach(), exactly(due.dtype))
        yield from [gap] if gap else []
    facts = {
        "training": (False, bridge.training or loaded.training),
        "cfg.dtype": (dtype, bridge.cfg.dtype),
        "cfg.n_ctx": (case.model.max_position_embeddings, bridge.cfg.n_ctx),
        "config.clip_qkv": (over.get("clip_qkv", case.model.clip_qkv), loaded.config.clip_qkv),
        "tied": (
            case.model.tie_word_embeddings,
            loaded.lm_head.weight is loaded.model.embed_tokens.weight,
        ),
    }
    for name, (fact, told) in facts.items():
        if told != fact:
            yield Gap(name, "contract", f"{told!r} instead of {fact!r}")
    subject = Subject(loaded, names, bridge=bridge)
    expected, actual = observe(truth, case), observe(subject, case)
    yield from logits_gap(expected, actual)
    yield from compare_parameters(expected, actual)


@check(
    "loading.refusal",
    "A directory with a missing file, another architecture or a damaged shard is refused with an "
    "error that names it.",
    common_cases,
    examples=0.3,
)
def refusal(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Some of the faults, each in a copy of its own; a directory without one loads."""
    with TemporaryDirectory() as home:
        directory = save(case, Path(home), "shards")
        for name in Random(case.run.token_seed).sample(sorted(FAULTS), FAULTS_A_CASE):
            copy = Path(home) / "damaged-olmo"
            shutil.copytree(directory, copy)
            culprit = FAULTS[name](copy)
            try:
                boot(adapter, copy)
            except Exception as error:
                if culprit not in str(error):
                    said = " ".join(f"{type(error).__name__}: {error}".split())
                    yield Gap(name, "contract", f"the error does not name {culprit}: {said[:200]}")
            else:
                yield Gap(name, "contract", "loads all the same")
            shutil.rmtree(copy, ignore_errors=True)
        with at_work("boot_transformers of a sound directory"):
            boot(adapter, directory)
