"""Adapters: low-rank updates of frozen projections (LoRA), in the files of the PEFT library.

          ┌────────── W [out, in], frozen ──────────┐
    x ────┤                                         + ──── y
          └─ dropout ── A [r, in] ── B [out, r] ─ · s ┘

    y = W x + s B A x,  s = alpha / r

Hu et al. 2021, arXiv:2106.09685. B begins as zero, so the first step starts from the model's own
loss; W never gets a gradient, and the optimizer keeps its state for A and B alone. A projection
stays the module that it was, under its own name: its class gets `LoRA` in front, and A and B are
`lora_A` and `lora_B` inside it, which is what PEFT calls them.

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
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import freeze
from config import Adapter, ModelParams, UserError, did_you_mean, first_line
from extras.speed import FastLinear, adapter_of, linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
ALL_LINEAR = "all-linear"
SHOWN = 4  # names in a message
# Keys of adapter_config.json. The file of weights itself says which modules have an adapter, so
# those that select modules need not be understood. Of the others, only these values are.
USED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path"}
OF_NO_EFFECT = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "fan_in_fan_out", "inference_mode", "task_type"),
    *("auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
}
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "revision": (None, "main"),
    # Other ways to begin (PiSSA, OLoRA, LoftQ, ...) change the base's weights as well.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


class LoRA(nn.Module):
    """What stands in front of a projection's own class: its output, and the adapter's update."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: nn.Dropout
    lora_scale: float
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        adapter = adapter_of(self)
        if adapter[0] is not None:  # the same in fewer passes over x and y
            return linear(x, self.weight, self.bias, adapter=adapter)
        low = self.lora_A(self.lora_dropout(x)) * self.lora_scale
        return super().forward(x) + self.lora_B(low)


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"LoRA{kind.__name__}", (LoRA, kind), {})


def _add(module: nn.Linear | Conv1D, config: dict[str, Any]) -> None:
    """Make a projection one with an adapter, of weights that are still to be filled in."""
    r, weight = config["r"], module.weight
    size_out, size_in = weight.T.shape if isinstance(module, Conv1D) else weight.shape
    module.__class__ = _adapted(type(module))  # type: ignore[arg-type]
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


def check_continued(model: PreTrainedModel, config: dict[str, Any], params: ModelParams) -> None:
    """Raise a UserError if an adapter that is trained on is not as the configuration says."""
    if params.do_freeze or params.layers_not_to_freeze:
        raise UserError(
            "model_params: found do_freeze or layers_not_to_freeze, but model_name is an adapter: "
            "what it holds is trained, and nothing else"
        )
    if (wanted := params.adapter) is None:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, LoRA)]
    there = (config["r"], config["lora_alpha"], config["lora_dropout"], sorted(names))
    now = (wanted.r, wanted.alpha, wanted.dropout, sorted(targets(model, wanted.target_modules)))
    if there != now:
        raise UserError(
            f"model_params.adapter: found {wanted}, but model_name is an adapter of "
            f"r={there[0]} alpha={there[1]} dropout={there[2]} on {len(names)} projections; remove "
            "the section to train it on, or `python sft.py export` it and begin a new one on that"
        )


def describe(model: nn.Module, config: dict[str, Any]) -> str:
    """One line for people."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoRA)]
    short = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    sizes = f"r {config['r']}, alpha {config['lora_alpha']}"
    return f"adapter: {sizes}, on {len(names)} projections ({short})"


def saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, and so what a checkpoint holds: adapters, and blocks that train whole."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------- files


def read_config(directory: Path) -> dict[str, Any] | None:
    """adapter_config.json of a directory; None if it holds no adapter.

    Raises:
        UserError: it is none that is understood here, down to every key.
    """
    path = directory / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.setdefault("use_rslora", False)
        config.setdefault("lora_dropout", 0.0)
        base, r, alpha = (config[key] for key in ("base_model_name_or_path", "r", "lora_alpha"))
        right = isinstance(base, str) and isinstance(r, int) and isinstance(alpha, (int, float))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not right:
        raise UserError(f"{path}: found base_model_name_or_path {base!r}, r {r!r}, alpha {alpha!r}")
    foreign = [
        f"{key}: {value!r}"
        for key, value in config.items()
        if (key in ALLOWED and value not in ALLOWED[key])
        or (value and key not in {*USED, *OF_NO_EFFECT, *ALLOWED})
    ]
    if foreign:
        raise UserError(
            f"{path}: found {', '.join(foreign)}, which is not supported; allowed: plain LoRA and "
            "rsLoRA adapters (peft itself can merge others: `merge_and_unload`)"
        )
    return config


def base_of(
    place: Path | str, base: Path | str | None = None
) -> tuple[Path | str, dict[str, Any] | None]:
    """What to open first, and the adapter to put onto it; `base` replaces the one that it names."""
    config = read_config(Path(place))
    if config is None:
        return place, None
    base = base or config["base_model_name_or_path"]
    return base, config | {"base_model_name_or_path": str(base)}


def load(model: PreTrainedModel, directory: Path, config: dict[str, Any]) -> None:
    """Put a directory's adapters onto their base; what the file holds then trains, nothing else.

    Args:
        config: what `read_config` gave.

    Raises:
        UserError: the file is not there, or not of this model.
    """
    path = directory / WEIGHTS
    try:
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(path).items()}
    except Exception as error:  # safetensors raises its own
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    model.requires_grad_(False)
    known = projections(model)
    for name in tensors:
        module = known.get(name.removesuffix(".lora_A.weight"))
        if module is not None:
            _add(module, config)
    own = dict(model.named_parameters(remove_duplicate=False))
    shared = Counter(own.values())  # by identity
    wrong = [f"{n} is missing" for n, p in own.items() if p.requires_grad and n not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            wrong.append(f"{name}: the model has no such parameter")
        elif own[name].shape != tensor.shape:
            wrong.append(f"{name}: found {list(tensor.shape)}, not {list(own[name].shape)}")
        elif not bool(tensor.isfinite().all()):
            wrong.append(f"{name}: holds numbers that are not finite")
        elif shared[own[name]] > 1:  # PEFT trains a copy and leaves the other as it is
            wrong.append(f"{name}: tied to another parameter of the model")
        else:
            own[name].data.copy_(tensor)
            own[name].requires_grad_(True)
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        lines = "\n".join(f"  {line}" for line in [*wrong[:SHOWN], *more])
        raise UserError(f"{path}: not an adapter of {model.name_or_path}:\n{lines}")


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
