"""How set-up time and memory grow with the data: 10,000 to 1,000,000 pairs.

    python benchmarks/data_scale.py --output table.md

For each size, a .jsonl file is made, and a process prepares it twice: the first start tokenises,
the second reads the memory-mapped cache. Every start is a process of its own; its time is that of
opening, checking and preparing the data, and its memory the whole process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(path: Path, pairs: int) -> None:
    """Arithmetic questions of different lengths, with answers that show the way."""
    rng = random.Random(0)
    with path.open("w") as handle:
        for i in range(pairs):
            numbers = [rng.randint(1, 999) for _ in range(rng.randint(2, 8))]
            terms = ", ".join(f"{n} apples in basket {k}" for k, n in enumerate(numbers, 1))
            total, way = 0, []
            for n in numbers:
                way.append(f"{total} + {n} = {total + n}")
                total += n
            question = f"Farm {i} has {terms}. How many apples are there?"
            row = {"Question": question, "Answer": f"{'. '.join(way)}. There are {total}."}
            handle.write(json.dumps(row) + "\n")


def prepare(directory: str) -> None:
    """One start: what a run does with its training data before it trains."""
    sys.path.insert(0, str(ROOT))
    from data import Encoder
    from extras.formats import DataSource
    from extras.token_cache import cached_samples
    from model import load_tokenizer

    encoder = Encoder(load_tokenizer(str(ROOT / "data" / "tiny-gpt-neo")))
    began = time.perf_counter()
    samples, _ = cached_samples(DataSource.open(directory), "train", encoder, 512, True)
    spent = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"seconds": spent, "memory": memory, "tokens": len(samples.input_ids)}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    lines = [
        "| pairs | tokens | file | first start | peak | second start | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="sft-data-scale-") as scratch:
        environment = os.environ | {"SFT_CACHE": str(Path(scratch) / "cache")}
        for size in arguments.sizes:
            directory = Path(scratch) / str(size)
            directory.mkdir()
            make(directory / "train.jsonl", size)
            command = [sys.executable, __file__, "--prepare", str(directory)]
            starts = []
            for _ in range(2):
                output = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                ).stdout
                starts.append(json.loads(output.splitlines()[-1]))
            file_size = (directory / "train.jsonl").stat().st_size
            cells = [f"{size:,}", f"{starts[0]['tokens']:,}", f"{file_size / 1e6:,.0f} MB"]
            for start in starts:
                cells += [f"{start['seconds']:.2f} s", f"{start['memory'] / 1e9:.2f} GB"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    if arguments.output:
        arguments.output.write_text(table)


if __name__ == "__main__":
    main()
