"""Adapters that are opened: whether their files are understood, and belong to their base.

lora.py puts them onto a model; here is what can be wrong with files that came from elsewhere, with
an adapter that is trained on, and with the model below.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import lora
from checkpoint import sha256_of
from config import ModelParams, UserError, first_line
from extras.model_checks import some_lines
from extras.model_files import WEIGHT_FILES

if TYPE_CHECKING:
    from model import Opened

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


def read_config(path: Path, base: Path | str | None) -> dict[str, Any]:
    """The contents of an adapter_config.json; `base` stands in for the base that it names.

    Raises:
        UserError: it says something that is not understood here, or its base is gone.
    """
    try:
        config = {"use_rslora": False, "lora_dropout": 0.0, **json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    kinds: dict[str, Any] = {"base_model_name_or_path": str, "r": int, "lora_alpha": (int, float)}
    wrong = [
        f"{k}: {config.get(k)!r}" for k, t in kinds.items() if not isinstance(config.get(k), t)
    ]
    if wrong:
        raise UserError(
            f"{path}: found {', '.join(wrong)}; a LoRA adapter of PEFT has all of these"
        )
    foreign = [
        f"{key}: {value!r}"
        for key, value in config.items()
        if (key in ALLOWED and value not in ALLOWED[key])
        or (value and key not in {*USED, *OF_NO_EFFECT, *ALLOWED})
    ]
    if foreign:
        raise UserError(
            f"{path}: found {', '.join(foreign)}, which is not supported; allowed: plain LoRA and "
            "rsLoRA. Others can be merged into their base by peft's own `merge_and_unload`"
        )
    own = config["base_model_name_or_path"]
    hub_id = not own.startswith((".", "/")) and own.count("/") < 2
    if base is None and not hub_id and not Path(own).exists():
        raise UserError(
            f"{path}: its base, {own}, is not there; put it back, or write into "
            "base_model_name_or_path where it is now"
        )
    return config | {"base_model_name_or_path": str(base or own)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What an adapter_model.safetensors holds, by the names that the model has for it.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return {name.removeprefix(lora.PREFIX): t for name, t in load_file(path).items()}
    except Exception as error:  # safetensors raises its own
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None


def check_tensors(path: Path, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Raise a UserError if they are not what a model with all its adapters in place has room for.

    A tensor that is tied to another, such as an output head to the embeddings, is refused: PEFT
    trains a copy of it and leaves the other as it was.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(own.values())
    wrong = [
        f"{name}: missing" for name, p in own.items() if p.requires_grad and name not in tensors
    ]
    for name, tensor in tensors.items():
        if name not in own:
            wrong.append(f"{name}: the model has nothing of this name")
        elif own[name].shape != tensor.shape:
            wrong.append(f"{name}: found {list(tensor.shape)}, not {list(own[name].shape)}")
        elif uses[own[name]] > 1:
            wrong.append(f"{name}: tied to another parameter of the model")
        elif not bool(tensor.isfinite().all()):
            wrong.append(f"{name}: holds numbers that are not finite")
    if wrong:
        raise UserError(f"{path}: not an adapter of {model.name_or_path}:\n{some_lines(wrong)}")


def names_of(model: PreTrainedModel) -> list[str]:
    """The projections that have an adapter."""
    return [n for n, module in lora.projections(model).items() if isinstance(module, lora.LoRA)]


def describe(opened: Opened) -> str:
    """One line about an adapter, for people."""
    config, names = opened.adapter or {}, names_of(opened.model.model)
    short = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    sizes = f"r {config['r']}, alpha {config['lora_alpha']}"
    about = f"adapter on {opened.base}: {sizes}, {len(names)} projections ({short})"
    if kind := opened.details.get("quantize"):
        about += (
            f"; it was trained with the base in {kind}, which is whole here unless "
            "model_params.adapter.quantize is set"
        )
    return about


def check_continued(opened: Opened, params: ModelParams) -> None:
    """Raise a UserError if an adapter that is trained on is not as the configuration says."""
    config, wanted, model = opened.adapter or {}, params.adapter, opened.model.model
    if params.do_freeze or params.layers_not_to_freeze:
        raise UserError(
            "model_params: found do_freeze or layers_not_to_freeze, but model_name is an adapter: "
            "what it holds is trained, and nothing else"
        )
    if wanted is None:
        return
    names = sorted(names_of(model))
    there = (config["r"], config["lora_alpha"], config["lora_dropout"], names)
    chosen = sorted(lora.targets(model, wanted.target_modules))
    if there != (wanted.r, wanted.alpha, wanted.dropout, chosen):
        raise UserError(
            f"model_params.adapter: found {wanted}, but model_name is an adapter with r={there[0]} "
            f"alpha={there[1]} dropout={there[2]} on {len(names)} projections; remove the section "
            "to train it on, or `python sft.py export` it and begin another one on the result"
        )


def fingerprint(directory: Path) -> str:
    """SHA-256 over the weights of a base, wherever they lie."""
    kinds = (sorted(directory.glob(pattern)) for pattern in WEIGHT_FILES)
    files = next(filter(None, kinds), [])
    sums = [f"{file.name} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def check_base(opened: Opened, warn: Callable[[str], None]) -> None:
    """Tell `warn` if the base is not the one that one of our adapters was trained on."""
    trained_on = opened.details.get("base_fingerprint")
    if trained_on and trained_on != opened.fingerprint:
        warn(
            f"{opened.base}: its weights have changed since the adapter in {opened.place} was "
            "trained on them"
        )
