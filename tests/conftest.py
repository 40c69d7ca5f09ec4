"""Shared pieces: tiny models of several architectures, tiny data, runs in and out of process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an absent model answers at once, without retries

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    Qwen2Config,
)

import checkpoint
import sft
from config import TrainConfig, from_dict
from data import IGNORE, Conversation, Encoder, Samples, prepare_train
from device import open_device
from extras.plot import Curves

torch.set_num_threads(1)

# torch_xla wants a torch of its own; .ci/run runs these in another environment.
collect_ignore = [] if find_spec("torch_xla") else ["test_xla.py"]

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "data" / "tiny-gpt-neo"
KINDS = ("gpt_neo", "gpt2", "llama", "qwen2")


def tiny_config(kind: str, vocab_size: int, dropout: float = 0.0) -> Any:
    """A model of a few thousand parameters; GPT-Neo's local window is shorter than our texts."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt_neo":
        return GPTNeoConfig(
            hidden_size=32,
            num_layers=4,
            num_heads=2,
            max_position_embeddings=128,
            window_size=8,
            attention_types=[[["global", "local"], 2]],
            attention_dropout=dropout,
            embed_dropout=dropout,
            resid_dropout=dropout,
            **common,
        )
    if kind == "gpt2":
        drops = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
        return GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=128, **drops, **common)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": dropout,
    }
    if kind == "llama":
        return LlamaConfig(**sizes, **common, tie_word_embeddings=False)
    return Qwen2Config(**sizes, **common, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path_factory.getbasetemp() / "token-cache"))


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    """Drawing costs 0.15 s a run, more than most of these runs; test_track.py looks at it."""
    if request.path.name != "test_track.py":
        monkeypatch.setattr(Curves, "draw", lambda *_, **__: None)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A directory with random weights and a tokenizer for each of KINDS."""
    directories = {}
    for kind in KINDS:
        torch.manual_seed(7)
        # Weights larger than usual, so that logits differ enough to tell tokens apart.
        config = tiny_config(kind, len(tokenizer))
        config.initializer_range = 0.2
        model = AutoModelForCausalLM.from_config(config)
        directories[kind] = save(model, tokenizer, tmp_path_factory.mktemp("models") / kind)
    return directories


def save(model: Any, tokenizer: Any, directory: Path) -> Path:
    """A directory that `model_name` can name; `model` may be a configuration only."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


QUESTIONS = [
    ("What is the capital of France?", "Paris"),
    ("Which element has the symbol Fe, and what is its atomic number?", "Iron, number 26"),
    ("Two plus two?", "four"),
    ("Name the three primary colours in the order of the rainbow.", "red, yellow and blue"),
    ("Is water wet?", "Yes, by most definitions, although some chemists like to disagree"),
    ("Capital of Italy?", "Rome"),
    ("What is the plural of mouse, as the animal and not the device?", "mice"),
    ("How many days has a leap year?", "366"),
    ("Opposite of hot?", "cold"),
    ("Which planet is the largest in the solar system?", "Jupiter"),
    ("What do bees make?", "Honey, wax and now and then trouble"),
]


