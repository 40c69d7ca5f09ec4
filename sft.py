"""sft: supervised fine-tuning of causal language models in plain PyTorch.

    python sft.py train configs/trainer.yaml
    python sft.py train configs/trainer.yaml trainer.ckpt_path=last trainer.params.max_epochs=5
    python sft.py test  configs/test.yaml
    python sft.py check configs/trainer.yaml
    python sft.py ask   runs/facts "What is the capital of France?"
    python sft.py plot  runs/facts runs/other
    python sft.py export runs/facts exported/facts bfloat16

Any key of the file can be given as key.path=value after it. `set_up` puts a run's parts together,
`loop` is every step of it; the words of the command line stand in extras/command_line.py.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config import TestConfig, TrainConfig, UserError, resolved, to_yaml
from extras import command_line

if __name__ == "__main__":  # answer --help and a wrong file before the slow import of torch
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it is loaded: the end, no traceback
    try:
        command_line.configuration(command_line.parse(sys.argv[1:]))
    except UserError as error:
        command_line.complain(str(error))
        sys.exit(2)

import numpy as np
import torch
from torch import nn

import checkpoint
import evaluate
import freeze
import lora
from checkpoint import State, Step, find_model
from data import (
    Batch,
    Encoder,
    Samples,
    Splits,
    collate,
    epoch_order,
    load_splits,
    micro_batches,
    numbered,
)
from device import Device, open_device, whole_tensor
from evaluate import Validation, summed_loss
from extras.adapters import check_continued, describe
from extras.console import ConsoleRecorder, Recorder
from extras.formats import DataSource
from extras.model_checks import check_ids, check_length, refuse_router_loss
from extras.probe import check_trainable
from extras.same_run import architecture
from model import (
    AnswerModel,
    Opened,
    checkpoint_activations,
    export,
    learning_rate,
    make_optimizer,
    open_model,
    state_to_save,
    warmup_steps,
)

SAMPLES_PER_STEP = "data.batch_size x trainer.params.accumulate_grad_batches x ranks"

# ----------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Plan:
    """What comes when, as a pure function of the counters: samples, rate, validation, saving.

    batch_size: of this process, on all its devices. samples_per_step: of all ranks. end_position:
    how many steps to try; infinite without `max_epochs`. static_shape: (B, T) of every batch, on a
    device that compiles each new shape.
    """

    config: TrainConfig
    batch_size: int
    samples_per_step: int
    steps_per_epoch: int
    end_position: float
    total_steps: int
    warmup: int
    static_shape: tuple[int, int] | None

    @classmethod
    def of(cls, config: TrainConfig, device: Device, samples: int) -> Plan:
        params, data = config.trainer.params, config.data
        batch_size = data.batch_size * device.shards
        step = batch_size * params.accumulate_grad_batches * device.ranks.world_size
        steps_per_epoch = math.ceil(samples / step)
        end = (params.max_epochs if params.max_epochs > 0 else math.inf) * steps_per_epoch
        total = int(min(end, params.max_steps or math.inf))
        warmup = warmup_steps(config.model_params.warmup_steps_per_cent, total)
        static = device.static_shapes or data.on_tpu
        shape = (batch_size, data.max_length) if static else None
        return cls(config, batch_size, step, steps_per_epoch, end, total, warmup, shape)

    def steps(self, samples: Samples, position: int) -> Iterator[np.ndarray]:
        """The indices of each step's samples, those of all ranks, from step `position` on."""
        epoch, first = divmod(position, self.steps_per_epoch)
        while True:
            order = epoch_order(
                len(samples),
                self.samples_per_step,
                self.config.seed,
                epoch,
                samples.lengths if self.config.data.group_by_length else None,
                shuffle=not self.config.trainer.params.overfit_batches,
            )
            for start in range(first * self.samples_per_step, len(order), self.samples_per_step):
                yield order[start : start + self.samples_per_step]
            epoch, first = epoch + 1, 0

    def learning_rate(self, global_step: int) -> float:
        peak = self.config.model_params.learning_rate
        return learning_rate(global_step, peak, self.warmup, self.total_steps)

    def finished(self, state: State) -> bool:
        limit = self.config.trainer.params.max_steps
        return state.position >= self.end_position or (
            limit is not None and state.global_step >= limit
        )

    def validation_due(self, state: State) -> bool:
        interval = self.config.trainer.params.val_check_interval
        if state.position == 0 or state.validated_at == state.position:
            return False
        if self.finished(state):
            return True
        if isinstance(interval, int):
            # A skipped step advances position but not global_step, which was validated already.
            new = state.global_step > state.validated_step
            return new and state.global_step % interval == 0
        # Rounded first: 0.29 of 100 steps is 28.999... in floating point.
        every = max(1, int(round(self.steps_per_epoch * interval, 6)))
        return ((state.position - 1) % self.steps_per_epoch + 1) % every == 0

    def checkpoint_due(self, state: State) -> bool:
        every = self.config.trainer.checkpoint.every_n_train_steps
        return state.global_step % every == 0 and state.global_step > state.saved_step

    def log_due(self, state: State, applied: bool) -> bool:
        last = self.finished(state)
        due = last or state.global_step % self.config.trainer.params.log_every_n_steps == 0
        return due and state.window_targets > 0 and (applied or last)


