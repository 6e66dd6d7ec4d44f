"""Every bad value gets one clear line, and what is written can be read again."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import pytest

from conformance.fields import SpecError
from conformance.records import FORMAT_VERSION, Record, case_of, load, loads, sparse
from conformance.spec import MAX_SEED, Case, Edit, ModelSpec, Rerun, RunSpec, Step

NAN, INF = float("nan"), float("inf")

RECORD = Record(
    case=Case(
        model=ModelSpec(
            num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.5, biases=("q", "o")
        ),
        run=RunSpec(
            batch=2,
            seq_len=3,
            padding="gap",
            use_cache=True,
            chunks=2,
            edits=(Edit(site="blocks.0.hook_in", kind="noise", seed=3),),
            flags=("use_attn_result", "use_attn_in"),
            steps=(
                Step(kind="flag", flag="use_attn_in"),
                Step(kind="add_hook", site="blocks.0.attn.hook_out", edit="zero", seed=7),
                Step(kind="cast", dtype="float64"),
            ),
        ),
        tokens=((0, 1, 16), (2, 2, 2)),
    ),
    check="forward.logits",
    adapter="adapter:OlmoArchitectureAdapter",
    note="seen once",
    versions={"torch": "2.13.0"},
)

MODEL: list[tuple[dict[str, object], str, str]] = [
    ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size", "num_attention_heads=4"),
    ({"hidden_size": 0}, "hidden_size", "an integer of at least 1"),
    ({"hidden_size": 16.0}, "hidden_size", "an integer of at least 1"),
    ({"hidden_size": "16"}, "hidden_size", "an integer of at least 1"),
    ({"intermediate_size": -1}, "intermediate_size", "an integer of at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "an integer of at least 1"),
    ({"num_hidden_layers": True}, "num_hidden_layers", "an integer of at least 1"),
    ({"num_attention_heads": 0}, "num_attention_heads", "an integer of at least 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads", "an integer of at least 1"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads", "a divisor of"),
    ({"num_attention_heads": 2, "num_key_value_heads": 4}, "num_key_value_heads", "a divisor of"),
    ({"head_dim": 3}, "head_dim", "even"),
    ({"head_dim": 0}, "head_dim", "an integer of at least 2"),
    ({"head_dim": 4.0}, "head_dim", "an integer of at least 2"),
    ({"hidden_size": 6}, "head_dim", "even"),
    ({"rope_type": "dynamic", "head_dim": 2}, "head_dim", "at least 4 with rope_type='dynamic'"),
    ({"vocab_size": 1}, "vocab_size", "an integer of at least 2"),
    ({"max_position_embeddings": 0}, "max_position_embeddings", "an integer of at least 1"),
    ({"hidden_act": 3}, "hidden_act", "a name"),
    ({"rope_type": "su"}, "rope_type", "one of ('default', 'linear'"),
    ({"rope_type": None}, "rope_type", "one of ('default', 'linear'"),
    ({"rope_theta": 0}, "rope_theta", "a finite number above 0"),
    ({"rope_theta": INF}, "rope_theta", "a finite number above 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
    ({"pad_token_id": -1}, "pad_token_id", "an integer in 0..16"),
    ({"pad_token_id": 17}, "pad_token_id", "an integer in 0..16"),
    ({"pad_token_id": True}, "pad_token_id", "an integer in 0..16"),
    ({"attention_dropout": 1.0}, "attention_dropout", "a number in [0, 1)"),
    ({"attention_dropout": -0.1}, "attention_dropout", "a number in [0, 1)"),
    ({"attention_dropout": NAN}, "attention_dropout", "a number in [0, 1)"),
    ({"clip_qkv": -1.0}, "clip_qkv", "at least 0"),
    ({"clip_qkv": NAN}, "clip_qkv", "a finite number"),
    ({"clip_qkv": INF}, "clip_qkv", "a finite number"),
    ({"clip_qkv": "8.0"}, "clip_qkv", "a finite number"),
    ({"clip_qkv": True}, "clip_qkv", "a finite number"),
    ({"biases": ("q", "w")}, "biases", "a subset of ('q', 'k', 'v', 'o')"),
    ({"biases": ("q", "q")}, "biases", "a subset of ('q', 'k', 'v', 'o')"),
    ({"biases": "qk"}, "biases", "a subset of ('q', 'k', 'v', 'o')"),
    ({"dtype": "int8"}, "dtype", "one of ('float32', 'float64', 'bfloat16', 'float16')"),
    ({"weight_seed": -1}, "weight_seed", f"an integer in 0..{MAX_SEED}"),
    ({"weight_seed": MAX_SEED + 1}, "weight_seed", f"an integer in 0..{MAX_SEED}"),
    ({"weight_scale": 0.0}, "weight_scale", "a finite number above 0"),
    ({"weight_scale": NAN}, "weight_scale", "a finite number above 0"),
    ({"weights": "learned"}, "weights", "one of ('drawn', 'trained')"),
    ({"weights": None}, "weights", "one of ('drawn', 'trained')"),
]

RUN: list[tuple[dict[str, object], str, str]] = [
    ({"token_seed": -1}, "token_seed", f"an integer in 0..{MAX_SEED}"),
    ({"batch": 0}, "batch", "an integer of at least 1"),
    ({"seq_len": 0}, "seq_len", "an integer of at least 1"),
    ({"seq_len": 2.0}, "seq_len", "an integer of at least 1"),
    ({"padding": "both"}, "padding", "one of ('none', 'left'"),
    ({"positions": "random"}, "positions", "one of ('derived', 'offset'"),
    ({"use_cache": "yes"}, "use_cache", "true or false"),
    ({"training": 1}, "training", "true or false"),
    ({"prepared": None}, "prepared", "true or false"),
    ({"chunks": 3, "use_cache": True}, "chunks", "an integer in 1..2"),
    ({"chunks": 0}, "chunks", "an integer in 1..2"),
    ({"chunks": 2}, "use_cache", "chunks=2 need a cache"),
    ({"edits": ("blocks.0.hook_in",)}, "edits", "a list of edits"),
    ({"flags": ("use_everything",)}, "flags", "a subset of ('use_attn_result',"),
    (
        {"flags": ("use_split_qkv_input", "use_attn_in")},
        "flags",
        "without one of ['use_attn_in', 'use_split_qkv_input']",
    ),
    ({"steps": ("forward",)}, "steps", "a list of steps"),
    ({"steps": Step(kind="forward")}, "steps", "a list of steps"),
]

EDIT: list[tuple[dict[str, object], str, str]] = [
    ({"site": ""}, "site", "a canonical hook name"),
    ({"site": 3}, "site", "a canonical hook name"),
    ({"site": "embed.hook_in", "kind": "square"}, "kind", "one of ('identity', 'zero'"),
    ({"site": "embed.hook_in", "seed": -1}, "seed", f"an integer in 0..{MAX_SEED}"),
]

STEP: list[tuple[dict[str, object], str, str]] = [
    ({"kind": "jump"}, "kind", "one of ('forward', 'backward'"),
    ({"kind": "forward", "seed": -1}, "seed", f"an integer in 0..{MAX_SEED}"),
    ({"kind": "forward", "site": "embed.hook_in"}, "site", "empty: forward has no site"),
    ({"kind": "add_hook"}, "site", "a canonical hook name"),
    ({"kind": "add_hook", "site": 3}, "site", "a canonical hook name"),
    ({"kind": "add_hook", "site": "embed.hook_in", "edit": "no"}, "edit", "one of ('identity'"),
    ({"kind": "flag"}, "flag", "one of ('use_attn_result', 'use_split_qkv_input'"),
    ({"kind": "flag", "flag": "use_magic"}, "flag", "one of ('use_attn_result'"),
    ({"kind": "train", "flag": "use_attn_in"}, "flag", "empty: train has no flag"),
    ({"kind": "cast"}, "dtype", "one of ('float32', 'float64'"),
    ({"kind": "cast", "dtype": "int8"}, "dtype", "one of ('float32', 'float64'"),
    ({"kind": "load", "dtype": "float64"}, "dtype", "empty: load has no dtype"),
]

CASE: list[tuple[dict[str, object], str, str]] = [
    ({"run": RunSpec(seq_len=33)}, "seq_len", "at most max_position_embeddings=32"),
    ({"tokens": ((0, 17),)}, "tokens", "a token id in 0..16 (vocab_size - 1)"),
    ({"tokens": ((-1, 0),)}, "tokens", "a token id in 0..16"),
    ({"tokens": ((0, 1.0),)}, "tokens", "a token id in 0..16"),
    ({"tokens": ((0, True),)}, "tokens", "a token id in 0..16"),
    ({"tokens": ((0,),)}, "tokens", "1 rows of 2 token ids"),
    ({"tokens": ((0, 1), (2, 3))}, "tokens", "1 rows of 2 token ids"),
    ({"tokens": (0, 1)}, "tokens", "1 rows of 2 token ids"),
    ({"tokens": "01"}, "tokens", "1 rows of 2 token ids"),
]

KINDS: list[tuple[type, list[tuple[dict[str, object], str, str]]]] = [
    (ModelSpec, MODEL),
    (RunSpec, RUN),
    (Edit, EDIT),
    (Step, STEP),
    (Case, CASE),
]
BAD = [(kind, *bad) for kind, table in KINDS for bad in table]


def one_line(error: SpecError, field: str, allowed: str) -> None:
    """The message is one line of the field, the value and what is allowed."""
    message = str(error)
    assert "\n" not in message
    assert error.field == field
    assert message == f"{field}={error.value!r}: must be {error.allowed}"
    assert allowed in error.allowed


@pytest.mark.parametrize(
    ("kind", "given", "field", "allowed"),
    BAD,
    ids=[f"{kind.__name__}-{','.join(map(repr, given.values()))}" for kind, given, *_ in BAD],
)
def test_bad_value(
    kind: Callable[..., object], given: dict[str, object], field: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        kind(**given)
    one_line(caught.value, field, allowed)
    # A token is named alone, not with the whole text; a head_dim left out as what it comes to.
    if field in given and field != "tokens":
        assert repr(caught.value.value) == repr(given[field])


@pytest.mark.parametrize(
    "good",
    [
        lambda: ModelSpec(clip_qkv=0.0),
        lambda: ModelSpec(clip_qkv=8),
        lambda: ModelSpec(hidden_size=10, num_attention_heads=4, head_dim=2),
        lambda: ModelSpec(hidden_size=1, head_dim=2),
        lambda: ModelSpec(rope_type="dynamic", head_dim=4),
        lambda: ModelSpec(attention_dropout=0),
        lambda: ModelSpec(weight_seed=MAX_SEED),
        lambda: ModelSpec(weights="trained"),
        lambda: RunSpec(chunks=2, use_cache=True),
        lambda: RunSpec(flags=("use_attn_result", "use_attn_in", "use_hook_mlp_in")),
        lambda: Case(run=RunSpec(seq_len=32)),
        lambda: Case(tokens=((0, 16),)),
    ],
)
def test_good_value_at_the_edge(good: Callable[[], object]) -> None:
    good()


def test_lists_are_normalised() -> None:
    """JSON has no tuples, and a bias pattern no order: equal specs must compare equal."""
    assert ModelSpec(biases=["o", "q"]) == ModelSpec(biases=("q", "o"))  # type: ignore[arg-type]
    assert Case(tokens=[[0, 1]]).tokens == ((0, 1),)  # type: ignore[arg-type]
    edit = Edit(site="embed.hook_in")
    assert RunSpec(edits=[edit]).edits == (edit,)  # type: ignore[arg-type]
    flags = ["use_attn_in", "use_attn_result"]
    assert RunSpec(flags=flags).flags == ("use_attn_result", "use_attn_in")  # type: ignore[arg-type]
    assert len({ModelSpec(biases=["o", "q"]), ModelSpec(biases=("q", "o"))}) == 1  # type: ignore[arg-type]


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.case.model.dtype = "float64"  # type: ignore[misc]


def test_without_clip_changes_nothing_else() -> None:
    model = RECORD.case.model
    assert model.without_clip() == dataclasses.replace(model, clip_qkv=None)
    assert model.clip_qkv == 0.5


@pytest.mark.parametrize(("head_dim", "d_head"), [(None, 8), (6, 6)])
def test_d_head(head_dim: int | None, d_head: int) -> None:
    assert ModelSpec(hidden_size=16, num_attention_heads=2, head_dim=head_dim).d_head == d_head


class TestRecord:
    """The file format."""

    def body(self) -> dict[str, object]:
        body: dict[str, object] = json.loads(RECORD.dumps())
        return body

    def test_round_trip(self) -> None:
        assert loads(RECORD.dumps()) == RECORD
        assert loads(RECORD.dumps()).dumps() == RECORD.dumps()

    def test_trained_weights_are_kept(self) -> None:
        model = dataclasses.replace(RECORD.case.model, weights="trained")
        record = dataclasses.replace(RECORD, case=dataclasses.replace(RECORD.case, model=model))
        assert loads(record.dumps()) == record

    def test_defaults_may_be_left_out(self) -> None:
        text = '{"format_version": 1, "case": {"run": {"batch": 2}}, "check": "c", "adapter": "a"}'
        assert loads(text) == Record(case=Case(run=RunSpec(batch=2)), check="c", adapter="a")

    def test_file_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "case.json"
        path.write_text(RECORD.dumps(), encoding="utf-8")
        assert load(path) == RECORD

    def test_version_comes_first(self) -> None:
        assert next(iter(self.body().items())) == ("format_version", FORMAT_VERSION)

    @pytest.mark.parametrize("length", [0, 1, 100, -2])
    def test_truncated(self, length: int, tmp_path: Path) -> None:
        path = tmp_path / "case.json"
        path.write_text(RECORD.dumps()[:length], encoding="utf-8")
        with pytest.raises(SpecError) as caught:
            load(path)
        one_line(caught.value, "case.json", "complete JSON (")

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"case"'])
    def test_no_object(self, text: str) -> None:
        with pytest.raises(SpecError) as caught:
            loads(text, "x.json")
        one_line(caught.value, "x.json", "a JSON object")

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
    def test_other_version(self, version: object) -> None:
        with pytest.raises(SpecError) as caught:
            loads(json.dumps({**self.body(), "format_version": version}))
        one_line(caught.value, "format_version", f"{FORMAT_VERSION}: this version of olmo-conf")
        assert caught.value.value == version

    def test_newer_version_is_named_before_its_unknown_fields(self) -> None:
        with pytest.raises(SpecError, match="format_version=2"):
            loads(json.dumps({**self.body(), "format_version": 2, "device": "cuda"}))

    @pytest.mark.parametrize(
        ("path", "field"),
        [
            ((), "record.new"),
            (("case",), "record.case.new"),
            (("case", "model"), "record.case.model.new"),
            (("case", "run"), "record.case.run.new"),
        ],
    )
    def test_unknown_field(self, path: tuple[str, ...], field: str) -> None:
        body = self.body()
        at: object = body
        for name in path:
            assert isinstance(at, dict)
            at = at[name]
        assert isinstance(at, dict)
        at["new"] = 5
        with pytest.raises(SpecError) as caught:
            loads(json.dumps(body))
        one_line(caught.value, field, "absent; known fields: [")
        assert caught.value.value == 5

    def test_unknown_field_of_an_edit(self) -> None:
        text = RECORD.dumps().replace('"kind": "noise"', '"kind": "noise", "new": 5')
        with pytest.raises(SpecError) as caught:
            loads(text)
        one_line(caught.value, "record.case.run.edits[0].new", "known fields: ['site', 'kind'")

    def test_unknown_field_of_a_step(self) -> None:
        text = RECORD.dumps().replace('"kind": "cast"', '"kind": "cast", "new": 5')
        with pytest.raises(SpecError) as caught:
            loads(text)
        one_line(caught.value, "record.case.run.steps[2].new", "known fields: ['kind', 'site'")

    @pytest.mark.parametrize(
        ("old", "new", "field", "allowed"),
        [
            ('"clip_qkv": 0.5', '"clip_qkv": NaN', "clip_qkv", "a finite number"),
            ('"clip_qkv": 0.5', '"clip_qkv": -0.5', "clip_qkv", "at least 0"),
            ('"weight_scale": 0.3', '"weight_scale": 1e999', "weight_scale", "a finite number"),
            ('"chunks": 2', '"chunks": 4', "chunks", "an integer in 1..3"),
            ('"kind": "noise"', '"kind": "nose"', "kind", "one of"),
            ('"kind": "cast"', '"kind": "vast"', "kind", "one of"),
            ('"check": "forward.logits"', '"check": 3', "check", "a string"),
            ('"note": "seen once"', '"note": null', "note", "a string"),
            ('"site": "blocks.0.hook_in",', "", "record.case.run.edits[0]", "a complete Edit ("),
        ],
    )
    def test_bad_value(self, old: str, new: str, field: str, allowed: str) -> None:
        assert old in RECORD.dumps()
        with pytest.raises(SpecError) as caught:
            loads(RECORD.dumps().replace(old, new))
        one_line(caught.value, field, allowed)

    @pytest.mark.parametrize(
        ("change", "field", "allowed"),
        [
            ({"case": None}, "record.case", "an object"),
            ({"case": {"model": []}}, "record.case.model", "an object"),
            ({"case": {"run": 1}}, "record.case.run", "an object"),
            ({"case": {"run": {"edits": {}}}}, "record.case.run.edits", "a list"),
            ({"case": {"run": {"edits": [1]}}}, "record.case.run.edits[0]", "an object"),
            ({"case": {"run": {"steps": {}}}}, "record.case.run.steps", "a list"),
            ({"case": {"run": {"steps": [1]}}}, "record.case.run.steps[0]", "an object"),
        ],
    )
    def test_wrong_shape(self, change: dict[str, object], field: str, allowed: str) -> None:
        with pytest.raises(SpecError) as caught:
            loads(json.dumps({**self.body(), **change}))
        one_line(caught.value, field, allowed)

    @pytest.mark.parametrize("name", ["case", "check", "adapter"])
    def test_missing_field(self, name: str) -> None:
        body = self.body()
        del body[name]
        with pytest.raises(SpecError) as caught:
            loads(json.dumps(body))
        one_line(caught.value, "record", "a complete Record (")
        assert repr(name) in caught.value.allowed

    @pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["absent", "no text"])
    def test_unreadable_file(self, content: bytes | None, tmp_path: Path) -> None:
        path = tmp_path / "case.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SpecError) as caught:
            load(path)
        one_line(caught.value, "file", "a readable case file (")
        assert caught.value.value == str(path)


class TestSpecError:
    """The error itself, which pytest-xdist sends from process to process."""

    def test_pickles(self) -> None:
        error = SpecError("clip_qkv", -1.0, "a finite number")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is SpecError
        assert (again.field, again.value, again.allowed) == ("clip_qkv", -1.0, "a finite number")
        assert str(again) == str(error) == "clip_qkv=-1.0: must be a finite number"

    def test_is_a_value_error(self) -> None:
        assert issubclass(SpecError, ValueError)


@pytest.mark.parametrize("module", ["spec", "strategies"])
def test_needs_no_torch(module: str) -> None:
    """A case file can be read, and a case be drawn, at once."""
    code = f"import sys, conformance.{module}; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(run=RunSpec(seq_len=2, flags=("use_attn_in",)), tokens=((1, 2),)),
        Case(run=RunSpec(edits=(Edit(site="embed.hook_out", kind="zero", seed=3),))),
        Case(run=RunSpec(steps=(Step(kind="forward"), Step(kind="cast", dtype="float16")))),
        Case(reruns=(Rerun(), Rerun(weight_seed=7, run=RunSpec(use_cache=True)))),
    ],
)
def test_a_sparse_case_has_only_what_differs_and_is_the_same_case(case: Case) -> None:
    body = json.loads(json.dumps(sparse(case)))
    assert case_of(body) == case
    assert ("model" in body, "reruns" in body) == (False, bool(case.reruns))