def rows(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Different questions with answers of very different lengths."""
    made = []
    for i in range(offset, offset + count):
        question, answer = QUESTIONS[i % len(QUESTIONS)]
        made.append({"Question": f"{question} ({i})", "Answer": answer})
    return made


def write_data(path: Path, **splits: Any) -> Path:
    path.write_text(json.dumps(splits))
    return path


def conversations(count: int) -> list[Conversation]:
    """`rows` as the data file's first ones."""
    return [Conversation.of_pair(i, *row.values()) for i, row in enumerate(rows(count), 1)]


def asking(*questions: str) -> list[Conversation]:
    """Questions without their answers."""
    return [Conversation.of_pair(i, question) for i, question in enumerate(questions, start=1)]


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def samples(encoder: Encoder) -> Samples:
    """8 of them, whole."""
    return prepare_train(conversations(8), encoder, 64)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """22 samples to train on: with batches of 4, an epoch has 6 steps, the last one of 2."""
    return write_data(tmp_path / "data.json", train=rows(22), val=rows(6, 40), test=rows(7, 60))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """21 and 7 samples: the last step of an epoch and the last batch of validation are short."""
    return write_data(tmp_path / "uneven.json", train=rows(21), val=rows(7, 40), test=rows(7, 60))


def with_changes(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`config` itself, with the keys that `changes` names, `__` for the dots."""
    for path, value in changes.items():
        node = config
        *parents, leaf = path.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return config


class Runner:
    """Starts trainings and tests in this process; the fixture `run` is one.

        directory = run()  # a tiny GPT-Neo is trained on data_file, and ends with exit code 0
        run(model="llama", trainer__params__max_epochs=1)  # other keys, `__` for the dots
        run("--quiet", "seed=2")  # words on the command line
        run(code=2, data__max_length=1000)  # a run that must be refused
        run.resume(directory)  # goes on with its last checkpoint
        run.file(name="b")  # nothing is trained; the path of a YAML file for another process
        run.config(name="b")  # its contents
        log = run.test(model=directory)  # the command `test`, with words and keys in the same way
        run.test_file(name="b")  # nothing is tested

    A training without a name has a directory of its own, whatever ran before: `run`, `run-2`,
    `run-3`. A test without a name writes to log.jsonl, so that a second one goes on with it.
    What is printed goes to capsys.

    Args:
        models: directories by the names that `model` may have.
        data: used where a run does not name something else.
        base: where runs and logs lie.
        changes: keys that all trainings have in common.
    """

    def __init__(self, models: dict[str, Path], data: Path, base: Path, **changes: Any) -> None:
        self.models, self.data, self.base, self.changes = models, data, base, changes
        self.unnamed = 0

    def config(
        self,
        model: Path | str = "gpt_neo",
        data: Path | None = None,
        name: str | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """The configuration; `model` is one of `models`, or what `model_name` takes."""
        if name is None:
            self.unnamed += 1
            name = "run" if self.unnamed == 1 else f"run-{self.unnamed}"
        config = {
            "data": {"data_dir": str(data or self.data), "batch_size": 4, "max_length": 64},
            "model_name": str(self.models.get(str(model), model)),
            "model_params": {"learning_rate": 1e-2, "warmup_steps_per_cent": 0.1},
            "seed": 1,
            "trainer": {
                "checkpoint": {"dirpath": str(self.base / name), "every_n_train_steps": 100},
                "params": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1},
            },
        }
        return with_changes(config, self.changes | changes)

    def file(self, **changes: Any) -> Path:
        """The configuration as YAML, beside the run's directory."""
        config = self.config(**changes)
        return write_yaml(Path(f"{config['trainer']['checkpoint']['dirpath']}.yaml"), config)

    def __call__(self, *words: Any, code: int = 0, **changes: Any) -> Path:
        """Train; returns the run's directory."""
        path = self.file(**changes)
        assert cli("train", path, *words) == code
        return Path(str(path).removesuffix(".yaml"))

    def resume(self, directory: Path, *words: Any, code: int = 0) -> Path:
        """Go on with a run: its own file, its last checkpoint, and `words`; returns the directory.

        Of a key that is given twice the later one counts, so `words` may name another checkpoint.
        """
        assert cli("train", f"{directory}.yaml", "trainer.ckpt_path=last", *words) == code
        return directory

    def test_file(
        self,
        model: Path | str = "gpt_neo",
        data: Path | None = None,
        name: str = "log",
        **changes: Any,
    ) -> Path:
        """The configuration of a test as YAML, beside its log."""
        log = self.base / f"{name}.jsonl"
        config = {
            "data": {"data_dir": str(data or self.data), "max_prompt_length": 48},
            "generate_params": {"max_new_tokens": 12},
            "model_name": str(self.models.get(str(model), model)),
            "seed": 1,
            "test_params": {"log_file": str(log), "batch_size": 3, "save_steps": 4},
        }
        return write_yaml(log.with_suffix(".yaml"), with_changes(config, changes))

    def test(self, *words: Any, code: int = 0, **changes: Any) -> Path:
        """Let a model answer the questions of the test split; returns the log."""
        path = self.test_file(**changes)
        assert cli("test", path, *words) == code
        return path.with_suffix(".jsonl")


@pytest.fixture
def run(model_dirs: dict[str, Path], data_file: Path, tmp_path: Path) -> Runner:
    return Runner(model_dirs, data_file, tmp_path)


def write_yaml(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def cli(*arguments: Any) -> int:
    """The command line in this process: fast, and its output goes to capsys."""
    return sft.main([str(argument) for argument in arguments])


def set_up(config: dict[str, Any]) -> sft.Run:
    """The parts of a run, without training."""
    checked = from_dict(TrainConfig, config, "test")
    params = checked.trainer.params
    return sft.set_up(checked, open_device(params.accelerator, params.precision), None)


def item(samples: Samples, i: int) -> dict[str, list[int]]:
    """Sample i as transformers' models take it: `input_ids` and `labels`."""
    ids, mask = samples.sample(i)
    labels = [int(token) if target else IGNORE for token, target in zip(ids, mask)]
    return {"input_ids": ids.tolist(), "labels": labels}


def process(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, str(ROOT / "sft.py"), *map(str, arguments)]
    kwargs.setdefault("timeout", 120)
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def imported(*words: Any, code: int) -> set[str]:
    """The modules that the command line imports in a process of its own, which ends with `code`."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "sft.py"), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def copy_project(target: Path) -> Path:
    """What git has or would add, as after cloning; returns `target`."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one on each line."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics_of(run: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the values that differ from machine to machine."""
    lines = lines_of(run / "metrics.jsonl")
    if not timing:
        for line in lines:
            for name in ("tokens_per_second", "seconds", "memory"):
                line.pop(name, None)
    return lines


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def newest(run: Path) -> Path:
    return sorted(run.glob("step-*"))[-1]


def record_saves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the directories that checkpoints are written to from now on, in order."""
    written: list[str] = []
    original = checkpoint.save

    def recording(run: Path, name: str, write: Any) -> Path:
        written.append(name)
        return original(run, name, write)

    monkeypatch.setattr(checkpoint, "save", recording)
    return written
