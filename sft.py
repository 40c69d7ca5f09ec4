"""sft: supervised fine-tuning of causal language models in plain PyTorch.

    python sft.py train configs/trainer.yaml
    python sft.py train configs/trainer.yaml trainer.ckpt_path=last trainer.params.max_epochs=5
    python sft.py test  configs/test.yaml
    python sft.py check configs/trainer.yaml
    python sft.py ask   runs/facts "What is the capital of France?"
    python sft.py plot  runs/facts runs/other

Any key of the file can be given as key.path=value behind it. `train` is the training loop, from
top to bottom; what it calls lies in data.py, model.py, device.py, checkpoint.py and evaluate.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from config import TestConfig, TrainConfig, UserError, load

if TYPE_CHECKING:
    from run import Run

INTERRUPTED = 128  # exit codes of a run that a signal ended: 128 + the signal's number


class Stop:
    """Remembers that SIGINT or SIGTERM asked to stop; a second Ctrl-C ends the process at once.

    after: what is finished before, for the message.
    """

    def __init__(self, after: str = "this step") -> None:
        self.after = after
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGTERM:
            return  # batch systems repeat it; whoever is in a hurry has SIGINT and SIGKILL
        if self.signal is not None:
            os._exit(INTERRUPTED + number)
        self.signal = number
        name = signal.Signals(number).name
        message = f"\n{name}: stopping after {self.after}; Ctrl-C once more stops at once\n"
        os.write(sys.stderr.fileno(), message.encode())

    def requested(self) -> bool:
        return self.signal is not None


def train(config: TrainConfig, stop: Stop, quiet: bool = False) -> int:
    """Train as the configuration says; returns the process's exit code.

    Raises:
        UserError: anything wrong with configuration, data, model, checkpoint or disk.
    """
    from run import Run  # here, because torch comes with it and takes two seconds

    run = Run(config, quiet)
    try:
        return loop(run, stop)
    finally:
        run.close()


def loop(run: Run, stop: Stop) -> int:
    """Optimizer steps until the run is finished or stopped; returns the exit code."""
    model, samples, device = run.training_model, run.samples, run.device
    run.sanity_check(stop.requested)

    while not device.ranks.any(stop.requested()):
        if run.validation_due() and not run.validate(stop.requested):
            break
        if run.finished():
            break
        if run.checkpoint_due():
            run.save()

        # One optimizer step: the next samples in the epoch's order, in micro-batches. Every rank
        # knows all of the step's rows, so the mean is over the targets of all ranks.
        rows = run.next_rows()
        targets = int(samples.target_lengths[rows].sum())
        loss = device.zero()
        model.train()
        for batch, last in device.feed(run.micro_batches(rows)):
            device.exchange_gradients(model, now=last)
            with device.autocast():
                summed = model(batch)
            device.backward(summed / max(1, targets))
            loss += summed.detach()
        rate = run.set_learning_rate()
        result = device.step(run.optimizer, run.trainable, run.clip, loss)
        run.after_step(result, rows, rate)

    stopped_by = max(device.ranks.gather(stop.signal or 0))  # one rank's signal stops all
    return run.finish(stopped_by or None)


def parse(argv: list[str]) -> argparse.Namespace:
    """The commands and their words, all in one place."""
    parser = argparse.ArgumentParser(
        prog="sft.py", description="Supervised fine-tuning of causal language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    train = command("train", "train a model as a YAML file says, e.g. configs/trainer.yaml")
    test = command("test", "answer a split's questions and score them, e.g. configs/test.yaml")
    check = command("check", "show what `train` would do with a YAML file, without training")
    ask = command("ask", "ask a model; several times at a prompt, or once")
    plot = command("plot", "draw the curves of a run, or of several over each other")
    for one in (train, test, check):
        # `test --compare` needs no configuration.
        one.add_argument("config", help="the YAML file", nargs="?" if one is test else None)
        one.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="key.path=value",
            help="replaces a key of the file",
        )
    for one in (train, test):
        one.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    test.add_argument("--compare", nargs="+", metavar="LOG", help="compare finished logs instead")
    ask.add_argument("model", help="a run's directory, a checkpoint or a hub id")
    ask.add_argument("question", nargs="?", help="without one, questions are read line by line")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    plot.add_argument("--output", help="the PNG; default: curves.png in the run, or here")

    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option, which argparse leaves over
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        return run_command(arguments)
    except UserError as error:
        complain(str(error))
    except OSError as error:  # a disk that is full or gone, a directory that is not ours
        complain(
            f"{error.filename or 'output'}: {error.strerror}" if error.strerror else str(error)
        )
    except RuntimeError as error:
        from device import explain

        message = explain(error)
        if message is None:
            raise
        complain(message)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED + signal.SIGINT
    return 2


def complain(message: str) -> None:
    """Print an error; several ranks that find the same say it whole only once."""
    rank = os.environ.get("RANK", "0")
    if not message:
        return
    message = (
        f"error: {message}" if rank == "0" else f"rank {rank}: error: {message.splitlines()[0]}"
    )
    print(message, file=sys.stderr)


def run_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns the process's exit code."""
    if arguments.command == "ask":
        from extras.ask import ask

        return ask(arguments.model, arguments.question)
    if arguments.command == "plot":
        from extras.plot import plot

        print(plot([Path(run) for run in arguments.runs], arguments.output))
        return 0
    if arguments.command == "test" and arguments.compare:
        return compare(arguments.compare)
    if arguments.config is None:
        raise UserError("test: name a YAML file, or finished logs behind --compare")
    if arguments.command == "test":
        testing = load(TestConfig, arguments.config, arguments.overrides)
        return test(testing, Stop("the next save_steps answers"), arguments.quiet)
    training = load(TrainConfig, arguments.config, arguments.overrides)
    if arguments.command == "train":
        return train(training, Stop(), arguments.quiet)
    from extras.check import check

    return check(training)


def test(config: TestConfig, stop: Stop, quiet: bool = False) -> int:
    """Answer and score the questions of a split; returns the process's exit code."""
    import evaluate
    from model import quiet_libraries

    quiet_libraries()
    finished = evaluate.test(config, quiet, stop.requested)
    # Unfinished without a signal of its own: another rank had it.
    return 0 if finished else INTERRUPTED + (stop.signal or signal.SIGTERM)


def compare(logs: list[str]) -> int:
    """Print finished logs of `test` side by side; returns the process's exit code."""
    import evaluate

    if len(logs) < 2:
        raise UserError("--compare: found one log; allowed: two or more")
    print(evaluate.compare([Path(log) for log in logs], seed=0))
    return 0


if __name__ == "__main__":
    if "WORLD_SIZE" not in os.environ:
        sys.exit(main(sys.argv[1:]))
    # One of several ranks ends at once: torch's process groups may hang in their destructors.
    code = 1
    try:
        code = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