@dataclass(frozen=True)
class Run:
    """The parts of a training, as `set_up` puts them together.

    parallel: what the loop calls, the model or DDP around it. kinds: see `freeze.report`.
    identity: what a checkpoint must match, by the names used in messages. remarks: for the user.
    """

    config: TrainConfig
    device: Device
    opened: Opened
    parallel: nn.Module
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    kinds: list[tuple[str, int, int]]
    source: DataSource
    encoder: Encoder
    splits: Splits
    validation: Validation
    plan: Plan
    identity: dict[str, Any]
    resumed_from: Path | None
    remarks: list[str]

    @property
    def model(self) -> AnswerModel:
        return self.opened.model

    @property
    def directory(self) -> Path:
        return Path(self.config.trainer.checkpoint.dirpath)

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """This rank's micro-batches of a step's samples."""
        plan, samples, ranks = self.plan, self.splits.train, self.device.ranks
        sizes = (plan.batch_size, samples.lengths, ranks.rank, ranks.world_size)
        parts = micro_batches(rows, *sizes)
        if plan.static_shape:  # a short last step must not be another graph
            parts += [rows[:0]] * (self.config.trainer.params.accumulate_grad_batches - len(parts))
        for part in parts:
            batch = collate(samples, part, plan.static_shape, self.model.can_pack)
            if self.model.prefix_cache is not None:
                batch.prefix = self.model.prefix_cache.gather(batch)
            yield batch


