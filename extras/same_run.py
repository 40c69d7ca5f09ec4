"""Whether a checkpoint can go on with the configuration, the model and the data of a run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from config import TrainConfig, UserError, resolved, walk


def architecture(name: str) -> str:
    """SHA-256 over what in a model's config decides the meaning of its weights.

    Paths, versions and how it is run are left out, so a directory may move or be converted.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    kept = {
        key: value
        for key, value in config.items()
        if key in ("model_type", "vocab_size", "activation_function", "hidden_act")
        or re.search(r"size|hidden|layers|heads|num_|n_embd|n_layer|n_head|tie_|rope|window", key)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def check_same_run(
    state: dict[str, Any], config: TrainConfig, identity: dict[str, Any], path: Path
) -> list[str]:
    """Compare a checkpoint with the configuration that wants to go on from it.

    Args:
        identity: fingerprints and sizes that must not have changed, by a name for messages.

    Returns:
        One remark for each key that differs and may: the configuration's value is used.

    Raises:
        UserError: naming everything that differs and would change what the state means.
    """
    stored, current = flatten(state["config"]), flatten(resolved(config))
    wrong = [
        f"{name}: the checkpoint has {state['identity'].get(name)}, this run has {value}"
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    remarks = []
    for path_of_key, field in walk(TrainConfig):
        extra = field.json_schema_extra
        before, now = stored.get(path_of_key), current.get(path_of_key)
        if before == now or path_of_key in ("trainer.ckpt_path", "wandb.api"):
            continue
        if isinstance(extra, dict) and extra.get("resume") == "free":
            remarks.append(f"{path_of_key}: was {before}, goes on with {now}")
        else:
            wrong.append(f"{path_of_key}: the checkpoint has {before}, the configuration {now}")
    if wrong:
        raise UserError(
            f"{path}: cannot be resumed with this configuration:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\n  put these back, or start a new run in another trainer.checkpoint.dirpath"
        )
    return remarks


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary of full paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
