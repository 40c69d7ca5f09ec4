"""This project and its peers on the same work, alternately, and a table of how fast they were.

    python benchmarks/training.py --shape gpt-neo-125m --peer-python ../bench/bin/python
    python benchmarks/training.py --shape tiny --same-loss --peer-python ../bench/bin/python
    python benchmarks/training.py --shape smollm2-135m --lora --peer-python ../bench/bin/python

Everyone trains one epoch of the same samples from the same weights, in a process of its own and in
float32 on the CPU; peers.py says how. Every round runs each of them once, so that a change of the
machine's mood meets all alike; a figure is the median over the rounds. A run that did other work
than the rest (samples, tokens, steps, threads, loss on held-out samples) is an error.

tokens/s counts real tokens, prompts included and padding not, over the time of the training loop:
no loading, validation or saving. Peak memory is the largest resident set of the process until the
end of the last step.

Useful floating-point operations of a sample of T tokens, R of them targets, in a model with B
parameters in its blocks and final norm (no embeddings), a head of H = vocabulary x width, and L
layers whose heads are A wide together:

    6 B T  +  6 H R  +  sum over layers of 12 A pairs

where pairs is how many (query, key) pairs causality and the layer's window leave: T (T + 1) / 2
without a window. 6 is two operations for each of forward, gradient of inputs, gradient of weights
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1); 12 A is the same for the two products of
attention. Operations on padding, on masked pairs, for a second forward pass (checkpointing), or in
the head where no target is, are not useful. The usual 6 N T counts the head on every token; the
share by that formula is named below the table. With --lora everyone trains the same adapter (r 16,
alpha 32, on all projections) from the same values, and a frozen weight has no gradient: 4 in the
place of 6, and 6 times the adapter's parameters more. A share is of the rate of a 2048 x 2048
float32 matrix product, measured before each round with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
OURS = "sft"
FULL = "sft, no adapter"  # with --lora, to see what an adapter saves
PEERS = (
    "trl",
    "trl-packing",
    "trl-group-by-length",
    "trl-no-checkpointing",
    "trl-packing-no-checkpointing",
    "trl-group-by-length-no-checkpointing",
    "transformers",
    "lightning",
)
SAME_ORDER = ("trl", "trl-no-checkpointing", "transformers", "lightning")

# Where there are no weights: the published shapes, initialised at random.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt-neo-125m": {  # EleutherAI/gpt-neo-125m, whose dropouts are 0
        "model_type": "gpt_neo",
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 50257,
        "window_size": 256,
        "attention_types": [[["global", "local"], 6]],
        "max_position_embeddings": 2048,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {  # for trying the benchmark out; a window that the samples are longer than
        "model_type": "gpt_neo",
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "vocab_size": 4096,
        "window_size": 32,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 2048,
    },
    "tiny-llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}

# A byte-level BPE of this size, trained on GSM8K, makes 171 tokens of its average sample; the
# tokenizers of GPT-Neo and SmolLM2, trained on everything, make about 180.
TOKENIZER_SIZE = 4096
END = "<|endoftext|>"
HELD_OUT = 8  # samples
HELD_OUT_TOLERANCE = 0.05  # relative; orders and, with packing, steps differ
SAME_LOSS_TOLERANCE = 1e-4
MATRIX = 2048

Result = dict[str, Any]
T = TypeVar("T")


def in_process(function: Callable[..., T], *args: Any) -> T:
    """Call in a fresh process.

    On Linux a process is born with its parent's peak memory in getrusage, so the process that
    starts the runs has to stay small and must not import torch itself.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


# ------------------------------------------------------------------------------ the same work


