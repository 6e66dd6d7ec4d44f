"""Peak memory of judging a checkpoint, against Hugging Face's bare forward of the same one.

    python benchmarks/checkpoint_memory.py [--shape OLMo-1B-hf] [--dtype float32] [--layers N]

A model of a published shape is initialised at random, saved to a folder and loaded from there, each
time in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = Path(__file__).parents[1] / "fixtures" / "published"

CREATE = """
import json, sys, torch
from transformers import OlmoConfig, OlmoForCausalLM
shape, folder, dtype, layers = sys.argv[1:]
config = OlmoConfig(**json.load(open(shape)))
if int(layers):
    config.num_hidden_layers = int(layers)
torch.manual_seed(0)
OlmoForCausalLM._from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
"""

BARE = """
import resource, sys, time, torch
from transformers import OlmoForCausalLM
start = time.perf_counter()
model = OlmoForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
draw = torch.Generator().manual_seed(0)
tokens = torch.randint(0, model.config.vocab_size, (1, 16), generator=draw)
with torch.no_grad():
    model(tokens, use_cache=False)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

JUDGED = """
import resource, sys, time
from conformance.cli import main
start = time.perf_counter()
words = ["check", "--model", sys.argv[1], "--gradients", sys.argv[2]]
code = main(words, standalone_mode=False)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def run(code: str, *words: str) -> tuple[float, float]:
    """Run a script: its seconds, and its peak resident size in GiB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}")
    told = done.stdout.split()[-2:]
    return (float(told[0]), float(told[1]) / 2**20) if len(told) == 2 else (0.0, 0.0)


def main() -> None:
    """Create, run bare, judge, and print the table."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--shape", default="OLMo-1B-hf", choices=[p.stem for p in SHAPES.iterdir()])
    ask.add_argument("--dtype", default="float32")
    ask.add_argument("--layers", default="0", help="fewer than the shape has")
    ask.add_argument("--gradients", nargs="*", default=["none", "slice", "all"])
    given = ask.parse_args()
    shape = SHAPES / f"{given.shape}.json"
    with tempfile.TemporaryDirectory() as folder:
        run(CREATE, str(shape), folder, given.dtype, given.layers)
        weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        rows = {"bare Hugging Face forward": run(BARE, folder)}
        for gradients in given.gradients:
            rows[f"check --model --gradients {gradients}"] = run(JUDGED, folder, gradients)
    bare = rows["bare Hugging Face forward"][1]
    published = json.loads(shape.read_text(encoding="utf-8"))
    print(f"{given.shape}, {given.dtype}, vocabulary {published['vocab_size']}: ", end="")
    print(f"{weights / 2**30:.2f} GiB of weights\n")
    print("| | peak resident memory | of the bare forward | seconds |\n|---|---|---|---|")
    for name, (seconds, peak) in rows.items():
        print(f"| {name} | {peak:.2f} GiB | {peak / bare:.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
