"""The model: loading, the answer-only loss, optimizer and schedule, export."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import freeze
from config import ModelParams, UserError
from data import IGNORE, Batch
from layers import SdpaGPTNeoAttention, product, speed_up, whole_mask

# Logits of one chunk hold at most so many numbers, whatever the vocabulary (32 MB in float32:
# the largest buffer that device._set_allocator can keep).
LOGITS_PER_CHUNK = 2**23
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


# ----------------------------------------------------------------------------------- loading


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or a local directory.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise UserError(f"{_place(name)}: no tokenizer could be loaded: {_reason(error)}") from None


def load_model(
    name: str, *, from_scratch: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model in `dtype`, with the fastest attention there is for it.

    Args:
        name: hub id or local directory.
        from_scratch: a directory without weights is initialised at random from `seed`; weights
            that are there are used all the same.

    Returns:
        The model and remarks for the user, such as that its weights are random.

    Raises:
        UserError: nothing there, no weights without `from_scratch`, not a causal LM.
    """
    path = Path(name)
    if from_scratch and not path.is_dir():
        raise UserError(
            f"model_name: {name}: from_scratch is for a local model directory without weights; "
            "set it to false to use the weights of a hub model"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"model_name: {name}: a file; allowed: a model directory or a hub id")
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"model_name: {name}: the directory has no config.json")
    has_weights = any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES)
    if path.is_dir() and not has_weights and not from_scratch:
        raise UserError(
            f"model_name: {name}: found a config but no weights; set from_scratch: true "
            "(model_params.from_scratch, in a test test_params.from_scratch) to initialise them "
            "at random, or name a directory with a model.safetensors"
        )
    remarks = []
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # GPT-Neo has no SDPA of its own and gets ours below; others take transformers' choice.
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
        if config.model_type == "gpt_neo":
            options["attn_implementation"] = "eager"
        if from_scratch and not has_weights:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **options)
            remarks.append(f"weights initialised at random from seed {seed} (from_scratch)")
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
            stored = getattr(config, "dtype", None)
            if isinstance(stored, torch.dtype) and stored != dtype:
                remarks.append(f"stored in {_name(stored)}, loaded as {_name(dtype)}")
    except Exception as error:
        raise UserError(f"{_place(name)}: cannot be loaded: {_reason(error)}") from None
    speed_up(model)
    return model, remarks