def set_up(config: TrainConfig, device: Device, resumed_from: Path | None) -> Run:
    """Open model and data, freeze, plan; nothing is written into the run's directory.

    Raises:
        UserError: anything wrong with configuration, model or data.
    """
    params, ranks, remarks = config.trainer.params, device.ranks, list[str]()
    source = DataSource.configured(config.data)
    start = find_model(config.model_name, remarks.append)
    base, _ = lora.base_of(start)
    opened = open_model(
        resumed_from or start,
        base=base,
        warn=remarks.append,
        from_scratch=config.model_params.from_scratch and not resumed_from,
        dtype=device.weights_dtype,
        seed=config.seed,
    )
    model, causal_lm = opened.model, opened.model.model
    encoder = opened.encoder(config.data.prompt_template, source.chat)
    remarks += opened.remarks
    if resumed_from:
        remarks.append(f"weights from {resumed_from}")
    check_length(causal_lm, config.data.max_length, "data.max_length")
    refuse_router_loss(config.model_name, causal_lm.config)
    if opened.adapter is None:
        freeze.apply(causal_lm, config.model_params)
        if config.model_params.adapter:
            opened.adapter = lora.attach(causal_lm, config.model_params.adapter, config.seed)
            remarks.append(describe(opened))
    elif not resumed_from:
        check_continued(opened, config.model_params)
        remarks.append(f"training goes on with the adapter in {start}")
    if kind := config.model_params.quantize:
        from extras.quantize import quantize

        remarks.append(quantize(causal_lm, kind, device.torch_device))
    if params.gradient_checkpointing:
        checkpoint_activations(causal_lm)
    reached = check_trainable(model)
    if opened.adapter and not reached:
        remarks.append("a short text reaches only a part of the adapters, see docs/models.md")

    with ranks.one_by_machine():
        splits = load_splits(source, encoder, config.data, params.overfit_batches, config.seed)
    largest = max(int(s.input_ids.max(initial=0)) for s in (splits.whole, splits.val))
    remarks += source.remarks()
    remarks += check_ids(causal_lm, opened.tokenizer, largest, config.data.data_dir)
    plan = Plan.of(config, device, len(splits.train))
    validation = Validation.of(config, splits, source, model, plan.batch_size, plan.static_shape)

    # A compiled model would be compiled anew for each list of lengths.
    model.can_pack &= device.packing_pays and not params.compile and plan.static_shape is None
    if params.compile:
        model.backbone.compile(dynamic=True)
    kinds = freeze.report(causal_lm)
    parallel = device.parallel(model, params.strategy, reached)
    optimizer = make_optimizer(causal_lm, config.model_params)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    identity = {
        "model": architecture(str(base)),
        "data": source.fingerprint,
        SAMPLES_PER_STEP: plan.samples_per_step,
    }
    if opened.adapter:
        identity["base"] = opened.fingerprint
    device.seed(config.seed)
    return Run(
        config, device, opened, parallel, trainable, optimizer, kinds, source, encoder, splits,
        validation, plan, identity, resumed_from, remarks,
    )  # fmt: skip


def train(config: TrainConfig, stop: command_line.Stop, quiet: bool = False) -> int:
    """Train as the configuration says; returns the process's exit code.

    Raises:
        UserError: anything wrong with configuration, data, model, checkpoint or disk.
    """
    params = config.trainer.params
    device = open_device(params.accelerator, params.precision)
    recorder = ConsoleRecorder(quiet) if device.ranks.rank == 0 else Recorder()
    directory = Path(config.trainer.checkpoint.dirpath)
    with ExitStack() as until_the_end:
        lock = checkpoint.locked(directory)
        device.ranks.on_rank_zero(lambda: until_the_end.enter_context(lock))
        until_the_end.callback(recorder.close)  # while the directory is still ours
        resumed_from = device.ranks.on_rank_zero(
            lambda: checkpoint.resume_point(config.trainer, recorder.warn)
        )
        run = set_up(config, device, resumed_from)
        state, metrics_size = State(), 0
        if resumed_from:
            state, metrics_size, remarks = checkpoint.restore(
                resumed_from, config, run.identity, run.optimizer, device
            )
            run.remarks.extend(remarks)
        if where := config.model_params.cache_frozen_prefix:
            from extras.frozen_prefix import fill_cache

            place = directory if where == "disk" else None
            run.remarks.append(fill_cache(run.model, run.splits.train, device, place))
        recorder.start(run, state, metrics_size)
        return loop(run, state, recorder, stop)


