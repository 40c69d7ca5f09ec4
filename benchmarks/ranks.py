"""What several ranks on one machine cost, and their memory against the formula of docs/scaling.md.

    python benchmarks/ranks.py

Trains a GPT-Neo of the 125M shape from random weights with 1, 2 and 4 processes joined by gloo, the
same samples a step for all, and prints a Markdown table: tokens a second after the first step, the
peak memory of rank 0 (its largest resident set before anything is saved), and what the formula
gives. All processes share this machine's cores, so more ranks cannot be faster here; what can be
seen is what they lose.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from training import SHAPES  # noqa: E402

SAMPLES, STEPS = 16, 6  # samples a step
WIDTH = {"32": 4, "64": 8}  # bytes of a number
RUNS = (  # strategy, ranks, precision
    ("ddp", 1, "32"),
    ("ddp", 2, "32"),
    ("ddp", 4, "32"),
    ("fsdp", 2, "32"),
    ("fsdp", 4, "32"),
    ("ddp", 1, "64"),
)


def formula(strategy: str, ranks: int, precision: str, shape: dict[str, Any], tokens: int) -> int:
    """Bytes of a rank, without the process itself; docs/scaling.md explains each term.

    tokens: of a rank's largest micro-batch.
    """
    C, L, V = shape["hidden_size"], shape["num_layers"], shape["vocab_size"]
    block = 12 * C * C + 10 * C
    outside = (V + shape["max_position_embeddings"] + 2) * C  # embeddings, final norm
    parameters = L * block + outside
    state = 4 * parameters  # weights, gradients, AdamW's two averages
    head = V * C  # the tied head's gradient exists beside the embeddings' until they are added
    if strategy == "fsdp" and ranks > 1:
        # Whole for a time: what lies outside of the blocks, its gradient, and the buffers that
        # gather the one and add up the other; and two blocks.
        state = state // ranks + 5 * outside + 4 * block
    elif ranks > 1:
        state += parameters  # once, while DDP lays out its buckets anew after the first step
    activations = 14 * C * L * tokens
    return WIDTH[precision] * (state + head + activations)


def train(
    scratch: Path, strategy: str, ranks: int, precision: str, model: Path
) -> tuple[float, int, int]:
    """(tokens/s after the first step, peak bytes of rank 0, tokens of its largest micro-batch)."""
    run = scratch / f"{strategy}-{ranks}-{precision}"
    config = {
        "data": {
            "data_dir": str(ROOT / "data" / "facts.json"),
            "batch_size": SAMPLES // ranks,
            "max_length": 64,
        },
        "model_name": str(model),
        "model_params": {"from_scratch": True},
        "trainer": {
            "checkpoint": {"dirpath": str(run)},
            "params": {
                "accelerator": "cpu",
                "max_steps": STEPS,
                "max_epochs": -1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "overfit_batches": 4,  # also keeps validation short
                "precision": precision,
                "strategy": strategy,
            },
        },
    }
    file = scratch / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "sft.py"), "train", str(file)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *launcher, *command[1:]]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    seconds = steps[-1]["seconds"] - steps[0]["seconds"]
    tokens = steps[-1]["tokens"] - steps[0]["tokens"]
    shutil.rmtree(run)
    return tokens / seconds, steps[-1]["memory"], steps[0]["tokens"] // ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    shape = SHAPES["gpt-neo-125m"]
    print(
        "| strategy | ranks | precision | tokens/s | of 1 rank | peak | formula + process | off |"
    )
    print("|---|---|---|---|---|---|---|---|")
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="sft-ranks-") as directory:
        scratch = Path(directory)
        for file in (ROOT / "data" / "tiny-gpt-neo").glob("tokenizer*"):
            for name in ("model", "tiny"):
                (scratch / name).mkdir(exist_ok=True)
                (scratch / name / file.name).write_bytes(file.read_bytes())
        (scratch / "model" / "config.json").write_text(json.dumps(shape))
        tiny = json.loads((ROOT / "data" / "tiny-gpt-neo" / "config.json").read_text())
        (scratch / "tiny" / "config.json").write_text(json.dumps(tiny))
        # The process itself: Python, PyTorch, transformers and a model of next to nothing.
        process = {
            ranks: train(scratch, "ddp", ranks, "32", scratch / "tiny")[1] for ranks in (1, 2)
        }
        for strategy, ranks, precision in RUNS:
            speed, peak, tokens = train(scratch, strategy, ranks, precision, scratch / "model")
            alone.setdefault(precision, speed)
            expected = formula(strategy, ranks, precision, shape, tokens) + process[min(ranks, 2)]
            print(
                f"| {strategy if ranks > 1 else ''} | {ranks} | {precision} | {speed:,.1f} | "
                f"{speed / alone[precision]:.2f} | {peak / 1e9:.2f} GB | {expected / 1e9:.2f} GB | "
                f"{peak / expected - 1:+.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
