"""``python -m training``: train the fixture again, and say whether it is the recorded one."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GPTNeoXTokenizer, OlmoForCausalLM

from training import corpus, measure, report
from training.recipe import STEPS, config, deterministic, fingerprint, learn, versions

FIXTURE = Path(__file__).parent.parent / "fixtures" / "trained"
EARLY = (1, 10, 300)  # steps after which a hash is kept too
MEASURED = 200  # steps between two points of the curve


def encoded(tokenizer: GPTNeoXTokenizer, text: str) -> torch.Tensor:
    """A text's token ids, with nothing added."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))


def run(until: int) -> tuple[report.Record, OlmoForCausalLM, GPTNeoXTokenizer]:
    """Train, measure, and keep what is to be recorded."""
    learned, held_out = corpus.split()
    tokenizer = corpus.train_tokenizer(learned)
    tokens, unseen = encoded(tokenizer, learned), encoded(tokenizer, held_out)
    rows = corpus.windows(unseen)
    hashes: dict[str, str] = {}
    losses: list[tuple[int, float, float]] = []

    def done(step: int, loss: float, model: OlmoForCausalLM) -> None:
        if step in EARLY or step == STEPS:
            hashes[str(step)] = fingerprint(model)
        if step == 1 or step % MEASURED == 0:
            losses.append((step, loss, measure.loss(model, rows)))
            print("step {:5}: batch {:.3f}, held out {:.3f}".format(*losses[-1]), flush=True)

    model = learn(tokens, done, until=until)
    record = {
        "versions": versions(),
        "steps": STEPS,
        "shape": {key: value for key, value in config().to_dict().items() if key in report.SHAPE},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": {
            "text": corpus.TEXT_ROWS,
            "passages": corpus.PASSAGE_ROWS,
            "random": corpus.RANDOM_ROWS,
        },
        "learned_tokens": len(tokens),
        "held_out_tokens": len(unseen),
        "hashes": hashes,
        "losses": losses,
        "uniform": math.log(corpus.VOCABULARY),
        "unigram_entropy": measure.unigram_entropy(unseen),
        "held_out_loss": measure.loss(model, rows),
        "copying_loss": measure.copying_loss(model),
        "clipped": measure.clipped(model, rows),
        "period": measure.PERIOD,
        "head_scores": measure.head_scores(model),
    }
    return record, model, tokenizer


def write(record: report.Record, model: OlmoForCausalLM, tokenizer: GPTNeoXTokenizer) -> None:
    """The whole fixture: weights, tokenizer, held-out text, record, README and picture."""
    model.save_pretrained(FIXTURE)
    tokenizer.save_pretrained(FIXTURE)
    files = {
        "held_out.txt": corpus.split()[1],
        "record.json": json.dumps(record, indent=1) + "\n",
        "README.md": report.readme(record),
        "loss.svg": report.curve(record),
    }
    for name, text in files.items():
        (FIXTURE / name).write_text(text, encoding="utf-8")


def difference(recorded: report.Record, made: report.Record) -> str:
    """Why what was made is not what is recorded; empty if it is."""
    common = [step for step in made["hashes"] if step in recorded["hashes"]]
    wrong = [step for step in common if made["hashes"][step] != recorded["hashes"][step]]
    if not wrong:
        return "" if common else f"no hash is recorded before step {min(EARLY)}"
    here, there = made["versions"], recorded["versions"]
    others = [
        f"{name} {here[name]} (recorded: {there[name]})"
        for name in there
        if here[name] != there[name]
    ]
    why = f"other versions: {', '.join(others)}" if others else "although all versions are the same"
    return f"other weights after step {wrong[0]}, {why}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, then compare with the record or replace it."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--until", type=int, default=STEPS, help="stop after so many steps")
    parser.add_argument("--write", action="store_true", help="replace fixtures/trained")
    asked = parser.parse_args(arguments)
    if asked.write and asked.until != STEPS:
        parser.error("--write needs all steps")
    with deterministic():
        record, model, tokenizer = run(asked.until)
    for name in ("unigram_entropy", "held_out_loss", "copying_loss"):
        print(f"{name.replace('_', ' ')}: {record[name]:.3f}")
    if asked.write:
        write(record, model, tokenizer)
        return 0
    recorded = json.loads((FIXTURE / "record.json").read_text(encoding="utf-8"))
    problem = difference(recorded, record)
    print(
        problem or f"bit for bit the recorded weights, after {' and '.join(record['hashes'])} steps"
    )
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