def loop(run: Run, state: State, recorder: Recorder, stop: command_line.Stop) -> int:
    """Optimizer steps until the plan is fulfilled or a signal stops it; returns the exit code."""
    device, plan, samples, optimizer = run.device, run.plan, run.splits.train, run.optimizer
    ranks, scaler, params = device.ranks, device.scaler, run.config.trainer.params
    steps = plan.steps(samples, state.position)
    sanity_check(run, recorder.say, stop.requested)

    while not ranks.any_rank(stop.requested()):
        # Once in a while: validate, and keep the best model; save a checkpoint.
        if plan.validation_due(state) and not validate(run, state, recorder, stop.requested):
            break  # stopped within it; a resumed run validates first
        if plan.finished(state):
            break
        if plan.checkpoint_due(state):
            save(run, state, recorder)

        # Forward and backward through the step's micro-batches. Every rank knows all of the step's
        # samples, so that the mean is over the targets of all of them.
        began = time.monotonic()
        rows = next(steps)
        targets = int(samples.target_lengths[rows].sum())
        loss = device.zero()
        run.model.train()
        for batch, last in device.feed(run.batches(rows)):
            device.exchange_gradients(run.parallel, now=last)
            with device.autocast():
                summed = run.parallel(batch)
            # DDP and FSDP take the mean over the ranks; a step's gradient is the sum.
            scaler.scale(summed / targets * ranks.world_size).backward()
            loss += summed.detach()
        loss = ranks.all_reduce(loss)

        # Unscale, clip, update. Where loss or gradient is not a finite number, weights and
        # optimizer state stay as they are.
        lr = plan.learning_rate(state.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        # Gathered before it clips: on slices, torch 2.9 would add its epsilon once for each rank.
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.trainable if p.grad is not None])
        norm = whole_tensor(norm)
        clip = params.gradient_clip_val or math.inf
        torch.nn.utils.clip_grads_with_norm_(run.trainable, clip, norm)
        finite = loss.isfinite() & norm.isfinite()
        device.step_if(finite, optimizer)
        scale = scaler.get_scale()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # Count and log.
        loss_sum, grad_norm, applied = device.read(loss, norm, finite)
        # A scale below 1 cannot be what made a number too large: then it is the model or the data.
        lowered = 1 <= scale and scaler.get_scale() < scale and math.isfinite(loss_sum)
        step = Step(
            loss=loss_sum,
            grad_norm=grad_norm,
            lr=lr,
            applied=bool(applied),
            overflow=lowered and not applied,
            tokens=int(samples.lengths[rows].sum()),
            targets=targets,
            seconds=time.monotonic() - began,
        )
        state.count(step)
        recorder.step(state, step)
        if not step.applied and not step.overflow:
            report_skipped(run, state, recorder, step, rows)
        if plan.log_due(state, step.applied):
            recorder.log(state, step)
            state.start_window()

    if state.saved_at != state.moment() and state.position > 0:
        save(run, state, recorder)
    stopped_by = max(ranks.all_gather(stop.signal or 0))  # one rank's signal stops all
    recorder.finish(state, stopped_by)
    return command_line.INTERRUPTED + stopped_by if stopped_by else 0


def report_skipped(
    run: Run, state: State, recorder: Recorder, step: Step, rows: np.ndarray
) -> None:
    """Say which samples a bad step had; raise a UserError if there were too many in a row."""
    limit = run.config.trainer.params.max_bad_steps
    names = numbered(sorted(run.splits.train.rows[rows].tolist()))
    what = "loss" if not math.isfinite(step.loss) else "gradient norm"
    recorder.skipped(state, what, names)
    if state.bad_in_row >= limit:
        raise UserError(
            f"stopped: {state.bad_in_row} steps in a row had a {what} that is not a finite "
            f"number (trainer.params.max_bad_steps: {limit})\n"
            f"  the last samples were {names} of train in {run.config.data.data_dir}\n"
            "  look at them, lower model_params.learning_rate, or use precision 32 or "
            f"bf16-mixed; the checkpoints in {run.directory} are from before"
        )


def sanity_check(run: Run, say: Callable[[str], None], should_stop: Callable[[], bool]) -> None:
    """A few validation batches before training, so that a broken setup fails early."""
    count = run.config.trainer.params.num_sanity_val_steps
    if count == 0 or run.resumed_from:
        return
    batches = None if count < 0 else count
    result = summed_loss(run.model, run.validation, run.device, should_stop, batches)
    if result is None:
        return
    loss = result[0] / max(1, result[1])
    if not math.isfinite(loss):
        raise UserError(
            f"sanity validation: the loss before the first step is {loss}, not a finite number; "
            f"look at the weights of {run.config.model_name} and at trainer.params.precision"
        )
    say(f"sanity    validation loss {loss:.4f}")


