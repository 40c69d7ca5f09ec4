"""The commands and their words, errors on the console, and signals.

Imports nothing heavy: `--help` and a wrong word are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from config import TestConfig, TrainConfig, UserError, load

INTERRUPTED = 128  # exit codes of a run that a signal ended: 128 + the signal's number


def _length(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}; allowed: an integer >= 1")
    return int(word)


def _temperature(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {word!r}; allowed: a number >= 0")
    return value


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
    export = command("export", "write a whole model of a run: its adapter merged, another dtype")
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
    ask.add_argument("--system", help="a system message, for a model with a chat template")
    ask.add_argument("--max-new-tokens", type=_length, default=256, metavar="N")
    ask.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0: the likeliest token"
    )
    export.add_argument("model", help="a run's directory, a checkpoint or an adapter")
    export.add_argument("output", help="a directory that is not there yet")
    export.add_argument(
        "dtype", nargs="?", default="float32", choices=("float32", "bfloat16", "float16")
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    plot.add_argument("--output", help="the PNG; default: curves.png in the run, or here")

    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option, which argparse leaves over
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def configuration(arguments: argparse.Namespace) -> TrainConfig | TestConfig | None:
    """The checked configuration of a command that has one.

    Raises:
        UserError: what is wrong with it.
    """
    if arguments.command not in ("train", "test", "check") or (
        arguments.command == "test" and arguments.compare
    ):
        return None
    if arguments.config is None:
        raise UserError("test: name a YAML file, or finished logs behind --compare")
    if arguments.command == "test":
        return load(TestConfig, arguments.config, arguments.overrides)
    return load(TrainConfig, arguments.config, arguments.overrides)


def complain(message: str) -> None:
    """Print an error; several ranks that find the same say it whole only once."""
    rank = os.environ.get("RANK", "0")
    if not message:
        return
    message = (
        f"error: {message}" if rank == "0" else f"rank {rank}: error: {message.splitlines()[0]}"
    )
    print(message, file=sys.stderr)


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


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command, with one message instead of a traceback for what users meet."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return command()
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


def end_process(command: Callable[[], int]) -> None:
    """End the process with a command's exit code.

    One of several ranks ends at once: torch's process groups may hang in their destructors.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(command())
    code = 1
    try:
        code = command()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