def make_model(shape: str, given: str | None, rows: list[dict[str, str]], directory: str) -> None:
    """Weights and tokenizer for everyone: of a directory or .gguf file, or a shape at random."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import PreTrainedTokenizerFast as FastTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if given is not None:
        place, file = Path(given), {}
        if place.suffix == ".gguf":
            place, file = place.parent, {"gguf_file": place.name}
        tokenizer = AutoTokenizer.from_pretrained(place, **file)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)
        # A model out of a .gguf file calls itself quantised, though it no longer is.
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=TOKENIZER_SIZE,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
        tokenizer = FastTokenizer(tokenizer_object=bpe, eos_token=END)
        values = dict(SHAPES[shape])
        config = AutoConfig.for_model(
            values.pop("model_type"), bos_token_id=0, eos_token_id=0, **values
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_adapter(model: str, directory: str) -> int:
    """A new adapter on all projections, for everyone to begin with; returns its parameters."""
    sys.path.insert(0, str(ROOT))
    import freeze
    import lora
    from config import Adapter, ModelParams
    from model import load_model

    loaded, _ = load_model(model)
    adapter = Adapter(r=16, alpha=32)
    freeze.apply(loaded, ModelParams(adapter=adapter))
    config = lora.attach(loaded, adapter, seed=0)
    Path(directory).mkdir()
    lora.save(loaded, dict(lora.saved(loaded)), config, Path(directory))
    return sum(p.numel() for p in lora.saved(loaded).values())


def tokenise(rows: list[dict[str, str]], directory: str) -> list[dict[str, Any]]:
    """The ids that this project makes of each row, written down once more: README, "Sample"."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    samples = []
    for row in rows:
        prompt = tokenizer(f"Question: {row['Question']} \nAnswer:")["input_ids"]
        target = tokenizer(" " + row["Answer"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *target, tokenizer.eos_token_id]
        samples.append({"input_ids": ids, "prompt": len(prompt)})
    return samples


def useful_operations(directory: str, samples: list[dict[str, Any]]) -> tuple[float, float]:
    """Of one epoch: by the formula above, and with the head on every token."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head)}
    blocks = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "attention_layers", ["global"] * config.num_hidden_layers)
    windows = [config.window_size if kind == "local" else math.inf for kind in kinds]
    strict = usual = 0.0
    for sample in samples:
        length = len(sample["input_ids"])
        targets = length - sample["prompt"]
        pairs = sum(min(t, window) for window in windows for t in range(1, length + 1))
        rest = 6 * blocks * length + 12 * width * pairs
        strict += rest + 6 * head.numel() * targets
        usual += rest + 6 * head.numel() * length
    return strict, usual


def matrix_rate(threads: int) -> float:
    """Operations a second of a float32 matrix product, median of 20."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    seconds = []
    for _ in range(23):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / statistics.median(seconds[3:])  # the first warm up


# ---------------------------------------------------------------------------------- the runs


def start(command: list[str], threads: int, scratch: str) -> str:
    """Run a command to its end; its standard output."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "SFT_CACHE": f"{scratch}/cache",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-1500:]}")
    return done.stdout


def run_peer(name: str, job: dict[str, Any], python: str) -> Result:
    path = Path(job["scratch"]) / "job.json"
    path.write_text(json.dumps(job))
    command = [python, str(ROOT / "benchmarks" / "peers.py"), name, str(path)]
    result: Result = json.loads(start(command, job["threads"], job["scratch"]).splitlines()[-1])
    return result


def run_ours(job: dict[str, Any], python: str, overrides: list[str], full: bool) -> Result:
    """`sft.py train` as a user runs it, and what its metrics.jsonl says."""
    directory = Path(job["scratch"]) / "run"
    config = {
        "data": {
            "data_dir": job["data"],
            "batch_size": job["batch_size"],
            "max_length": job["max_length"],
        },
        "model_name": job["model"] if full else job["adapter"] or job["model"],
        "model_params": {
            "learning_rate": job["lr"],
            "weight_decay": 0.0,
            "warmup_steps_per_cent": 0,
        },
        "seed": job["seed"],
        "trainer": {
            "checkpoint": {"dirpath": str(directory), "every_n_train_steps": 1_000_000},
            "params": {
                "accelerator": "cpu",
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 1,
                "max_epochs": 1,
                "num_sanity_val_steps": 0,
                # An integer keeps the file's order (and validates on the same samples).
                "overfit_batches": job["steps"] if job["in_order"] else 0,
                "precision": "32",
            },
        },
    }
    file = Path(job["scratch"]) / "trainer.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [python, str(ROOT / "sft.py"), "train", str(file), *overrides]
    start(command, job["threads"], job["scratch"])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((directory / "run.json").read_text())
    shutil.rmtree(directory)
    steps = [row for row in rows if "loss" in row]
    return {
        "seconds": steps[-1]["seconds"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "losses": [row["loss"] for row in steps],
        "final_loss": steps[-1]["loss"],
        "held_out_loss": next(row["val_loss"] for row in rows if "val_loss" in row),
        "peak_memory": steps[-1]["memory"],
        "threads": int(record["device"].split("(")[1].split()[0]),
        "versions": {p: record["packages"][p] for p in ("torch", "transformers")},
    }


def differences(name: str, result: Result, job: dict[str, Any], reference: float) -> list[str]:
    """In what a run did other work than it should have."""
    samples = job["samples"]
    wanted = {
        "samples": len(samples),
        "tokens": sum(len(s["input_ids"]) for s in samples),
        "targets": sum(len(s["input_ids"]) - s["prompt"] for s in samples),
        "steps": job["steps"],
        "threads": job["threads"],
    }
    if "packing" in name:
        del wanted["steps"]
    found = {key: result.get(key, wanted[key]) for key in wanted}  # sft counts no samples, targets
    problems = [f"{k} {found[k]}, not {wanted[k]}" for k in wanted if found[k] != wanted[k]]
    if len(result["losses"]) != result["steps"] or not all(map(math.isfinite, result["losses"])):
        problems.append("not one finite loss for each step")
    loss = result["held_out_loss"]
    if not job["in_order"] and name != FULL and abs(loss / reference - 1) > HELD_OUT_TOLERANCE:
        problems.append(f"held-out loss {loss:.4f}, not about {reference:.4f}")
    return [f"{name}: {problem}" for problem in problems]


# --------------------------------------------------------------------------------- the report


def median(results: list[Result], value: Callable[[Result], float]) -> float:
    return statistics.median(map(value, results))


def speed(result: Result) -> float:
    return float(result["tokens"] / result["seconds"])


def table(results: dict[str, list[Result]], operations: float, matrix: float) -> str:
    """Markdown: one row for each trainer, with ours as a multiple of its speed and memory."""
    speeds = {name: median(runs, speed) for name, runs in results.items()}
    memory = {name: median(runs, lambda r: r["peak_memory"]) for name, runs in results.items()}
    heads = ["trainer", "tokens/s", "slowest to fastest", f"{OURS} ÷ it", "peak memory"]
    heads += [f"{OURS} ÷ it", "of matrix product", "steps", "held-out loss"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, runs in sorted(results.items(), key=lambda item: -speeds[item[0]]):
        ordered = sorted(map(speed, runs))
        rate = operations * speeds[name] / runs[0]["tokens"]
        cells = [
            f"**{name}**" if name == OURS else name,
            f"{speeds[name]:,.1f}",
            f"{ordered[0]:,.1f} to {ordered[-1]:,.1f}",
            f"{speeds[OURS] / speeds[name]:.2f}",
            f"{memory[name] / 1e9:.2f} GB",
            f"{memory[OURS] / memory[name]:.2f}",
            "" if name == FULL else f"{rate / matrix:.2f}",
            f"{runs[0]['steps']}",
            f"{median(runs, lambda r: r['held_out_loss']):.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def same_loss(results: dict[str, list[Result]]) -> tuple[str, bool]:
    """The largest difference of each peer's loss curve from ours, and whether all are small."""
    ours = results[OURS][0]["losses"]
    lines, good = [], True
    for name, runs in results.items():
        losses = runs[0]["losses"]
        if name != OURS:
            largest = max(abs(a - b) for a, b in zip(ours, losses))
            good &= largest <= SAME_LOSS_TOLERANCE
            lines.append(
                f"largest difference of {len(ours)} losses from {name}'s: {largest:.1e} "
                f"(at most {SAME_LOSS_TOLERANCE:.0e} wanted); last {ours[-1]:.6f} and "
                f"{losses[-1]:.6f}"
            )
    return "\n".join(lines), good


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--shape", choices=SHAPES, default="gpt-neo-125m", help="random weights of this shape")
    add("--model", help="instead of --shape: a model directory, or a .gguf file (needs gguf)")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k.json")
    add("--samples", type=int, default=64, help="the first so many of train")
    add("--batch-size", type=int, default=8, help="samples a step")
    add("--max-length", type=int, default=512, help="longer samples are left out")
    add("--lr", type=float, default=5e-5)
    add("--repeats", type=int, default=3, help="rounds")
    add("--threads", type=int, default=cores)
    add("--peers", nargs="*", choices=PEERS, help="default: all; with --same-loss: trl")
    add("--peer-python", default=sys.executable, help="where requirements.txt is installed")
    add("--python", default=sys.executable, help="where this project is installed")
    add("--same-loss", action="store_true", help="compare loss curves on samples in file order")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="a key for sft.py")
    add("--lora", action="store_true", help="train an adapter on frozen weights")
    add("--output", type=Path, help="every run's figures as JSON")
    args = parser.parse_args()
    if args.peers is None:
        args.peers = ["trl"] if args.same_loss else list(PEERS)
        if args.lora:
            args.peers = [name for name in args.peers if name.startswith("trl")]
    if args.same_loss and not set(args.peers) <= set(SAME_ORDER):
        parser.error(f"--same-loss: only {', '.join(SAME_ORDER)} can keep the samples' order")
    if args.same_loss:
        args.repeats = 1
    return args