def validate(run: Run, state: State, recorder: Recorder, should_stop: Callable[[], bool]) -> bool:
    """Validate, and keep the model if it is the best; false if it was stopped."""
    began = time.monotonic()
    result = evaluate.validate(
        run.model, run.opened.tokenizer, run.validation, run.device, should_stop
    )
    if result is None:
        return False
    values, records = result
    state.validated_at, state.validated_step = state.position, state.global_step
    chosen, best = run.config.trainer.checkpoint, state.best_value
    value = values[chosen.log_obj]
    better = best is None or (value < best if chosen.mode == "min" else value > best)
    if math.isfinite(value) and better:
        state.best_value, state.best_step = value, state.global_step
        write_model(run, state, "best")
    recorder.validation(state, values, records, time.monotonic() - began)
    if state.best_value is not None and state.saved_at is None:
        save(run, state, recorder)  # never only a best/, which cannot be resumed
    return True


def save(run: Run, state: State, recorder: Recorder) -> None:
    """Write a resumable checkpoint, then remove older ones."""
    began, device = time.monotonic(), run.device
    state.saved_at, state.saved_step = state.moment(), state.global_step
    contents = {
        "state": asdict(state),
        "optimizer": checkpoint.whole_optimizer_state(run.optimizer),
        "scaler": device.scaler.state_dict(),
        "rng": device.ranks.all_gather(device.rng_state()),
        "metrics_size": recorder.sync(),
        "identity": run.identity,
        "config": resolved(run.config),
    }
    path = write_model(run, state, checkpoint.step_name(state.global_step), contents)
    if device.ranks.rank == 0:
        keep = run.config.trainer.checkpoint.save_top_k
        checkpoint.rotate(run.directory, keep, {path, run.resumed_from or path})
    recorder.saved(path, time.monotonic() - began)


def write_model(run: Run, state: State, name: str, contents: dict[str, Any] | None = None) -> Path:
    """Write the model into the run's directory, with `contents` as its trainer state if given."""
    about = {
        "prompt_template": run.encoder.template,
        "system": run.config.data.system,
        "model_name": run.config.model_name,
        "global_step": state.global_step,
        f"best_{run.config.trainer.checkpoint.log_obj}": state.best_value,
    }
    if run.opened.adapter:
        about |= {"base": str(run.opened.base), "base_fingerprint": run.opened.fingerprint}
        about["quantize"] = run.config.model_params.quantize
    weights = checkpoint.whole_state(state_to_save(run.opened))

    def write(directory: Path) -> None:
        export(run.opened, weights, directory, run.encoder.as_chat_template())
        (directory / checkpoint.DETAILS).write_text(json.dumps(about, indent=1))
        (directory / checkpoint.CONFIG).write_text(to_yaml(run.config), encoding="utf-8")
        if contents is not None:
            torch.save(contents, directory / checkpoint.STATE)

    return run.device.ranks.on_rank_zero(lambda: checkpoint.save(run.directory, name, write))


# ----------------------------------------------------------------------------------- commands


def test(config: TestConfig, stop: command_line.Stop, quiet: bool = False) -> int:
    """Answer and score the questions of a split; returns the process's exit code."""
    finished = evaluate.test(config, quiet, stop.requested)
    # Unfinished without a signal of its own: another rank had it.
    return 0 if finished else command_line.INTERRUPTED + (stop.signal or signal.SIGTERM)


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the process's exit code."""
    command, config = arguments.command, command_line.configuration(arguments)
    if isinstance(config, TestConfig):
        return test(config, command_line.Stop("the next save_steps answers"), arguments.quiet)
    if command == "train" and config:
        return train(config, command_line.Stop(), arguments.quiet)
    if command == "check" and config:
        from extras.check import check

        return check(config, set_up, sanity_check)
    if command == "ask":
        from extras.ask import ask

        options = (arguments.system, arguments.max_new_tokens, arguments.temperature)
        return ask(arguments.model, arguments.question, *options)
    if command == "export":
        from extras.export import export_model

        return export_model(arguments.model, arguments.output, arguments.dtype)
    if command == "plot":
        from extras.plot import plot

        print(plot([Path(run) for run in arguments.runs], arguments.output))
    else:  # test --compare
        from extras.metrics import compare_logs

        print(compare_logs([Path(log) for log in arguments.compare], seed=0))
    return 0


def main(argv: list[str]) -> int:
    return command_line.guarded(lambda: run_command(command_line.parse(argv)))


if __name__ == "__main__":
    command_line.end_process(lambda: main(sys.argv[1:]))
