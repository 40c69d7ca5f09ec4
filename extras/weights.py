"""Whether a model's files are what they should be: fetched whole, and of this very model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from config import UserError

# Masks, positions and rotations that older versions of transformers stored with the weights.
# And the scales of an 8-bit cache.
NOT_WEIGHTS = re.compile(
    r"(inv_freq|(cos|sin)_cached|(masked|attn\.|attention\.)_?bias|causal_mask|position_ids"
    r"|[kv]_scale)$"
)
SHOWN_KEYS = 4
LFS_POINTER = b"version https://git-lfs"


def refuse_lfs_pointer(file: Path) -> None:
    """Raise a UserError for what Git LFS leaves where it has not fetched the real file."""
    try:
        with file.open("rb") as handle:
            start = handle.read(len(LFS_POINTER))
    except OSError:
        return  # whoever reads it says why
    if start == LFS_POINTER:
        raise UserError(
            f"{file}: a Git LFS pointer, a few lines in place of the file itself; "
            "`git lfs install && git lfs pull` in its repository fetches the file"
        )


def check_loaded(file: str, model: PreTrainedModel, found: dict[str, Any]) -> list[str]:
    """Refuse weights that are not those of the model; remarks on ones that it has no use for.

    Args:
        file: where they come from, for messages.
        found: what `from_pretrained` reports with `output_loading_info`. Tied parameters that the
            file holds once are not in it.
    """
    place = f"{file}: not the weights of this model"
    missing = sorted(found["missing_keys"])
    unexpected = sorted(k for k in found["unexpected_keys"] if not NOT_WEIGHTS.search(k))
    mismatched = sorted(found["mismatched_keys"], key=str)
    if mismatched:
        lines = [f"{key}: found {list(a)}; config.json wants {list(b)}" for key, a, b in mismatched]
        raise UserError(f"{place}: {_parameters(len(lines))} of another shape\n{_some(lines)}")
    if missing:
        other = ""
        if unexpected:
            other = f"\n  found {_parameters(len(unexpected))} that it has no place for:"
            other += f"\n{_some(unexpected)}"
            wrapper = unexpected[0].removesuffix(missing[0])
            if wrapper and all(key.startswith(wrapper) for key in unexpected):
                other += f"\n  every name begins with {wrapper!r}, as torch.compile and DDP write"
                other += " it; save the model that is inside of them"
        raise UserError(f"{place}: missing {_parameters(len(missing))}\n{_some(missing)}{other}")
    # A head for another task may be left over; another block, or a bias that a module lacks, means
    # that config.json is about another model.
    owners = {key.rpartition(".")[0] for key, _ in model.named_parameters()}
    stacks = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    base = f"{model.base_model_prefix}."
    for key in unexpected:
        parts = key.split(".")
        inside = [".".join(parts[:i]) for i in range(1, len(parts))]
        if {f"{base}{inside[-1]}", inside[-1]} & owners or any(
            {f"{base}{name}", name} & stacks for name in inside
        ):
            raise UserError(
                f"{place}: found {_parameters(len(unexpected))} that it has no place for, some in "
                "its own blocks: config.json has other sizes (num_hidden_layers, say), or the file "
                f"holds an adapter or layers for multi-token prediction\n{_some(unexpected)}"
            )
    for key, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{file}: damaged: of the {tensor.numel():,} numbers of {key} {bad:,} are "
                "not finite; fetch the model again, or go back to a checkpoint from before"
            )
    remarks = []
    if unexpected:
        shown = ", ".join(unexpected[:SHOWN_KEYS])
        shown += ", ..." if len(unexpected) > SHOWN_KEYS else ""
        count = _parameters(len(unexpected))
        remarks.append(f"not used: {count} that a causal LM has no place for ({shown})")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and getattr(head, "weight", table.weight) is not table.weight:
        remarks.append(
            "the file has an output head of its own, so it is not tied, whatever config.json says"
        )
    return remarks


def _parameters(count: int) -> str:
    return "1 parameter" if count == 1 else f"{count:,} parameters"


def _some(lines: list[str]) -> str:
    more = [f"... and {len(lines) - SHOWN_KEYS} more"] if len(lines) > SHOWN_KEYS else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN_KEYS], *more])
