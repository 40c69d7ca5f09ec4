"""Several ranks are one run: same weights, every sample once, checkpoints that fit any number."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sft
from conftest import cli, metrics_of, newest, rows, train_config, weights_of, write_yaml


def _work(rank: int, count: int, port: int, output: Path, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    handle = (output / f"rank-{rank}.txt").open("w")
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    sys.stdout = sys.stderr = handle
    torch.manual_seed(0)
    code = sft.main(arguments)
    handle.flush()
    os._exit(code)


def run_ranks(count: int, output: Path, *arguments: Any) -> list[str]:
    """The command line on `count` real processes joined by gloo; what each of them printed.

    Forked from this process, which has torch loaded already; torchrun itself is in the slow tests.
    """
    output.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    words = [str(argument) for argument in arguments]
    processes = [
        context.Process(target=_work, args=(rank, count, port, output, words))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    printed = [(output / f"rank-{rank}.txt").read_text() for rank in range(count)]
    assert codes == [0] * count, (codes, printed)
    return printed


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """21 and 7 samples: the last step of an epoch and the last round of validation are short."""
    path = tmp_path / "uneven.json"
    splits = {"train": rows(21), "val": rows(7, offset=40), "test": rows(7, offset=60)}
    path.write_text(json.dumps(splits))
    return path


def config_for(model: Path, data: Path, run: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"trainer__params__precision": "64", "data__batch_size": 8}
    return write_yaml(
        run.with_suffix(".yaml"), train_config(model, data, run, **(settings | changes))
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["gpt_neo", "qwen2"])  # both with a tied output head
def test_one_process_and_several_ranks_train_the_same_weights(
    model_dirs: dict[str, Path], uneven: Path, tmp_path: Path, kind: str, strategy: str
) -> None:
    alone = tmp_path / "alone"
    generating = {
        "model_params__do_compute_metrics": True,
        "model_params__val_generate_params": {"max_new_tokens": 4},
    }
    model = model_dirs[kind]
    assert cli("train", config_for(model, uneven, alone, **generating)) == 0
    expected = weights_of(newest(alone))
    for count, size in ((2, 4), (4, 2)):
        run = tmp_path / f"ranks-{count}"
        config = config_for(
            model,
            uneven,
            run,
            **generating,
            data__batch_size=size,
            trainer__params__strategy=strategy,
        )
        printed = run_ranks(count, tmp_path / "output", "train", config)
        assert printed[1:] == [""] * (count - 1)
        assert f"{size} samples x 1 batches x {count} ranks = 8 samples" in printed[0]
        found = weights_of(newest(run))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(metrics_of(run), metrics_of(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)
