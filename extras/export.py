"""A whole model of a run: `python sft.py export RUN OUT [DTYPE]`.

    python sft.py export runs/mine exported/mine            # float32
    python sft.py export runs/mine exported/mine bfloat16   # half the size

An adapter is merged into its base, in float32; a model that was trained whole gets another dtype.
OUT is opened again and held against RUN: the largest difference of a logit, and how many greedy
answers to a few of the run's questions stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

import checkpoint
import lora
from config import GenerateParams, TrainConfig, UserError, load
from data import Conversation, Message, Prompt, prepare_inference
from device import Device, open_device
from extras.console import Console
from extras.formats import DataSource
from extras.generation import Batching, Decoding, generate
from extras.model_checks import context_length
from model import Opened, export, open_model, parameters_in, state_to_save

PROMPTS, NEW_TOKENS, BATCH = 8, 32, 4
OF_ADAPTERS = ("base", "base_fingerprint", "quantize")  # in sft.json; not of a whole model
# Where the run's data are not there any more.
QUESTIONS = ("What is the capital of France?", "Two plus two?", "Name three primary colours.")


def export_model(name: str, output: str, dtype_name: str) -> int:
    """Write the model and print how near it is; returns the process's exit code.

    Raises:
        UserError: there is no such model, OUT is taken, or the dtype is too small for a weight.
    """
    console, device, target = Console(), open_device(), Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already there; name a directory that is not")
    place = checkpoint.find_model(name, console.warn)
    opened = open_model(place, warn=console.warn)
    prompts, where = prompts_of(opened)
    before = answers(opened, prompts, device)
    kind = f"adapter of {opened.base}, merged" if opened.adapter else "whole model"
    write(opened, target, getattr(torch, dtype_name))
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    parameters = parameters_in(opened.model.parameters())
    console.row("export", f"{place} ({kind}) -> {target}")
    console.row("", f"{parameters:,} parameters in {dtype_name}, {size / 1e6:,.1f} MB")
    del opened
    after = answers(open_model(target), prompts, device)
    pairs = list(zip(before, after))
    difference = max(float((a - b).abs().max()) for (a, _), (b, _) in pairs)
    largest = max(float(logits.abs().max()) for logits, _ in before)
    same = sum(a == b for (_, a), (_, b) in pairs)
    console.row("check", f"opened again, {len(prompts)} prompts ({where}):")
    console.row("", f"logits differ by at most {difference:.1e}, the largest is {largest:.1f}")
    console.row("", f"{same / len(pairs):.0%} of the greedy answers are equal ({same})")
    return 0


def prompts_of(opened: Opened) -> tuple[list[Prompt], str]:
    """A few questions in the model's template, and where they come from."""
    settings = Path(opened.place) / checkpoint.CONFIG
    limit = (context_length(opened.model.model) or 1024) - NEW_TOKENS
    try:
        data = load(TrainConfig, settings).data
        source = DataSource.configured(data, opened.details.get("system"))
        split = next(name for name in ("val", "test", "train") if source.has(name))
        asked, where = list(islice(source.conversations(split), PROMPTS)), data.data_dir
        chat = source.chat
    except UserError:
        asked = [Conversation(i, (Message("user", q),)) for i, q in enumerate(QUESTIONS, 1)]
        where, chat = "not of its data, which are not there", False
    encoder = opened.encoder(None, chat)
    return prepare_inference(asked, encoder, limit)[0], where


def answers(
    opened: Opened, prompts: list[Prompt], device: Device
) -> list[tuple[torch.Tensor, list[int]]]:
    """Of each prompt, the logits [T, V] and the greedy answer's tokens."""
    model = opened.model.eval()
    device.move_model(model)
    decoding = Decoding(GenerateParams(max_new_tokens=NEW_TOKENS), seed=0)
    found = generate(model, prompts, device, decoding, Batching(BATCH))
    tokens = {answer.prompt.row: answer.tokens for answer in found}

    def logits() -> Iterator[torch.Tensor]:
        for prompt in prompts:
            ids = device.move(torch.tensor([prompt.input_ids]))
            with torch.no_grad():
                yield model.logits(ids)[0].float().cpu()

    return [(scores, tokens[prompt.row]) for scores, prompt in zip(logits(), prompts)]


def write(opened: Opened, target: Path, dtype: torch.dtype) -> None:
    """Merge, convert and write; nothing of `target` is there before all of it is."""
    model = opened.model.model
    if opened.adapter:
        lora.merge(model)
        opened.adapter = None
    model.to(dtype)
    lost = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    if lost:
        raise UserError(f"{dtype}: too small for numbers of {', '.join(lost[:4])}; use bfloat16")
    about = {k: v for k, v in opened.details.items() if k not in OF_ADAPTERS}
    about["exported_from"] = str(opened.place)

    def write_files(directory: Path) -> None:
        export(opened, checkpoint.whole_state(state_to_save(opened)), directory)
        (directory / checkpoint.DETAILS).write_text(json.dumps(about, indent=1))

    checkpoint.save(target.parent, target.name, write_files)
