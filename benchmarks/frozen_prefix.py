"""Epochs with and without the cache of frozen blocks (`model_params.cache_frozen_prefix`).

    python benchmarks/frozen_prefix.py --output table.md

GPT-Neo of the 125M shape, 10 of 12 blocks and the embeddings frozen, GSM8K samples, three epochs,
each way in a process of its own. The loss curves must agree to 1e-6 relative.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3


def run(where: str | None, model: Path, data: Path, scratch: Path, threads: int) -> dict[str, Any]:
    """One training; seconds of each epoch, of the whole process, and the losses."""
    name = where or "off"
    config = {
        "data": {"data_dir": str(data), "batch_size": 8, "max_length": 512},
        "model_name": str(model),
        "model_params": {
            "from_scratch": True,
            "cache_frozen_prefix": where,
            "do_freeze": True,
            **dict.fromkeys(
                ("freeze_emb", "freeze_ln", "freeze_attn", "freeze_ff", "freeze_other"), True
            ),
            "layers_not_to_freeze": [10, 11],
        },
        "trainer": {
            "checkpoint": {"dirpath": str(scratch / name)},
            "params": {
                "accelerator": "cpu",
                "max_epochs": EPOCHS,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "val_check_interval": 10**6,
            },
        },
    }
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / "sft.py"), "train", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(li) for li in (scratch / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    ends = [line["seconds"] for line in steps if float(line["epoch"]).is_integer()]
    epochs = [b - a for a, b in zip([0.0, *ends], ends)]
    fill = next((li.strip() for li in done.stdout.splitlines() if "run once" in li), "")
    return {"epochs": epochs, "losses": [line["loss"] for line in steps], "fill": fill}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "gsm8k.json"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer, GPTNeoConfig

    with tempfile.TemporaryDirectory(prefix="sft-frozen-") as name:
        scratch = Path(name)
        rows = json.loads(Path(arguments.data).read_text())["train"]
        data = scratch / "data.json"
        data.write_text(json.dumps({"train": rows[: arguments.samples], "val": rows[-1:]}))
        model = scratch / "model"
        GPTNeoConfig(
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            attention_types=[[["global", "local"], 6]],
            window_size=256,
            attention_dropout=0.0,
            embed_dropout=0.0,
            resid_dropout=0.0,
        ).save_pretrained(model)
        AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-gpt-neo").save_pretrained(model)
        results = {
            where: run(where, model, data, scratch, arguments.threads)
            for where in (None, "memory", "disk")
        }
    lines = ["| cache | " + " | ".join(f"epoch {i + 1}" for i in range(EPOCHS)) + " | faster by |"]
    lines.append("|---" * (EPOCHS + 2) + "|")
    plain = results[None]
    worst = 0.0
    for where, result in results.items():
        seconds = " | ".join(f"{s:.1f} s" for s in result["epochs"])
        factor = sum(plain["epochs"][1:]) / sum(result["epochs"][1:])
        lines.append(f"| {where or 'off'} | {seconds} | {factor:.2f} x |")
        pairs = zip(plain["losses"], result["losses"], strict=True)
        worst = max(worst, *(abs(a - b) / abs(a) for a, b in pairs))
    lines += ["", f"largest relative difference of the losses: {worst:.1e}"]
    lines += [f"{where}: {r['fill']}" for where, r in results.items() if r["fill"]]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