def _place(name: str) -> str:
    absent = " (not a local directory, as a run's is once it has trained; so taken as a hub id)"
    return f"model_name: {name}" + ("" if Path(name).exists() else absent)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def context_length(model: PreTrainedModel) -> int | None:
    """How many positions the model knows; None for a model without a limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_fits(model: PreTrainedModel, tokenizer: Any, length: int, key: str) -> None:
    """Raise a UserError if sequences of `length` or the tokenizer's ids are beyond the model."""
    context = context_length(model)
    if context is not None and length > context:
        raise UserError(f"{key}: found {length}; allowed: at most {context}, the model's context")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"embeddings for {rows}; they do not belong together"
        )


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


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass instead of keeping its activations."""
    # The first name is that of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # transformers makes the embeddings' output need a gradient, for reentrant checkpointing. It
    # would send the backward pass through frozen blocks for nothing.
    model.disable_input_require_grads()


# -------------------------------------------------------------------------------------- loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, as it was before outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class AnswerModel(nn.Module):
    """A causal LM as a function from a batch to its summed answer loss.

    The output head is run on target positions only. transformers' models compute
    `head(backbone(x))`, some with a final scaling or soft cap; `__init__` runs both ways on a few
    tokens, and a model that does anything else gets the plain, slower path (`self.split` false).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.prefix_cache: freeze.PrefixCache | None = None
        text = model.config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        accepted = inspect.signature(model.forward).parameters
        # ALiBi models and OPT find positions from the mask; recurrent models have another cache.
        self.takes_positions = "position_ids" in accepted
        self.takes_cache = "past_key_values" in accepted
        # transformers looks at values to see which mask it needs; XLA must not wait for them.
        self.makes_masks = False
        self.attentions = [m for m in model.modules() if isinstance(m, SdpaGPTNeoAttention)]
        self.split = self._splits()
        # Whether this model takes batches without padding, see data.Batch.
        self.packs = self.split and self._packs()

    @torch.no_grad()
    def _packs(self) -> bool:
        """Whether samples in one row are to each other as if they were not there."""
        text = self.model.config.get_text_config()
        # A window, or attention in chunks, would act on the row and not on the sample.
        windows = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", 0)
        if windows or not self.takes_positions:
            return False
        device = next(self.model.parameters()).device
        ids = torch.arange(8, device=device)[None] % text.vocab_size
        lengths = [3, 5]
        try:
            with evaluating(self.model):
                packed = self._backbone(ids, lengths)[0]
                alone = [self._backbone(part)[0] for part in ids.split(lengths, dim=1)]
                return torch.allclose(packed, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-3)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False

    @torch.no_grad()
    def _splits(self) -> bool:
        if not isinstance(self.model.get_output_embeddings(), nn.Linear):
            return False
        device = next(self.model.parameters()).device
        ids = torch.arange(4, device=device)[None] % self.model.config.get_text_config().vocab_size
        try:
            with evaluating(self.model):
                whole = self.model(ids, use_cache=False).logits
                parts = self._head(self._backbone(ids)[0])
                return torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-3)
        except (AttributeError, RuntimeError, TypeError):
            return False

    def _backbone(self, input_ids: Tensor, lengths: list[int] | None = None, **kwargs: Any) -> Any:
        for attention in self.attentions:
            attention.lengths = lengths
        if lengths is not None:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            kwargs["position_ids"] = positions.to(input_ids.device)
            # A mask of four dimensions is passed on as it is, and our attention needs none.
            kwargs["attention_mask"] = input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
            if not self.attentions:
                kwargs["lengths"] = lengths  # passed on to _packed_sdpa
        elif self.makes_masks:
            kwargs["attention_mask"] = whole_mask(input_ids, kwargs.get("attention_mask"))
        return self.model.base_model(input_ids, use_cache="past_key_values" in kwargs, **kwargs)

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def forward(self, batch: Batch) -> Tensor:
        """Sum over the batch's targets of -log p(target), float scalar."""
        if not self.split:
            logits = self.model(batch.input_ids, use_cache=False).logits.flatten(0, 1)
            chosen = logits.index_select(0, batch.target_positions).float()
            return F.cross_entropy(chosen, batch.target_ids, ignore_index=IGNORE, reduction="sum")
        if self.prefix_cache is not None:
            self.prefix_cache.current = batch.prefix
        try:
            hidden = self._backbone(batch.input_ids, batch.lengths)[0].flatten(0, 1)
        finally:
            if self.prefix_cache is not None:
                self.prefix_cache.current = None
        hidden = hidden.index_select(0, batch.target_positions)
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if not torch.is_grad_enabled():  # a Function would not know and compute gradients
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return _ChunkedLoss.apply(hidden, batch.target_ids, weight, bias, self.softcap)

    @torch.no_grad()
    def target_losses(self, batch: Batch) -> Tensor:
        """-log p of each target, float [M]; what `forward` sums."""
        rows = max(1, LOGITS_PER_CHUNK // self._vocabulary())
        if self.split:
            hidden = self._backbone(batch.input_ids)[0].flatten(0, 1)
            chunks = hidden.index_select(0, batch.target_positions).split(rows)
            logits = (self._head(chunk) for chunk in chunks)
        else:
            whole = self.model(batch.input_ids, use_cache=False).logits.flatten(0, 1)
            logits = iter(whole.index_select(0, batch.target_positions).split(rows))
        losses = [
            F.cross_entropy(scores.float(), ids, ignore_index=IGNORE, reduction="none")
            for scores, ids in zip(logits, batch.target_ids.split(rows))
        ]
        return torch.cat(losses)

    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def next_logits(self, input_ids: Tensor, last: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Logits [B, V] of the token after position `last` [B] of each row, and the cache."""
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if not self.split:
            kwargs["use_cache"] = "past_key_values" in kwargs
            output = self.model(input_ids, **kwargs)
            return output.logits[rows, last].float(), getattr(output, "past_key_values", None)
        output = self._backbone(input_ids, **kwargs)
        return self._head(output[0][rows, last]).float(), getattr(output, "past_key_values", None)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy through the output head, in chunks of positions.

    The gradient of a chunk is taken while its logits are there, so that neither logits nor their
    gradient ever exist for more than one chunk. softmax(logits) - onehot(target) is written over
    the logits themselves, and the head's gradient grows in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target_ids: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """hidden [M, C], target_ids [M], weight [V, C], bias [V]; the summed loss, a scalar."""
        need_hidden, _, need_weight, need_bias, _ = ctx.needs_input_grad
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.zeros_like(hidden) if need_hidden else None
        weight_grad: Tensor | None = None
        bias_grad = torch.zeros_like(bias) if need_bias and bias is not None else None
        rows = max(1, LOGITS_PER_CHUNK // len(weight))
        for start in range(0, len(hidden), rows):
            h, ids = hidden[start : start + rows], target_ids[start : start + rows]
            logits = product(h, weight, bias)
            dtype = logits.dtype  # autocast's, if it is on
            scores = logits.to(exact)  # the same memory when there is nothing to convert
            if softcap:
                scores = scores.div_(softcap).tanh_()
                slope = 1 - scores.square()
                scores = scores * softcap
            valid = (ids != IGNORE)[:, None]
            ids = ids[:, None].where(valid, 0)
            # In place, as a second tensor of this size is not in the processor's cache any more.
            scores -= scores.amax(-1, keepdim=True)
            chosen = scores.gather(-1, ids)
            total = scores.exp_().sum(-1, keepdim=True)
            loss += ((total.log() - chosen) * valid).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            scores *= valid / total
            scores.scatter_add_(-1, ids, -valid.to(exact))
            if softcap:
                scores *= slope
            if bias_grad is not None:
                bias_grad += scores.sum(0)
            scores = scores.to(dtype)
            if hidden_grad is not None:
                hidden_grad[start : start + rows] = product(scores, weight.T.to(dtype))
            if need_weight:
                h = h.to(dtype)
                if weight_grad is None:
                    weight_grad = product(scores.T, h.T).to(weight.dtype)
                elif weight_grad.dtype == dtype:
                    weight_grad.addmm_(scores.T, h)
                else:
                    weight_grad += scores.T @ h
        if need_weight and weight_grad is None:  # a batch without targets
            weight_grad = torch.zeros_like(weight)
        ctx.grads = (hidden_grad, None, weight_grad, bias_grad, None)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # so that autograd may add others to them in place
        return tuple(None if g is None else g.mul_(outputs[0]) for g in grads)


# --------------------------------------------------------------------- optimizer and schedule


def make_optimizer(
    model: PreTrainedModel, params: ModelParams, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on neither biases nor norms.

    One kernel for all parameters where there is one (`fused`); on XLA, the step's number is kept
    on the device (`capturable`), so that the update is part of the graph.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, kind, parameter in freeze.classify(model):
        if parameter.requires_grad:
            no_decay = kind == "ln" or name.endswith("bias") or parameter.ndim < 2
            (plain if no_decay else decayed).append(parameter)
    xla = any(p.device.type == "xla" for p in (*decayed, *plain))
    groups = [
        {"params": decayed, "weight_decay": params.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=params.learning_rate,
        betas=(params.adam_betas[0], params.adam_betas[1]),
        fused=fused and not xla,
        capturable=xla,
    )


def warmup_steps(value: float, total_steps: int) -> int:
    """`warmup_steps_per_cent` in steps: below 1 a share of all steps, from 1 on a percentage."""
    share = value if value < 1 else value / 100
    return min(total_steps, math.ceil(share * total_steps))


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0): linear up over `warmup` steps, then linear to 0.

    No step has a rate of 0, which would change nothing: the first has peak / warmup, the last
    peak / (total - warmup).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0.0, (total - step) / max(1, total - warmup))


# ------------------------------------------------------------------------------------ export


def export(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: Any,
    directory: str | os.PathLike[str],
) -> None:
    """Write a directory that `from_pretrained` opens: safetensors, config and tokenizer."""
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def quiet_libraries() -> None:
    """Keep transformers' own remarks off the console; what matters of them we say ourselves."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parameters_in(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
