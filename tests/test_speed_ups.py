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
from conftest import KINDS, Runner, metrics_of, save, tiny_config
from extras.frozen_prefix import PrefixCache
from model import load_model
from test_resume import TERMINATED, assert_same_run, stop_after

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
    kind: str, where: str, run: Runner, tokenizer: Any, tmp_path: Path
) -> None:
    """Whatever a block returns: a tensor, a tuple, or a list (openai-gpt)."""
    model: Path | str = kind
    if kind not in KINDS:
        model = save(zoo.build(kind, len(tokenizer)), tokenizer, tmp_path / "model")
    changes = LOWER_HALF | {"trainer__params__max_epochs": 3}
    plain = run(model=model, **changes)
    cached = run(model=model, model_params__cache_frozen_prefix=where, **changes)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-6)
    assert not [p for p in cached.iterdir() if "prefix" in p.name]


def test_the_prefix_really_does_not_run_again(run: Runner, monkeypatch: Any) -> None:
    """Its blocks are ruined once their outputs are kept, and training does not notice."""
    original = PrefixCache.fill

    def fill_and_ruin(self: PrefixCache, *args: Any) -> None:
        original(self, *args)
        for block in self.blocks[: self.depth]:
            for parameter in block.parameters():
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(PrefixCache, "fill", fill_and_ruin)
    # Validation runs all blocks, and is therefore off until the end.
    changes = LOWER_HALF | {"trainer__params__num_sanity_val_steps": 0}
    changes |= {"trainer__params__val_check_interval": 100}
    cached = run(model_params__cache_frozen_prefix="memory", **changes)
    assert losses(cached) == pytest.approx(losses(run(**changes)), rel=1e-6)


def test_a_resumed_run_with_a_prefix_cache_is_bitwise_the_same(run: Runner) -> None:
    changes = LOWER_HALF | {"model_params__cache_frozen_prefix": "memory"}
    whole = run(**changes)
    with stop_after(8):
        parts = run(code=TERMINATED, **changes)
    run.resume(parts)
    assert_same_run(whole, parts)


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
def test_gradient_checkpointing_changes_nothing(kind: str, frozen: bool, run: Runner) -> None:
    changes = (LOWER_HALF | {"model_params__cache_frozen_prefix": "memory"}) if frozen else {}
    plain, checkpointed = (
        losses(
            run(
                model=kind,
                trainer__params__gradient_checkpointing=value,
                trainer__params__precision="64",
                **changes,
            )
        )
        for value in (False, True)
    )
    assert checkpointed == pytest.approx(plain, rel=1e-10)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(run: Runner) -> None:
    kept = []
    for value in (False, True):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model="llama", trainer__params__gradient_checkpointing=value)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(run: Runner) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    # At a larger rate rounding grows from step to step.
    plain, compiled = (
        losses(run(trainer__params__compile=value, model_params__learning_rate=1e-4))
        for value in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
