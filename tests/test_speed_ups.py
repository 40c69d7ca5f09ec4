"""What makes training faster or smaller must not change what is learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import freeze
import zoo
from config import UserError
from conftest import (
    KINDS,
    metrics_of,
    tiny_config,
    train,
    train_config,
)
from data import epoch_order
from extras.frozen_prefix import PrefixCache
from model import load_model, load_tokenizer
from test_resume import assert_same_run, stop_after

LOWER_HALF = {
    "model_params__do_freeze": True,
    **{f"model_params__freeze_{kind}": True for kind in ("emb", "ln", "attn", "ff", "other")},
    "model_params__layers_not_to_freeze": [-1],
}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", [*KINDS, "openai-gpt"])
def test_the_frozen_prefix_cache_changes_no_loss(
    kind: str, where: str, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    """Whatever a block returns: a tensor, a tuple, or a list (openai-gpt)."""
    model = model_dirs.get(kind, tmp_path / "model")
    if kind not in model_dirs:
        tokenizer = load_tokenizer(str(model_dirs["gpt2"]))
        zoo.build(kind, len(tokenizer)).save_pretrained(model)
        tokenizer.save_pretrained(model)
    changes = LOWER_HALF | {"trainer__params__max_epochs": 3}
    plain = train_config(model, data_file, tmp_path / "plain", **changes)
    changes["model_params__cache_frozen_prefix"] = where
    cached = train_config(model, data_file, tmp_path / "cached", **changes)
    assert train(plain) == 0
    assert train(cached) == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert not [p for p in (tmp_path / "cached").iterdir() if "prefix" in p.name]


def test_the_prefix_really_does_not_run_again(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    calls = [0]
    original = GPT2Block.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += self.training
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Block, "forward", counting)
    monkeypatch.setattr("run.check_trainable", lambda model: None)
    counts = []
    for where in (None, "memory"):
        calls[0] = 0
        config = train_config(
            model_dirs["gpt2"],
            data_file,
            tmp_path / str(where),
            **LOWER_HALF,
            model_params__cache_frozen_prefix=where,
        )
        assert train(config) == 0
        counts.append(calls[0])
    # 12 steps x 3 blocks; cached: 12 x 1 block, and 2 probes x 3 blocks to find the depth.
    assert counts == [36, 12 + 2 * 3]


def test_a_resumed_run_with_a_prefix_cache_is_bitwise_the_same(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    changes = LOWER_HALF | {"model_params__cache_frozen_prefix": "memory"}
    whole = train_config(model_dirs["gpt_neo"], data_file, tmp_path / "whole", **changes)
    parts = train_config(model_dirs["gpt_neo"], data_file, tmp_path / "parts", **changes)
    assert train(whole) == 0
    with monkeypatch.context() as patched:
        stop_after(8, patched)
        assert train(parts) == 143
    assert train(parts, "trainer.ckpt_path=last") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_depth_is_how_far_nothing_trains(
    model_dirs: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    from config import ModelParams

    probe = torch.arange(8)[None]
    flags = {f"freeze_{kind}": True for kind in freeze.KINDS}
    for open_block, depth in ((-1, 3), (2, 2), (1, 1)):
        model, _ = load_model(str(model_dirs["gpt_neo"]))
        params = ModelParams(do_freeze=True, layers_not_to_freeze=[open_block], **flags)
        freeze.apply(model, params)
        assert PrefixCache(model, model.base_model, probe).depth == depth
    model, _ = load_model(str(model_dirs["gpt_neo"]))
    with pytest.raises(UserError, match="depends on something that trains"):
        PrefixCache(model, model.base_model, probe)
    # Dropout in front: the same input gives other outputs each time.
    model = AutoModelForCausalLM.from_config(tiny_config("gpt_neo", 100, dropout=0.1))
    freeze.apply(model, ModelParams(do_freeze=True, layers_not_to_freeze=[-1], **flags))
    with pytest.raises(UserError, match="or on dropout"):
        PrefixCache(model, model.base_model, probe)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_nothing(
    kind: str, frozen: bool, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    for name, value in (("plain", False), ("checkpointed", True)):
        changes = (LOWER_HALF | {"model_params__cache_frozen_prefix": "memory"}) if frozen else {}
        config = train_config(
            model_dirs[kind],
            data_file,
            tmp_path / name,
            trainer__params__gradient_checkpointing=value,
            trainer__params__precision="64",
            **changes,
        )
        assert train(config) == 0
    same = pytest.approx(losses(tmp_path / "plain"), rel=1e-10)
    assert losses(tmp_path / "checkpointed") == same


def test_gradient_checkpointing_recomputes(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from extras.speed import FusedGatedMLP

    calls = [0]
    original = FusedGatedMLP.forward

    def counting(self: Any, x: Any) -> Any:
        calls[0] += self.training and torch.is_grad_enabled()  # not while it is tried
        return original(self, x)

    monkeypatch.setattr(FusedGatedMLP, "forward", counting)
    monkeypatch.setattr("run.check_trainable", lambda model: None)
    config = train_config(
        model_dirs["llama"],
        data_file,
        tmp_path / "run",
        trainer__params__gradient_checkpointing=True,
    )
    assert train(config) == 0
    assert calls[0] == 2 * 12 * 3


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    for name, value in (("plain", False), ("compiled", True)):
        config = train_config(
            model_dirs["gpt_neo"],
            data_file,
            tmp_path / name,
            trainer__params__compile=value,
            model_params__learning_rate=1e-4,  # at a larger one rounding grows from step to step
        )
        assert train(config) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_grouping_by_length_saves_padding_and_keeps_the_order_of_steps_random() -> None:
    import numpy as np

    lengths = np.random.default_rng(0).gamma(6, 30, 7100).astype(int) + 20
    order = epoch_order(7100, 8, seed=1, epoch=0, lengths=lengths)
    steps = lengths[order[: 7100 // 8 * 8]].reshape(-1, 8)
    padding = 1 - steps.sum() / (steps.max(1) * 8).sum()
    assert padding < 0.1
    plain = lengths[epoch_order(7100, 8, seed=1, epoch=0)[:7096]].reshape(-1, 8)
    assert 1 - plain.sum() / (plain.max(1) * 8).sum() > 0.25
    means = steps.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # neighbours
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1  # no drift
