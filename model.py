"""The model: loading, the answer-only loss, optimizer and schedule, export."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

import checkpoint
import freeze
import lora
from config import CHAT, DEFAULT_TEMPLATE, ModelParams, UserError, first_line
from data import IGNORE, Batch, Encoder
from extras import adapters, model_files, probe
from extras.speed import (
    ChunkedLoss,
    SdpaGPTNeoAttention,
    is_plain,
    packed_mask,
    speed_up,
    whole_mask,
)

if TYPE_CHECKING:
    from extras.frozen_prefix import PrefixCache

# Logits of one chunk hold at most this many numbers, whatever the vocabulary (32 MB in float32:
# the largest buffer that speed.set_allocator can keep).
LOGITS_PER_CHUNK = 2**23
# What configs call a soft cap on the logits.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


# ----------------------------------------------------------------------------------- opening


@dataclass
class Opened:
    """A model that is ready to be trained, tested or asked, and what belongs to it.

    place: the directory or hub id that it comes from. base: the model under an adapter that lies
    there, else `place` itself. adapter: adapter_config.json; None for a whole model. files: its
    tokenizer's, by their names. details: what its sft.json says, if it is ours. remarks: for the
    user.
    """

    place: Path | str
    base: Path | str
    adapter: dict[str, Any] | None
    model: AnswerModel
    tokenizer: Any
    files: dict[str, bytes]
    details: dict[str, Any]
    remarks: list[str]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base's weights."""
        config = model_files.file_of(str(self.base), "config.json")
        return adapters.fingerprint(config.parent if config else Path(self.base))

    @property
    def template(self) -> str | None:
        """The prompt template that it was trained with, if it is ours."""
        return self.details.get("prompt_template")

    def encoder(self, template: str | None, conversations: bool) -> Encoder:
        """The encoder for a template, or for the one that the model was trained with.

        Without either it is `chat` for data that are conversations, else DEFAULT_TEMPLATE. From now
        on the model's answers end with what ends them in it.
        """
        template = template or self.template
        if template == CHAT or (template is None and conversations):
            from extras.chat_template import ChatEncoder

            encoder: Encoder = ChatEncoder(self.tokenizer)
        else:
            encoder = Encoder(self.tokenizer, template or DEFAULT_TEMPLATE)
        if template is None and not conversations and self.tokenizer.chat_template:
            self.remarks.append(
                "the tokenizer's chat template is not used for questions with one answer; "
                "data.prompt_template: chat would use it"
            )
        self.model.end_ids = list(dict.fromkeys([*encoder.end_ids, *self.model.end_ids]))
        return encoder


