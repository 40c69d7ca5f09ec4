"""Adapters: low-rank updates of frozen projections (LoRA), in the files of the PEFT library.

          ┌────────── W [out, in], frozen ──────────┐
    x ────┤                                         + ──── y
          └─ dropout ── A [r, in] ── B [out, r] ─ · s ┘

    y = W x + s B A x,  s = alpha / r

Hu et al. 2021, arXiv:2106.09685. B begins as zero, so the first step starts from the model's own
loss; W never gets a gradient and no state in the optimizer. A projection stays the module that it
was, under its own name: its class gets `LoRA` in front, and A and B are `lora_A` and `lora_B`
inside it, which is what PEFT calls them.

    attach    new adapters onto a model
    saved     what trains, and so what a checkpoint holds
    save      these tensors as adapter_model.safetensors, with adapter_config.json
    load      adapters from such files, ours or PEFT's own
    merge     W + s B A, and the adapters are gone
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import freeze
from config import Adapter, UserError, did_you_mean
from extras.speed import FastLinear, adapter_of, linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
ALL_LINEAR = "all-linear"


class LoRA(nn.Module):
    """What stands in front of a projection's own class: its output, and the adapter's update."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: nn.Dropout
    lora_scale: float
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        adapter = adapter_of(self)
        if adapter[0] is not None:  # the same in fewer passes over x and y
            return linear(x, self.weight, self.bias, adapter=adapter)
        low = self.lora_A(self.lora_dropout(x)) * self.lora_scale
        return super().forward(x) + self.lora_B(low)


@functools.cache
def adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoRA{kind.__name__}", (LoRA, kind), {})


def _add(module: nn.Linear | Conv1D, config: dict[str, Any]) -> None:
    """Make a projection one with an adapter, of weights that are still to be filled in."""
    r, weight = config["r"], module.weight
    size_out, size_in = weight.T.shape if isinstance(module, Conv1D) else weight.shape
    module.__class__ = adapted(type(module))  # type: ignore[arg-type]
    module.lora_A = FastLinear(size_in, r, bias=False, dtype=weight.dtype, device=weight.device)
    module.lora_B = FastLinear(r, size_out, bias=False, dtype=weight.dtype, device=weight.device)
    module.lora_dropout = nn.Dropout(config["lora_dropout"])
    module.lora_scale = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)


def projections(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The modules that can have an adapter, by name: all linear maps but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not name.endswith((".lora_A", ".lora_B"))
    }


def _is_called(name: str, wanted: str) -> bool:
    """PEFT's rule: the whole name, or its end behind a dot."""
    return name == wanted or name.endswith(f".{wanted}")


def targets(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """The names of the projections that `target_modules` means, but for what trains anyway.

    Raises:
        UserError: a name that no projection has, or nothing is left.
    """
    known, key = projections(model), "model_params.adapter.target_modules"
    names = list(known) if wanted == ALL_LINEAR else wanted
    for name in names:
        if not any(_is_called(full, name) for full in known):
            short = list(dict.fromkeys(full.rpartition(".")[2] for full in known))
            raise UserError(
                f"{key}: found {name!r}, which no projection of this model is called"
                f"{did_you_mean(name, short)}; known here: {', '.join(short)} (and {ALL_LINEAR})"
            )
    found = [full for full in known if any(_is_called(full, name) for name in names)]
    found = [full for full in found if not known[full].weight.requires_grad]
    if not found:
        raise UserError(
            f"{key}: found {wanted}, and nothing of it is outside of the blocks that train whole "
            "(model_params.layers_not_to_freeze)"
        )
    return found


def attach(model: PreTrainedModel, adapter: Adapter, seed: int) -> dict[str, Any]:
    """Put new adapters onto a model that `freeze.apply` has frozen.

    A is Kaiming-uniform with a = sqrt(5), as every nn.Linear begins, B zero. What was left to train
    belongs to what is saved.

    Returns:
        adapter_config.json, as PEFT, vLLM and llama.cpp read it.

    Raises:
        UserError: see `targets`.
    """
    found = targets(model, adapter.target_modules)
    names = {module: name for name, module in model.named_modules()}
    whole = [p for p in model.parameters() if p.requires_grad]
    blocks = freeze.blocks(model) if whole else []
    whole_blocks = [b for b in blocks if any(p.requires_grad for p in b.parameters())]
    # Short where that means the same modules.
    short = sorted({name.rpartition(".")[2] for name in found})
    selected = [n for n in names.values() if any(_is_called(n, s) for s in short)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": short if selected == found else found,
        "modules_to_save": [names[block] for block in whole_blocks] or None,
        "fan_in_fan_out": any(isinstance(model.get_submodule(n), Conv1D) for n in found),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    generator = torch.Generator().manual_seed(seed)
    for name in found:
        module = model.get_submodule(name)
        _add(module, config)
        nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(module.lora_B.weight)
    return config


def saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, and so what a checkpoint holds: adapters, and blocks that train whole."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------- files


def base_of(
    place: Path | str, base: Path | str | None = None
) -> tuple[Path | str, dict[str, Any] | None]:
    """What to open first: the base of an adapter, and adapter_config.json, or `place` and None.

    Args:
        base: stands in for the one that the adapter names.

    Raises:
        UserError: it is an adapter of a kind that is not supported, or its base is gone.
    """
    from extras.adapters import read_config

    path = Path(place) / CONFIG
    if not path.is_file():
        return place, None
    config = read_config(path, base)
    return config["base_model_name_or_path"], config


def load(model: PreTrainedModel, directory: Path, config: dict[str, Any]) -> None:
    """Put a directory's adapter onto its base; what the files hold then trains, and nothing else.

    Args:
        config: what `base_of` gave.

    Raises:
        UserError: the files are damaged, or those of another model.
    """
    from extras.adapters import check_tensors, read_tensors

    tensors = read_tensors(directory / WEIGHTS)
    model.requires_grad_(False)
    known = projections(model)
    for name in tensors:
        if (projection := name.removesuffix(".lora_A.weight")) in known:
            _add(known[projection], config)
    check_tensors(directory / WEIGHTS, model, tensors)
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        parameter.data.copy_(tensor)
        parameter.requires_grad_(True)


def save(
    model: nn.Module, weights: dict[str, Tensor], config: dict[str, Any], directory: Path
) -> None:
    """Write both files, and read the tensors again.

    Args:
        weights: `saved(model)` as whole tensors, whatever FSDP has made of them.

    Raises:
        UserError: a tensor is not whole, or the file does not give back what was written.
    """
    path = directory / WEIGHTS
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
    shapes = {f"{PREFIX}{name}": p.shape for name, p in saved(model).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=1))
    again = load_file(path)
    if {n: t.shape for n, t in again.items()} != shapes or not all(
        torch.equal(again[name], tensors[name]) for name in shapes
    ):
        raise UserError(f"{path}: the file does not hold the adapter that was to be saved")


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add each adapter's update to its projection's weight, in float32, and take it off."""
    for module in projections(model).values():
        if not isinstance(module, LoRA):
            continue
        weight = module.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        update = module.lora_B.weight.to(exact) @ module.lora_A.weight.to(exact)
        update = update.T if isinstance(module, Conv1D) else update
        weight.copy_(weight.to(exact) + module.lora_scale * update)
        module.__class__ = type(module).__bases__[1]
        del module.lora_A, module.lora_B, module.lora_dropout, module.lora_scale
