"""Look before training: `python sft.py check CONFIG [key.path=value ...]`.

Prints what `train` would print at its start, then what is worth knowing before hours are spent:
token lengths, what would be cut, samples as the model sees them, parameters by kind, memory, and
time from a few timed micro-batches. Nothing is written into the run's directory; the weights that
the timed micro-batches change end with the process.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

import checkpoint
from checkpoint import State
from config import LARGEST, TrainConfig, UserError
from data import Conversation, Samples, by_length, micro_batches
from device import open_device, whole_tensor
from extras.console import Console, announce, duration, show_sample, visible
from extras.token_cache import cached_samples
from model import parameters_in

if TYPE_CHECKING:
    from sft import Run

SHOWN = 3  # samples, and samples that would be cut
BARS, BAR = 12, 50  # of the histogram: how many, and columns of the longest
MICRO_BATCHES, SECONDS = 8, 5.0  # timed at most, whichever comes first
CUT_TEXT = 60  # characters


def check(
    config: TrainConfig, set_up: Callable[..., Run], sanity_check: Callable[..., None]
) -> int:
    """Print what a training would do, with sft.py's own set-up; returns the process's exit code.

    Raises:
        UserError: what `train` would say of its configuration, data or model.
    """
    params, data, console = config.trainer.params, config.data, Console()
    device = open_device(params.accelerator, params.precision)
    if device.ranks.rank > 0:
        console = Console(silent=True)
    try:
        resumed_from = checkpoint.resume_point(config.trainer, console.warn)
    except UserError as error:
        resumed_from = None
        console.warn(f"train would refuse this: {error}")
    run, state = set_up(config, device, resumed_from), State()
    if resumed_from:
        state, _, remarks = checkpoint.restore(
            resumed_from, config, run.identity, run.optimizer, device
        )
        run.remarks.extend(remarks)
    announce(run, state, console)
    sanity_check(run, console.say, lambda: False)
    say, row = console.say, console.row
    whole = kept = run.splits.whole
    if kept.counts.rows.keys() - {"split"}:  # something was cut or dropped
        limits = (LARGEST, data.truncate_prompt)
        whole, _ = cached_samples(run.source, "train", run.encoder, *limits)
    say("\n" + "\n".join(length_table(whole)))
    if run.source.chat:
        for label, text in zip(["turns", ""], role_summary(run.source.conversations("train"))):
            row(label, text)
    row("cut", cut_summary(whole, data.max_length))
    for text in cut_examples(run, whole, kept):
        row("", text)
    twice, shared = (run.splits.overlap[n] for n in ("duplicates", "train_test_overlap"))
    row("twice", f"{twice:,} pairs of train; {shared:,} questions of test are in train")
    samples = run.splits.train
    for i in np.linspace(0, len(samples) - 1, min(SHOWN, len(samples))):
        show_sample(run, console, int(i))
    say("\n" + "\n".join(parameter_table(run)) + "\n")
    for label, text in measure(run, console):
        row(label, text)
    for text in warnings(run, whole):
        console.warn(text)
    return 0


def length_table(samples: Samples) -> Iterator[str]:
    """Percentiles of token lengths and a histogram of the total, at most 80 columns wide."""
    shares = (50, 90, 99)
    yield f"{'tokens':<10}{'mean':>8}" + "".join(f"{s:>6} %" for s in shares) + f"{'max':>8}"
    targets, total = samples.target_lengths, samples.lengths
    parts = {"prompt": total - targets, "answer": targets, "total": total}
    for name, values in parts.items():
        middle = "".join(f"{v:>8,.0f}" for v in np.percentile(values, shares))
        yield f"{name:<10}{values.mean():>8,.1f}{middle}{values.max():>8,}"
    low, high = int(samples.lengths.min()), int(samples.lengths.max())
    width = math.ceil((high - low + 1) / BARS)
    edges = np.arange(low, high + width + 1, width)
    found = np.histogram(samples.lengths, edges)[0]
    for start, count in zip(edges, found):
        name = f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
        yield f"{name:>18}  {'#' * math.ceil(BAR * count / found.max()):<{BAR}} {count:,}"


def role_summary(conversations: Iterable[Conversation]) -> Iterator[str]:
    """How many turns conversations have, and who says how much in them."""
    turns, roles = Counter[int](), Counter[str]()
    for conversation in conversations:
        turns[sum(message.role == "user" for message in conversation.messages)] += 1
        roles.update(message.role for message in conversation.messages)
        roles["trained"] += sum(message.trained for message in conversation.messages)
    count, asked = turns.total(), sum(n * times for n, times in turns.items())
    yield (
        f"{count:,} conversations of {asked / count:.1f} turns on average, {min(turns)} to "
        f"{max(turns)}"
    )
    trained = roles.pop("trained")
    said = ", ".join(f"{times:,} {role}" for role, times in sorted(roles.items()))
    yield f"messages: {said}; {trained:,} of the assistant's are trained on"


def cut_summary(whole: Samples, max_length: int) -> str:
    long = whole.lengths > max_length
    if not long.any():
        return f"nothing, no sample has more than {max_length:,} tokens (data.max_length)"
    beyond = int((whole.lengths[long] - max_length).sum())
    return (
        f"{long.sum():,} samples ({long.mean():.1%}) have more than {max_length:,} tokens "
        f"(data.max_length), {beyond:,} tokens too many"
    )


def cut_examples(run: Run, whole: Samples, kept: Samples) -> Iterator[str]:
    """What the first samples that are too long lose."""
    for i in np.flatnonzero(whole.lengths > run.config.data.max_length)[:SHOWN]:
        row, before = int(whole.rows[i]), whole.sample(i)[0].tolist()
        found = np.flatnonzero(kept.rows == row)
        if not len(found):
            yield f"row {row}: {len(before):,} tokens, dropped: nothing of its answer fits"
            continue
        after = kept.sample(int(found[0]))[0].tolist()
        start = next((k for k, (a, b) in enumerate(zip(before, after)) if a != b), len(after))
        stop = start + len(before) - len(after)
        text = visible(run.opened.tokenizer.decode(before[start:stop]))
        text = text if len(text) <= CUT_TEXT else text[:CUT_TEXT] + " ..."
        yield f"row {row}: {len(before):,} tokens, loses {text!r}"


def parameter_table(run: Run) -> Iterator[str]:
    total = ("all", sum(k[1] for k in run.kinds), sum(k[2] for k in run.kinds))
    yield f"{'kind':<10}{'parameters':>15}{'trained':>15}{'frozen':>15}"
    for kind, count, trained in (*run.kinds, total):
        yield f"{kind:<10}{count:>15,}{trained:>15,}{count - trained:>15,}"


def measure(run: Run, console: Console) -> Iterator[tuple[str, str]]:
    """Memory and time, from a step with the longest samples and some random micro-batches."""
    samples, device, plan = run.splits.train, run.device, run.plan
    run.model.train()

    def backward(rows: np.ndarray) -> torch.Tensor:
        ((batch, _),) = device.feed(islice(run.batches(rows), 1))
        with device.autocast():
            loss = run.model(batch)
        device.scaler.scale(loss / int(samples.target_lengths[rows].sum())).backward()
        return loss.detach()

    def step() -> float:
        """What follows the backward passes; returns the gradient's norm."""
        device.scaler.unscale_(run.optimizer)
        clip = run.config.trainer.params.gradient_clip_val or math.inf
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(run.trainable, clip))
        device.scaler.step(run.optimizer)
        device.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        return device.read(norm)[0]

    # The first is not timed: it allocates the optimizer's state and all buffers.
    for group in run.optimizer.param_groups:
        group["lr"] = plan.learning_rate(0)
    longest = by_length(-samples.lengths)[: plan.batch_size]
    scale, loss = math.inf, backward(longest)
    while not math.isfinite(step()):
        # The scaler looks for its scale; where it does not, or has come down to 1, it is the model.
        if not 1 <= device.scaler.get_scale() < scale or not bool(loss.isfinite()):
            console.warn("the loss or the gradient of a first step is not a finite number")
            break
        scale, loss = device.scaler.get_scale(), backward(longest)
    peak = device.peak_memory()

    began, tokens = time.monotonic(), 0
    for position in np.linspace(0, plan.steps_per_epoch - 1, MICRO_BATCHES).astype(int):
        step_rows = next(plan.steps(samples, int(position)))
        parts = micro_batches(step_rows, plan.batch_size, samples.lengths)
        rows = parts[position % len(parts)]
        float(backward(rows))  # waits for the device
        tokens += int(samples.lengths[rows].sum())
        if device.ranks.any_rank(time.monotonic() - began > SECONDS):
            break
    token_seconds = (time.monotonic() - began) / tokens
    began = time.monotonic()
    step()
    step_seconds = time.monotonic() - began
    epoch = token_seconds * int(samples.lengths.sum()) + step_seconds * plan.steps_per_epoch

    weights = bytes_of(run.model.parameters())
    if run.config.model_params.quantize:
        from extras.quantize import scales_of

        weights += bytes_of(scales_of(run.model))
    gradients = bytes_of(run.trainable)
    state = bytes_of(
        value
        for entry in run.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    yield (
        "memory",
        f"weights {mb(weights)}, gradients {mb(gradients)}, optimizer {mb(state)}; the process "
        f"had {mb(peak)} at the peak of a micro-batch with the longest samples",
    )
    kept, saved = run.config.trainer.checkpoint.save_top_k, weights
    if run.opened.adapter:
        saved = gradients  # what trains, and no copy of the base
    yield "disk", f"{mb(saved + state)} a checkpoint, {kept} of them kept, best {mb(saved)}"
    yield "speed", f"{int(samples.lengths.sum()) / epoch:,.0f} tokens/s"
    whole = epoch / plan.steps_per_epoch * plan.total_steps
    cache = (
        ", without the frozen-prefix cache" if run.config.model_params.cache_frozen_prefix else ""
    )
    yield (
        "time",
        f"about {duration(epoch)} an epoch, {duration(whole)} in all, and validation on top{cache}",
    )


def bytes_of(tensors: Iterator[torch.Tensor] | list[torch.nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def mb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def usual_learning_rate(parameters: int, from_scratch: bool, adapter: bool = False) -> float:
    """The usual peak rate of AdamW for a model of so many parameters.

    From nothing: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", equation D.1:
    0.003239 - 0.0001395 ln N. Fine-tuning: a tenth of it, for GPT-2's 124M parameters 6e-5. An
    adapter: ten times that of fine-tuning, whatever its rank (Schulman and Thinking Machines Lab
    2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora).
    """
    rate = max(1e-5, 0.003239 - 0.0001395 * math.log(parameters))
    return rate if from_scratch or adapter else rate / 10


def warnings(run: Run, whole: Samples) -> Iterator[str]:
    params, data = run.config.model_params, run.config.data
    size = parameters_in(run.model.parameters())
    adapted, rate = run.opened.adapter is not None, params.learning_rate
    usual = usual_learning_rate(size, params.from_scratch, adapted)
    # With few of them trained, such as the norms alone, rates are higher.
    high = rate > 10 * usual and (adapted or parameters_in(run.trainable) > size / 10)
    if high or rate < usual / 10:
        what = "an adapter" if adapted else "fine-tuning"
        yield (
            f"model_params.learning_rate: {rate:g} is {'high' if high else 'low'} for a model of "
            f"{size:,} parameters; about {usual:.0e} is usual "
            f"{'from scratch' if params.from_scratch else 'for ' + what}"
        )
    if run.plan.warmup > run.plan.total_steps / 2:
        yield (
            f"model_params.warmup_steps_per_cent: {params.warmup_steps_per_cent:g} makes "
            f"{run.plan.warmup:,} of {run.plan.total_steps:,} steps warm-up; below 1 it is a "
            "share, from 1 on a percentage"
        )
    longest = int(whole.lengths.max())
    if data.max_length > 2 * longest:
        cost = (
            "every batch is padded to it (on_tpu)"
            if run.plan.static_shape
            else "harmless without on_tpu"
        )
        yield (
            f"data.max_length: {data.max_length:,} is far above the longest sample, {longest:,} "
            f"tokens; {cost}"
        )
    cut = run.splits.whole.counts.answer_cut + run.splits.whole.counts.dropped
    if cut > 0.01 * len(whole):
        yield (
            f"data.max_length: {data.max_length:,} cuts or drops the answers of {cut:,} samples; "
            "a cut answer has no EOS to learn"
        )
