"""Answers a second: this project against transformers' `generate`, same prompts and same texts.

    python benchmarks/generation.py --model DIR --questions 64 --new-tokens 160

Three ways, each in a process of its own, alternately for so many rounds: this project's engine
(`generate.generate`), `generate` with one prompt at a time, and `generate` on batches of the same
size in file order with left padding. All decode greedily in float32 with the KV cache until EOS or
`--new-tokens`. The texts must be the same, except where rounding in a batch decides a near tie: so
many are counted, and more than one in twenty is an error.

tokens/s counts generated tokens (with the EOS) over the time of answering, without loading. The
one-at-a-time way may be given fewer questions (`--single`): its rate does not depend on how many.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("sft", "one at a time", "generate, batched")


def answer(way: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one way; {"seconds", "tokens", "answers": [[ids]]}, in the order of the questions."""
    sys.path.insert(0, str(ROOT))
    import torch

    from config import GenerateParams
    from data import Encoder, pad_prompts, prepare_inference
    from device import Device
    from extras.formats import DataSource
    from extras.generation import Batching, Decoding, generate
    from model import load_tokenizer, open_model

    tokenizer = load_tokenizer(job["model"])
    encoder, eos = Encoder(tokenizer), tokenizer.eos_token_id
    asked = list(DataSource.open(job["data"]).conversations("test", empty_answers=True))
    prompts, _ = prepare_inference(asked[: job["questions"]], encoder, job["max_prompt"])
    answers: list[list[int]] = []
    if way == "sft":
        model = open_model(job["model"]).model.eval()
        decoding = Decoding(GenerateParams(max_new_tokens=job["new_tokens"]), seed=0)
        batching = Batching(job["batch_size"])
        began = time.perf_counter()
        done = list(generate(model, prompts, Device("cpu"), decoding, batching))
        seconds = time.perf_counter() - began
        done.sort(key=lambda a: a.prompt.row)
        answers = [a.tokens + [eos] * a.ended for a in done]
    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        size = job["batch_size"] if way == "generate, batched" else 1
        began = time.perf_counter()
        for start in range(0, len(prompts), size):
            ids = [prompt.input_ids for prompt in prompts[start : start + size]]
            batch = pad_prompts(ids, "left")
            output = theirs.generate(
                **batch,
                max_new_tokens=job["new_tokens"],
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos,
            )
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                end = row.index(eos) + 1 if eos in row else len(row)
                answers.append(row[:end])
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a local model directory")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "gsm8k.json"))
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--single", type=int, default=16, help="questions for one at a time")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--max-prompt", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    job = vars(arguments)
    if arguments.way:
        print(json.dumps(answer(arguments.way, job)))
        return 0
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            settings = job | {"way": way}
            if way == "one at a time":
                settings["questions"] = min(arguments.single, arguments.questions)
            command = [sys.executable, __file__]
            for name, value in settings.items():
                command += [f"--{name.replace('_', '-')}", str(value)]
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                print(run.stderr, file=sys.stderr)
                return 1
            results[way].append(json.loads(run.stdout.splitlines()[-1]))
    rates = {
        way: statistics.median(r["tokens"] / r["seconds"] for r in runs)
        for way, runs in results.items()
    }
    lengths = sorted(len(tokens) for tokens in results["sft"][0]["answers"])
    middle = lengths[len(lengths) // 2]
    print(
        f"{arguments.questions} questions, answers of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{middle}), batch {arguments.batch_size}, {arguments.threads} threads\n"
    )
    print("| way | tokens/s | sft is faster by | other texts |\n|---|---|---|---|")
    failed = False
    for way in WAYS:
        both = list(zip(results["sft"][0]["answers"], results[way][0]["answers"]))
        other = sum(a != b for a, b in both)
        failed |= other * 20 > len(both)
        factor = f"{rates['sft'] / rates[way]:.2f} x"
        print(f"| {way} | {rates[way]:.1f} | {factor} | {other} of {len(both)} |")
    if failed:
        print("error: more than one text in twenty differs", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