def make_job(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Model, data and ids on the disk; what every run is told."""
    model = f"{scratch}/model"
    rows = json.loads(args.data.read_text(encoding="utf-8"))["train"]
    rows = [{"Question": row["Question"], "Answer": row["Answer"]} for row in rows]
    in_process(make_model, args.shape, args.model, rows, model)
    rows = rows[: 2 * (args.samples + HELD_OUT)]
    both = zip(rows, in_process(tokenise, rows, model))
    fitting = [(row, ids) for row, ids in both if len(ids["input_ids"]) <= args.max_length]
    fitting = fitting[: args.samples + HELD_OUT]
    if len(fitting) < args.samples + HELD_OUT:
        sys.exit(f"{args.data}: too few samples of at most {args.max_length} tokens")
    chosen, held_out = fitting[: args.samples], fitting[args.samples :]
    data = Path(scratch) / "data.json"
    data.write_text(
        json.dumps({"train": [row for row, _ in chosen], "val": [row for row, _ in held_out]})
    )
    samples = [ids for _, ids in chosen]
    tokens = sum(len(s["input_ids"]) for s in samples)
    steps = math.ceil(len(samples) / args.batch_size)
    # TRL lays the packs of a batch end to end, and GPT-Neo's attention fails beyond its context.
    context = json.loads(Path(model, "config.json").read_text())["max_position_embeddings"]
    packs = min(math.ceil(tokens / steps / args.max_length), context // args.max_length)
    return {
        "scratch": scratch,
        "model": model,
        "adapter": f"{scratch}/adapter" if args.lora else None,
        "data": str(data),
        "samples": samples,
        "held_out": [ids for _, ids in held_out],
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "packs_per_batch": max(1, packs),
        "steps": steps,
        "lr": args.lr,
        "threads": args.threads,
        "in_order": args.same_loss,
    }


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="sft-benchmark-") as scratch:
        job = make_job(args, scratch)
        operations, usual = in_process(useful_operations, job["model"], job["samples"])
        if args.lora:
            adapter = in_process(make_adapter, job["model"], job["adapter"])
            more = 6 * adapter * sum(len(s["input_ids"]) for s in job["samples"])
            operations, usual = (4 / 6 * value + more for value in (operations, usual))
        names = [OURS, *([FULL] if args.lora and not args.same_loss else []), *args.peers]
        results: dict[str, list[Result]] = {name: [] for name in names}
        matrix: list[float] = []
        for repeat in range(args.repeats):
            job["seed"] = 1 + repeat
            matrix.append(in_process(matrix_rate, args.threads))
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                if name in (OURS, FULL):
                    result = run_ours(job, args.python, args.override, full=name == FULL)
                else:
                    result = run_peer(name, job, args.peer_python)
                results[name].append(result)
                print(
                    f"round {repeat + 1}/{args.repeats}  {name}: {speed(result):,.1f} tokens/s, "
                    f"{result['peak_memory'] / 1e9:.2f} GB, loss {result['losses'][0]:.4f} to "
                    f"{result['final_loss']:.4f}",
                    file=sys.stderr,
                )
            if args.output:
                everything = {
                    "command": sys.argv,
                    "matrix_rate": matrix,
                    "operations": operations,
                    "operations_with_head_everywhere": usual,
                    "results": results,
                }
                args.output.write_text(json.dumps(everything, indent=1))

    reference = median(results[OURS], lambda r: r["held_out_loss"])
    problems = [
        problem
        for name, runs in results.items()
        for run in runs
        for problem in differences(name, run, job, reference)
    ]
    versions = {k: v for runs in results.values() for k, v in runs[0]["versions"].items()}
    tokens = results[OURS][0]["tokens"]
    rate = statistics.median(matrix)
    print(
        f"{args.model or args.shape}, {args.samples} samples, {tokens:,} tokens, "
        f"{args.batch_size} samples a step, float32, {args.threads} threads of {processor()}, "
        f"{args.repeats} rounds; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    good = True
    if args.same_loss:
        text, good = same_loss(results)
        print(text)
    else:
        print("\n" + table(results, operations, rate))
        ours = median(results[OURS], speed) / tokens / rate
        print(
            f"\nMatrix product: {rate / 1e9:.1f} GFLOP/s. {OURS} is at {ours * operations:.2f} of "
            f"it; counted with the head on every token, at {ours * usual:.2f}."
        )
    for problem in problems:
        print(f"not the same work: {problem}", file=sys.stderr)
    return 0 if good and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