def open_model(
    place: Path | str,
    *,
    base: Path | str | None = None,
    warn: Callable[[str], None] | None = None,
    from_scratch: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Opened:
    """Open a hub id, a model directory, an adapter or a checkpoint, see `checkpoint.find_model`.

    Args:
        base: stands in for the one that an adapter names. warn: is told if it is not the one that
            the adapter was trained on.
        from_scratch: a directory without weights is initialised at random from `seed`; weights
            that are there are used all the same.

    Raises:
        UserError: there is none, it cannot be read, or it is not what it says it is.
    """
    _quiet_libraries()
    directory = Path(place)
    base, adapter = lora.base_of(place, base)
    # Adapters that others wrote may lie without a tokenizer.
    has_own = not adapter or any(
        (directory / file).exists() for file in model_files.TOKENIZER_FILES
    )
    name = str(place if has_own else base)
    tokenizer = load_tokenizer(name)
    fresh = from_scratch and not adapter  # an adapter means nothing on random weights
    loaded, remarks = load_model(str(base), from_scratch=fresh, dtype=dtype, seed=seed)
    if adapter and (directory / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(directory)
    model, files = AnswerModel(loaded), model_files.tokenizer_files(name, tokenizer)
    details = checkpoint.details(directory)
    opened = Opened(place, base, adapter, model, tokenizer, files, details, remarks)
    if adapter:
        lora.load(loaded, directory, adapter)
        remarks.append(adapters.describe(opened))
        adapters.check_base(opened, warn or remarks.append)
    return opened


def _configured_ends(model: PreTrainedModel) -> list[int]:
    """The ids that the model's generation_config.json ends texts with."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or a local directory.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    model_files.refuse_pointers(Path(name), *model_files.TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise UserError(
            f"{model_files.place_of(name)}: no tokenizer could be loaded: {first_line(error)}"
        ) from None


def load_model(
    name: str, *, from_scratch: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, list[str]]:
    """A causal language model in `dtype`, with the fastest attention there is for it.

    Args:
        name: hub id or local directory.
        from_scratch, seed: see `open_model`.

    Returns:
        The model and remarks for the user, such as that its weights are random.

    Raises:
        UserError: nothing there, no weights without `from_scratch`, not a causal LM, or weights
            that are not those of this model or not finite numbers.
    """
    path = Path(name)
    has_weights = model_files.check_place(name, from_scratch)
    remarks = []
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{model_files.place_of(name)}: cannot be loaded: {first_line(error)}"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model_name: {name}: {config.model_type} is an encoder-decoder model; allowed: causal "
            "language models, in which one stack of blocks reads and writes"
        )
    # GPT-Neo has no SDPA of its own and gets ours below; others take transformers' choice.
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if config.model_type == "gpt_neo":
        options["attn_implementation"] = "eager"
    if dtype == torch.float64:  # the fast kernel of experts has no float64
        options["experts_implementation"] = "eager"
    from extras.model_checks import check_loaded

    try:
        if from_scratch and not has_weights:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **options)
            remarks.append(f"weights initialised at random from seed {seed} (from_scratch)")
        else:
            model, found = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            weights = [
                p for pattern in model_files.WEIGHT_FILES for p in sorted(path.glob(pattern))
            ]
            file = str(weights[0]) if len(weights) == 1 else model_files.place_of(name)
            remarks += check_loaded(file, model, found)
            stored = getattr(config, "dtype", None)
            if isinstance(stored, torch.dtype) and stored != dtype:
                remarks.append(f"stored in {dtype_name(stored)}, loaded as {dtype_name(dtype)}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{model_files.place_of(name)}: cannot be loaded: {first_line(error)}"
        ) from None
    if model_files.file_of(name, "generation_config.json") is None:
        # transformers then makes one from config.json, whose default EOS may be any token.
        model.generation_config.eos_token_id = None
    _own_memory(model)
    speed_up(model)
    return model, remarks


def _own_memory(model: PreTrainedModel) -> None:
    """Put every parameter and buffer where the allocator would put a new one.

    safetensors leaves them at the file's own offsets. Kernels choose their code by how memory is
    aligned, and then differ in the last bit from a run that never was stopped.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        UserError: transformers cannot do it with this model.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"trainer.params.gradient_checkpointing: found true; {model.config.model_type} cannot "
            "do it (says transformers); set it to false and lower data.batch_size"
        )
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

    What the model can do is tried out when it is opened, with random weights (extras/probe.py).
    Where a trial fails, the plain, slower path is taken.

    Attributes:
        split: the output head may be run on target positions only. transformers' models compute
            `head(backbone(x))`, some with a final scaling (`factor`) or soft cap.
        can_pack: the model takes batches without padding, see data.Batch.
        pads_left: padding in front of a row changes nothing, if mask and positions say so.
        cache: how it remembers while it generates. "slots": the keys and values of rows of
            different lengths stand in one plain cache. "groups" or "single": by transformers' own
            `generate`, several rows of equal length at a time or one. "none": not at all, since
            `generate` gives other tokens than the model itself, or there is no cache.
        end_ids: what ends an answer, as the template and generation_config.json say.
        makes_masks: a whole mask of ours stands for the model's own, see XlaDevice.
        tolerance: how near outputs must be in a trial, relative to the largest; 0: the trial cannot
            tell a fault from rounding, so nothing is trusted.

    Raises:
        UserError: the model cannot read text, or is not causal.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # Llama 4's prefix is that of its multimodal form, so there the base is the model itself.
        base = model.base_model
        self.backbone: nn.Module = getattr(model, "model", base) if base is model else base
        self.prefix_cache: PrefixCache | None = None
        text = model.config.get_text_config()
        caps = (getattr(text, name, None) for name in SOFT_CAPS)
        self.softcap: float | None = next(filter(None, caps), None)
        self.factor = 1.0
        # GPT-Neo's windows are those of our own attention, which knows where a sample begins.
        ours = any(isinstance(module, SdpaGPTNeoAttention) for module in model.modules())
        self.sees_everything = ours or probe.sees_everything(text)
        # ALiBi models and OPT find positions from the mask.
        self.takes_positions = probe.argument(model, "position_ids") is not None
        # The name of the KV cache is that of transformers 5.24; before, it was the second one.
        self.cache_name = probe.argument(model, "cache", "past_key_values")
        self.makes_masks = False
        self.end_ids = _configured_ends(model)
        self.split = self.can_pack = self.pads_left = False
        with torch.no_grad(), evaluating(model), probe.random_weights(model):
            reach = probe.check_causal(self)
            # `reach` is how far another token moves the outputs, as a fault would. A tenth of it is
            # allowed, unless that is as small as rounding.
            self.tolerance = reach / 10 if reach / 10 > probe.ROUNDING else 0.0
            self.tolerance = min(self.tolerance, probe.TOLERANCE)
            factor = probe.logit_factor(self)
            if factor is not None:
                self.split, self.factor = True, factor
            self.can_pack = self.split and probe.succeeds(probe.can_pack, self)
            self.pads_left = probe.succeeds(probe.pads_left, self)
            slots = self.pads_left and probe.succeeds(probe.takes_slots, self)
            self.cache = "slots" if slots else probe.own_cache(self)

    def _call(
        self, module: nn.Module, input_ids: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run the model or its backbone, with a cache of keys and values if there is one."""
        if cache is not None and self.cache_name is not None:
            kwargs[self.cache_name] = cache
        return module(input_ids, use_cache=cache is not None, **kwargs)

    def logits(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        """The model's own forward pass: [B, T] -> [B, T, V]."""
        return self._call(self.model, input_ids, cache, kwargs).logits

    def hidden_states(
        self, input_ids: Tensor, lengths: list[int] | None = None, cache: Any = None, **kwargs: Any
    ) -> Tensor:
        """What the output head gets, [B, T, C]; lengths: of the samples in a packed row."""
        if lengths is not None:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            kwargs["position_ids"] = positions.to(input_ids.device)
            kwargs["attention_mask"] = packed_mask(lengths, input_ids.device)
        elif self.makes_masks:
            kwargs["attention_mask"] = whole_mask(input_ids, kwargs.get("attention_mask"))
        return self._call(self.backbone, input_ids, cache, kwargs)[0]

    def head_is_plain(self) -> bool:
        return is_plain(self.model.get_output_embeddings())

    def head(self, hidden: Tensor, factor: float | None = None) -> Tensor:
        """[..., C] -> logits [..., V], with the scaling and the soft cap of the model."""
        factor = self.factor if factor is None else factor
        logits = self.model.get_output_embeddings()(hidden)
        if factor != 1.0:
            logits = logits * factor
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def forward(self, batch: Batch) -> Tensor:
        """Sum over the batch's targets of -log p(target), float scalar."""
        if not self.split:
            logits = self.logits(batch.input_ids).flatten(0, 1)
            chosen = logits.index_select(0, batch.target_positions)
            return _cross_entropy(chosen, batch.target_ids)
        if self.prefix_cache is not None:
            self.prefix_cache.current = batch.prefix
        try:
            hidden = self.hidden_states(batch.input_ids, batch.lengths).flatten(0, 1)
        finally:
            if self.prefix_cache is not None:
                self.prefix_cache.current = None
        hidden = hidden.index_select(0, batch.target_positions)
        if not self.head_is_plain():  # the same chunks, through the module
            return self._loss_by_chunks(hidden, batch.target_ids)
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        scaling = (self.factor, self.softcap)
        return ChunkedLoss.apply(hidden, batch.target_ids, weight, bias, scaling, self._chunk())

    def _loss_by_chunks(self, hidden: Tensor, target_ids: Tensor) -> Tensor:
        """The same loss for any head; a chunk's logits are computed again in the backward pass."""

        def loss_of(chunk: Tensor, ids: Tensor) -> Tensor:
            return _cross_entropy(self.head(chunk), ids)

        rows = self._chunk()
        parts = zip(hidden.split(rows), target_ids.split(rows))
        losses = [recompute(loss_of, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def target_losses(self, batch: Batch) -> Tensor:
        """-log p of each target, float [M]; what `forward` sums."""
        rows = self._chunk()
        if self.split:
            hidden = self.hidden_states(batch.input_ids).flatten(0, 1)
            chunks = hidden.index_select(0, batch.target_positions).split(rows)
            logits = (self.head(chunk) for chunk in chunks)
        else:
            whole = self.logits(batch.input_ids).flatten(0, 1)
            logits = iter(whole.index_select(0, batch.target_positions).split(rows))
        losses = [
            _cross_entropy(scores, ids, reduction="none")
            for scores, ids in zip(logits, batch.target_ids.split(rows))
        ]
        return torch.cat(losses)

    def _chunk(self) -> int:
        """How many positions' logits are computed together."""
        return max(1, LOGITS_PER_CHUNK // self.model.get_input_embeddings().num_embeddings)

    def next_logits(
        self,
        input_ids: Tensor,
        last: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, V] of the token after position `last` [B] of each row of input_ids [B, T].

        cache: what transformers calls a Cache; it takes up the keys and values of these tokens.
        """
        rows = torch.arange(len(input_ids), device=input_ids.device)
        kwargs: dict[str, Any] = {}
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if position_ids is not None and self.takes_positions:
            kwargs["position_ids"] = position_ids
        if self.split:
            hidden = self.hidden_states(input_ids, None, cache, **kwargs)
            return self.head(hidden[rows, last]).float()
        return self.logits(input_ids, cache, **kwargs)[rows, last].float()


def _cross_entropy(logits: Tensor, target_ids: Tensor, reduction: str = "sum") -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, target_ids, ignore_index=IGNORE, reduction=reduction)


# --------------------------------------------------------------------- optimizer and schedule


def make_optimizer(model: PreTrainedModel, params: ModelParams) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, or what else the configuration names.

    No weight decay on biases, norms and other vectors.

    One kernel for all parameters (`fused`), but on XLA, the step's number is kept
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
    groups = [group for group in groups if group["params"]]
    if params.optimizer != "adamw":
        from extras.quantize import small_optimizer

        return small_optimizer(params, groups)
    return torch.optim.AdamW(
        groups,
        lr=params.learning_rate,
        betas=(params.adam_betas[0], params.adam_betas[1]),
        fused=not xla,
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


def state_to_save(opened: Opened) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which FSDP may keep in slices: the model, or its adapter."""
    model = opened.model.model
    return dict(lora.saved(model)) if opened.adapter else model.state_dict(keep_vars=True)


def export(
    opened: Opened, weights: dict[str, Tensor], directory: Path, chat_template: str | None = None
) -> None:
    """Write a directory that `from_pretrained` opens: safetensors, config and tokenizer.

    With an adapter, only the adapter is written, in PEFT's format.

    Args:
        weights: what `state_to_save` names, as whole tensors.
        chat_template: instead of the tokenizer's own; see `Encoder.as_chat_template`.
    """
    model = opened.model.model
    # transformers refuses to write generation settings that many published models have, so these
    # are written apart. What the answers were trained to end with comes first.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        if opened.adapter:
            lora.save(model, weights, opened.adapter, directory)
        else:
            model.save_pretrained(directory, state_dict=weights)
    finally:
        model.generation_config = own
    generation, ends = copy.deepcopy(own), opened.model.end_ids
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.to_json_file(directory / "generation_config.json", use_diff=True)
    for name, content in opened.files.items():
        (directory / name).write_bytes(content)
    if not opened.files:  # one that needs none, such as a tokenizer of bytes
        opened.tokenizer.save_pretrained(directory)
    if chat_template is not None:
        model_files.write_chat_template(directory, chat_template)


def _quiet_libraries() -> None:
    """Keep transformers' own remarks off the console; what matters of them we say ourselves."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parameters_in(parameters: Iterable[Tensor]) -> int:
    return sum(map(freeze.size, parameters))
