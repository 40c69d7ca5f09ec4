"""Whether a model is what it should be for this data.

Its files fetched whole, its weights those of this very model, its context and its vocabulary large
enough for the texts, and no loss of its own beside that of the answers.
"""

from __future__ import annotations

import re
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
        raise UserError(f"{place}: {_parameters(len(lines))} of another shape\n{some_lines(lines)}")
    if missing:
        other = ""
        if unexpected:
            other = f"\n  found {_parameters(len(unexpected))} that it has no place for:"
            other += f"\n{some_lines(unexpected)}"
            wrapper = unexpected[0].removesuffix(missing[0])
            if wrapper and all(key.startswith(wrapper) for key in unexpected):
                other += f"\n  every name begins with {wrapper!r}, as torch.compile and DDP write"
                other += " it; save the model that is inside of them"
        raise UserError(
            f"{place}: missing {_parameters(len(missing))}\n{some_lines(missing)}{other}"
        )
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
                f"holds an adapter or layers for multi-token prediction\n{some_lines(unexpected)}"
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


def some_lines(lines: list[str]) -> str:
    more = [f"... and {len(lines) - SHOWN_KEYS} more"] if len(lines) > SHOWN_KEYS else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN_KEYS], *more])


def context_length(model: PreTrainedModel) -> int | None:
    """How many positions the model knows; None for a model without a limit."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet writes -1
        return None
    # Beyond its window Doge chooses keys among equals by what stands behind the text.
    limit = min(limit, getattr(text, "keep_window_size", limit))
    # RoBERTa and its kin count positions from the row behind that of padding.
    for module in model.modules():
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and module is not model.get_input_embeddings() and module.num_embeddings == limit:
            return limit - module.padding_idx - 1
    return limit


def check_length(model: PreTrainedModel, length: int, key: str) -> None:
    """Raise a UserError if sequences of `length` tokens are beyond the model's positions."""
    context = context_length(model)
    if context is not None and length > context:
        raise UserError(f"{key}: found {length}; allowed: at most {context}, the model's context")


def check_ids(model: PreTrainedModel, tokenizer: Any, largest: int, where: str) -> list[str]:
    """Raise a UserError for a token id that the model has no embedding for.

    Args:
        largest: the largest id that data and template really give.

    Returns:
        A remark if the tokenizer has such ids, but no text here gives one.
    """
    rows = model.get_input_embeddings().num_embeddings
    name = tokenizer.name_or_path
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{where}: token {token!r} has the id {largest}, and the model has embeddings for "
            f"{rows} ids; the tokenizer of {name} and the model do not belong together"
        )
    if len(tokenizer) > rows:
        return [
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeddings for {rows:,}; no "
            "text here gives one of the others"
        ]
    return []


def refuse_router_loss(name: str, config: Any) -> None:
    """Raise a UserError if the configuration asks for a loss beside that of the answers.

    transformers adds the experts' load-balancing loss as a product of means over all tokens of a
    batch, padding and prompts included. No sum over micro-batches gives it, so with it a step's
    gradient would depend on how the step is split.
    """
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"model_name: {name}: output_router_logits is true in its config.json, which asks for "
            "a load-balancing loss of the experts; it is not added here, because it depends on how "
            "a step is split into batches. Set it to false, in a copy of the model, to train on "
            "the answers alone"
        )
