"""The fixture's README and its picture, from the record alone: no number in them is by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 640, 320, 48, 24, 40
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "clip_qkv",
)
KINDS = {"previous": "previous token", "induction": "induction"}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def _clipped_in_all(record: Record) -> float:
    """The share of all entries: q has more of them, as it has more heads."""
    heads = record["shape"]["num_attention_heads"]
    groups = record["shape"]["num_key_value_heads"]
    weights = {"q": heads, "k": groups, "v": groups}
    clipped = record["clipped"]
    total = sum(weights[letter] * share for layer in clipped for letter, share in layer.items())
    return float(total / (len(clipped) * sum(weights.values())))


def _scores(record: Record) -> str:
    """One row a layer and kind, one column a head."""
    rows = [
        (f"{layer}, {KINDS[kind]}", *(f"{score:.2f}" for score in heads))
        for layer in range(len(record["clipped"]))
        for kind, layers in record["head_scores"].items()
        for heads in [layers[layer]]
    ]
    return _table(("layer", *(f"head {head}" for head in range(len(rows[0]) - 1))), rows)


def readme(record: Record) -> str:
    """The fixture's README."""
    losses = _table(
        ("step", "loss of the batch", "held-out loss"),
        ((f"{step:,}", f"{batch:.3f}", f"{held:.3f}") for step, batch, held in record["losses"]),
    )
    clipped = _table(
        ("layer", *"qkv"),
        (
            (str(layer), *(f"{100 * share[letter]:.1f} %" for letter in "qkv"))
            for layer, share in enumerate(record["clipped"])
        ),
    )
    made = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    shape, rows = record["shape"], record["rows"]
    return f"""\
# A small OLMo that has learned something

<!-- Written by `python -m training --write`. Edit training/report.py, not this file. -->

{shape["num_hidden_layers"]} layers, hidden size {shape["hidden_size"]}, \
{shape["num_attention_heads"]} heads over {shape["num_key_value_heads"]} key-value heads, \
MLP {shape["intermediate_size"]}, vocabulary {shape["vocab_size"]}, untied, no biases, float32, \
`clip_qkv={shape["clip_qkv"]}`: {record["parameters"]:,} parameters.

| | nats a token |
|---|---:|
| entropy of the held-out text's own unigrams | {record["unigram_entropy"]:.3f} |
| **held-out loss** | **{record["held_out_loss"]:.3f}** |
| loss on random tokens, the second time | {record["copying_loss"]:.3f} |
| loss of a uniform guess | {record["uniform"]:.3f} |

## Text

Jane Austen, *Pride and Prejudice*, published in 1813 and in the public domain everywhere. The text
is that of Debian's package r-cran-janeaustenr 1.0.0-1 (the R package janeaustenr, MIT licensed); it
is kept whole, line by line, in `training/pride-and-prejudice.txt.bz2`. Chapters 1 to 57 are
learned, {record["learned_tokens"]:,} tokens. `held_out.txt`, chapters 58 to 61, is not: \
{record["held_out_tokens"]:,} tokens.

Each batch has {rows["text"]} rows of text, {rows["passages"]} of a passage of it that repeats
itself and {rows["random"]} of random tokens that do, so that heads learn to look back.

The tokenizer is a byte-level BPE of the learned chapters in the class that Hugging Face loads for
OLMo, `GPTNeoXTokenizer`. As OLMo's it has no BOS of its own, `<|endoftext|>` (id 0) between
documents, and `<|padding|>` (id 1). Every row of the training begins with `<|endoftext|>`, which is
what TransformerLens prepends where there is no BOS.

## Loss

![loss curve](loss.svg)

{losses}

## Clipped entries

Share of the entries of q, k and v that exceed the clip, over the held-out text: \
{100 * _clipped_in_all(record):.1f} % in all.

{clipped}

## Heads

Mean attention paid on random tokens that are repeated after {record["period"]}: to the token before
(previous token), or, the second time, to the token after the earlier occurrence (induction).

{_scores(record)}

## Made again

`python -m training` trains it again ({record["steps"]:,} steps, four minutes of one core) and
compares; `--until N` stops early, `--write` writes this folder anew. On the same versions the
weights are the same bit for bit; where they are not, it says which versions differ. Recorded with
{made}.
"""


def curve(record: Record) -> str:
    """The loss curve as a picture."""
    losses: list[tuple[int, float, float]] = record["losses"]
    top, last = max(max(batch, held) for _, batch, held in losses), losses[-1][0]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return 10 + (HEIGHT - BOTTOM - 10) * (1 - loss / top)

    def line(points: Iterable[tuple[float, float]], colour: str) -> str:
        way = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def label(at_x: float, at_y: float, text: str, anchor: str, colour: str = "#444") -> str:
        place = f'x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}"'
        return f"<text {place}>{text}</text>"

    entropy = record["unigram_entropy"]
    parts = [
        line([(0, 0), (last, 0)], "#444"),
        line([(0, 0), (0, top)], "#444"),
        line([(0, entropy), (last, entropy)], "#bbb"),
        label(x(last), y(entropy) - 5, "entropy of unigrams", "end", "#888"),
        line([(step, batch) for step, batch, _ in losses], "#c60"),
        line([(step, held) for step, _, held in losses], "#06c"),
        label(x(last), y(losses[-1][1]) - 8, "batch", "end", "#c60"),
        label(x(last), y(losses[-1][2]) + 18, "held out", "end", "#06c"),
        *(label(LEFT - 6, y(tick) + 4, str(tick), "end") for tick in range(int(top) + 1)),
        *(
            label(x(step), HEIGHT - BOTTOM + 18, f"{step:,}", "middle")
            for step in range(0, last + 1, 500)
        ),
        label(x(last / 2), HEIGHT - 4, "step", "middle"),
    ]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
