"""The two YAML schemas. Every rule about a configuration key stands here, once.

    config = load(TrainConfig, "configs/trainer.yaml", ["trainer.params.max_epochs=1"])

A file is checked as a whole: `load` collects every problem (unknown keys, wrong types, values out
of range, contradictions) and raises one `UserError` that lists them with the key's full path, what
was found, what is allowed and the nearest known name. Nothing here imports torch, so that
`--help` and a wrong configuration answer at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.fields import FieldInfo


class UserError(Exception):
    """Something that the user can put right. `sft.py` prints it alone and exits with code 2."""


def first_line(error: Exception) -> str:
    """What an error says, for a message of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


DEFAULT_TEMPLATE = "Question: {question} \nAnswer:"
CHAT = "chat"  # the prompt template that is the tokenizer's own

# Two keys were misspelt from the start. A file may use any spelling. Messages and stored settings
# use the first, which is what earlier versions stored; Python uses the second, the correct one.
TRUNCATE_PROMPT = ("truncate_promt", "truncate_prompt")
LOG_OBJ = ("log_obg", "log_obj", "log_objective")

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}

# The values that can select `best`, and which way is better.
VAL_LOSS_METRICS = {"val_loss": "min"}
VAL_TEXT_METRICS = {
    "val_bleu": "max",
    "val_rouge1": "max",
    "val_rouge2": "max",
    "val_rougeL": "max",
    "val_exact_match": "max",
    "val_token_f1": "max",
}

# --------------------------------------------------------------------------------- kinds of values


def _template(value: str) -> str:
    if value != CHAT and value.count("{question}") != 1:
        raise ValueError("Input should be 'chat' or a text that holds {question} exactly once")
    return value


def _fraction_or_steps(value: int | float) -> int | float:
    if not 0 < value <= (1 if isinstance(value, float) else LARGEST):
        raise ValueError(
            "Input should be a float in (0, 1] (share of an epoch) or an integer >= 1 (steps)"
        )
    return value


def _batches_or_share(value: int | float) -> int | float:
    if not 0 <= value <= (1 if isinstance(value, float) else LARGEST):
        raise ValueError(
            "Input should be an integer >= 0 (batches) or a float in [0, 1] (share of the data)"
        )
    return value


# Whole numbers fit into 32 bits: a larger one is a slip, and would fail somewhere deep inside.
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[Count], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
CountOrMinusOne = Annotated[int, Field(ge=-1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(gt=0, le=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, or a name on the hub
Template = Annotated[str, AfterValidator(_template)]
Precision = Annotated[
    Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"],
    BeforeValidator(lambda value: PRECISIONS.get(str(value), value)),
]


def key(
    default: Any,
    meaning: str,
    *,
    resume: Literal["fixed", "free"] = "fixed",
    spellings: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """One configuration key; the default `...` makes it required.

    `resume` says what happens when a checkpoint was written with another value: `fixed` is an
    error (it would change what the stored state means), `free` means that the config wins and the
    change is named.
    """
    if spellings:
        more |= {
            "validation_alias": AliasChoices(*spellings),
            "serialization_alias": spellings[0],
        }
    return Field(default, description=meaning, json_schema_extra={"resume": resume}, **more)


def free(default: Any, meaning: str, **rest: Any) -> Any:
    """A key that a resumed run may change."""
    return key(default, meaning, resume="free", **rest)


def section(model: type[BaseModel]) -> Any:
    """A part of the file that may be left out."""
    return Field(default_factory=model)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        str_min_length=1,
        protected_namespaces=(),
    )


class WandbArgs(Section):
    group: str | None = free(None, "groups runs in W&B")
    job_type: str | None = free(None, "W&B job type")
    name: str | None = free(None, "name of the run")
    project_name: str = free("sft", "W&B project")


class Wandb(Section):
    api: str | None = free(
        None, "API key; null: `WANDB_API_KEY`, and without that offline. Never stored"
    )
    args: WandbArgs = section(WandbArgs)


class GenerateParams(Section):
    do_sample: bool = free(False, "sample instead of taking the likeliest token")
    max_new_tokens: PositiveInt = free(64, "at most this many tokens an answer")
    min_new_tokens: Count = free(0, "no EOS before this many tokens")
    no_repeat_ngram_size: Count = free(
        0, "no n-gram of this size twice in prompt + answer; 0 = off"
    )
    repetition_penalty: Positive = free(1.0, "above 1 discourages repeats")
    temperature: Positive = free(1.0, "divides the logits when sampling")
    top_k: Count = free(50, "sample among the k likeliest; 0 = all")
    top_p: Probability = free(1.0, "sample within this probability mass")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = free(
        None, "sample tokens at least this likely relative to the likeliest"
    )
    typical_p: Probability = free(1.0, "locally typical sampling")
    epsilon_cutoff: Share = free(0.0, "sample tokens at least this likely")
    eta_cutoff: Share = free(0.0, "entropy-dependent form of epsilon_cutoff")
    bad_words_ids: list[TokenIds] | None = free(None, "token sequences never to generate")
    suppress_tokens: list[Count] | None = free(None, "token ids never to generate")
    begin_suppress_tokens: list[Count] | None = free(None, "token ids not to begin an answer with")
    eos_token_id: Count | TokenIds | None = free(
        None, "what ends an answer; null: the tokenizer's EOS and what generation_config.json names"
    )


class Data(Section):
    """What training and test data have in common."""

    data_dir: str = free(
        ..., "the data: a file, a directory of them, or `hub:ORG/NAME`; see README"
    )
    question_key: str | None = free(
        None, "name of the column with the question, where the columns are not recognised"
    )
    answer_key: str | None = free(
        None, "name of the column with the answer, where the columns are not recognised"
    )
    system: str | None = free(None, "a system message put in front of conversations that have none")
    truncate_prompt: bool = key(
        True,
        "of what is too long, drop the oldest turns, then shorten the question",
        spellings=TRUNCATE_PROMPT,
    )


class TrainData(Data):
    batch_size: PositiveInt = free(8, "samples per micro-batch and rank")
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = key(
        512, "tokens per sample, prompt and answer"
    )
    on_tpu: bool = free(
        False, "static shapes: every batch padded to `max_length`; implied by `tpu`"
    )
    prompt_template: Template | None = key(
        None,
        "`chat`, the tokenizer's chat template, or a text that holds `{question}` once; null: "
        "`chat` for conversations, for pairs `Question: {question} \\nAnswer:`",
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = key(
        0.05, "share of `train` held out when the data has no `val` split"
    )
    group_by_length: bool = key(True, "batches of samples of like lengths")


class Adapter(Section):
    r: PositiveInt = key(16, "rank: beside each projection stand A [r, in] and B [out, r]")
    alpha: PositiveInt = key(32, "what an adapter adds is scaled by alpha / r")
    dropout: Share = key(0.0, "on what goes into an adapter, while it trains")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = key(
        "all-linear", "names of projections, such as `[q_proj, v_proj]`, or `all-linear`"
    )
    quantize: Literal["nf4", "int8"] | None = key(
        None, "keeps the frozen base in 4 or 8 bits while it trains, by bitsandbytes"
    )


class ModelParams(Section):
    adapter: Adapter | None = Field(None, description="no section: the model itself is trained")
    adam_betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = key(
        [0.9, 0.999], "AdamW's betas"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = key(
        "adamw", "the others keep less; those in 8 bits by bitsandbytes, paged ones on GPUs only"
    )
    do_compute_metrics: bool = free(
        False, "also generate answers at each validation and score them"
    )
    learning_rate: Positive = key(5e-5, "peak of the schedule")
    use_cache: bool = free(True, "the model's KV cache while generating")
    warmup_steps_per_cent: Annotated[float, Field(ge=0, le=100)] = key(
        0.03, "linear warm-up: below 1 a share of all steps, from 1 to 100 a percentage"
    )
    weight_decay: NotNegative = key(0.01, "not on biases and norms")
    do_freeze: bool = key(False, "turns the `freeze_*` keys on")
    freeze_emb: bool = key(False, "token and position embeddings stay fixed")
    freeze_ln: bool = key(False, "every norm stays fixed, the final one included")
    freeze_attn: bool = key(
        False, "attention stays fixed, and the recurrent mixer that a block has in its place"
    )
    freeze_ff: bool = key(False, "feed-forward, experts and routers stay fixed")
    freeze_other: bool = key(False, "everything else stays fixed")
    layers_not_to_freeze: list[Annotated[int, Field(ge=-LARGEST, le=LARGEST)]] = key(
        [], "indices of blocks that stay trainable; negative counts from the top"
    )
    cache_frozen_prefix: Literal["memory", "disk"] | None = free(
        None, "run frozen lowest blocks once for all epochs and keep their outputs there"
    )
    from_scratch: bool = free(False, "initialise at random a model directory that has no weights")
    val_generate_samples: PositiveInt = free(
        64, "validation samples to answer when `do_compute_metrics`"
    )
    val_generate_params: GenerateParams = section(GenerateParams)

    @property
    def quantize(self) -> str | None:
        return self.adapter.quantize if self.adapter else None


class Checkpoint(Section):
    dirpath: Place = free(..., "directory of the run")
    every_n_train_steps: PositiveInt = free(500, "optimizer steps between checkpoints")
    log_obj: str = free("val_loss", "metric that selects `best`", spellings=LOG_OBJ)
    mode: Literal["min", "max"] = free("min", "whether less or more of it is better")
    save_top_k: PositiveInt = free(2, "newest resumable checkpoints to keep")


class TrainerParams(Section):
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = free(
        "auto", "where to run; naming an absent one is an error"
    )
    accumulate_grad_batches: PositiveInt = free(1, "batches per step")
    gradient_clip_val: NotNegative | None = key(
        1.0, "largest global L2 norm of the gradient; null or 0 = off"
    )
    log_every_n_steps: PositiveInt = free(10, "optimizer steps between log points")
    max_epochs: CountOrMinusOne = free(3, "passes over the data; -1 = until `max_steps`")
    max_steps: PositiveInt | None = free(None, "stop after this many optimizer steps")
    num_sanity_val_steps: CountOrMinusOne = free(
        2, "validation batches before training; -1 = all, 0 = none"
    )
    overfit_batches: Annotated[int | float, AfterValidator(_batches_or_share)] = key(
        0, "train and validate on the same few batches (int) or share (float); 0 = off"
    )
    precision: Precision = key("32-true", "`32`, `16-mixed`, `bf16-mixed`, `bf16-true`, `64`")
    val_check_interval: Annotated[int | float, AfterValidator(_fraction_or_steps)] = free(
        1.0, "validate: float = share of an epoch, int = every that many steps"
    )
    strategy: Literal["ddp", "fsdp"] = free(
        "ddp", "with several ranks: `ddp` keeps a whole model on each, `fsdp` a slice of it"
    )
    compile: bool = free(False, "`torch.compile` the model")
    gradient_checkpointing: bool = free(
        False, "recompute blocks in the backward pass: less memory, a third slower"
    )
    max_bad_steps: PositiveInt = free(10, "stop after this many non-finite steps in a row")


class Trainer(Section):
    checkpoint: Checkpoint
    ckpt_path: Place | None = free(None, "checkpoint to resume from, or `last`, or null")
    params: TrainerParams = section(TrainerParams)


class TrainConfig(Section):
    data: TrainData
    model_name: Place = free(..., "hub id or local directory")
    model_params: ModelParams = section(ModelParams)
    seed: Seed = key(42, "all randomness")
    trainer: Trainer
    wandb: Wandb | None = Field(None, description="no section: W&B is off")

    def contradictions(self) -> Iterator[str]:
        produced = dict(VAL_LOSS_METRICS)
        if self.model_params.do_compute_metrics:
            produced |= VAL_TEXT_METRICS
        metric, mode = self.trainer.checkpoint.log_obj, self.trainer.checkpoint.mode
        where = "trainer.checkpoint"
        if metric not in produced:
            hint = (
                " (set model_params.do_compute_metrics: true to get it)"
                if metric in VAL_TEXT_METRICS
                else did_you_mean(metric, produced)
            )
            yield (
                f"{where}.log_obg: found {metric!r}, which this run does not produce{hint}; "
                f"allowed: {', '.join(produced)}"
            )
        elif mode != produced[metric]:
            yield f"{where}.mode: found {mode!r}; allowed: {produced[metric]!r}, for {metric}"
        flags = ("freeze_emb", "freeze_ln", "freeze_attn", "freeze_ff", "freeze_other")
        if self.model_params.do_freeze and not any(getattr(self.model_params, f) for f in flags):
            yield f"model_params.do_freeze: found true, but none of {', '.join(flags)} is true"
        if self.model_params.adapter is not None:
            yield from _adapter_contradictions(self.model_params, flags)
        model, params = self.model_params, self.trainer.params
        if model.optimizer in ("adafactor", "sgd") and not _is_default(model, "adam_betas"):
            yield f"model_params.adam_betas: found, but optimizer: {model.optimizer} has none"
        if params.max_epochs == -1 and params.max_steps is None:
            yield "trainer.params.max_epochs: found -1 (endless), but max_steps is not set"
        if params.strategy == "fsdp":
            for name, on in (
                ("model_params.adapter.quantize", model.quantize),
                ("model_params.optimizer", model.optimizer not in ("adamw", "sgd")),
                ("model_params.cache_frozen_prefix", self.model_params.cache_frozen_prefix),
                ("trainer.params.compile", params.compile),
            ):
                if on:
                    yield f"{name}: does not go together with trainer.params.strategy: fsdp"
        if params.max_epochs == 0:
            yield "trainer.params.max_epochs: found 0; allowed: an integer >= 1, or -1"
        yield from _generation_contradictions(
            "model_params.val_generate_params", self.model_params.val_generate_params
        )


def _adapter_contradictions(params: ModelParams, flags: tuple[str, ...]) -> Iterator[str]:
    where = "model_params.adapter"
    trained = [flag for flag in flags if not getattr(params, flag)]
    if params.do_freeze and trained:
        yield (
            f"{where}: found together with do_freeze: true and {', '.join(trained)}: false, but "
            "beside an adapter all of the model is frozen except layers_not_to_freeze, which acts "
            "by itself; set do_freeze to false"
        )
    if params.from_scratch:
        yield f"{where}: found together with from_scratch: true; an adapter needs a trained model"


class TestData(Data):
    max_prompt_length: PositiveInt = key(256, "tokens per prompt")
    padding: bool = key(
        False, "true: batches padded to `max_prompt_length`; false: to their longest prompt"
    )
    padding_side: Literal["left", "right"] = key(
        "left", "changes no answer; a model that left padding would affect is padded on the right"
    )
    split: str = key("test", "which split to answer")
    prompt_template: Template | None = key(
        None,
        "null: the checkpoint's own, else as in training; another than trained is an error",
    )


class TestParams(Section):
    batch_size: PositiveInt = key(16, "prompts at a time; changes speed, never an answer")
    do_compute_metrics: bool = key(True, "BLEU and ROUGE as well")
    log_file: Place = key(..., "the answers, one JSON object a line")
    from_scratch: bool = key(
        False, "a model directory without weights is initialised from `seed`: a baseline"
    )
    save_steps: PositiveInt = key(
        200, "answers between two writes to the disk; a stop waits for the started ones"
    )
    test_model_path: Place | list[Place | None] | None = key(
        None,
        "run, checkpoint or model directory to test; null: `model_name`; a list compares them",
    )
    use_cache: bool = key(True, "the model's KV cache")


class TestConfig(Section):
    cuda: bool = key(False, "use a CUDA GPU; an error when there is none")
    tpu: bool = key(False, "use a TPU through torch_xla; an error when there is none")
    data: TestData
    generate_params: GenerateParams = section(GenerateParams)
    model_name: Place = key(..., "hub id or local directory")
    seed: Seed = key(42, "all randomness")
    test_params: TestParams
    wandb: Wandb | None = Field(None, description="no section: W&B is off")

    def contradictions(self) -> Iterator[str]:
        yield from _generation_contradictions("generate_params", self.generate_params)
        paths = self.test_params.test_model_path
        if self.cuda and self.tpu:
            yield "tpu: found true, and so is cuda; allowed: one of them"
        if isinstance(paths, list) and len(paths) < 2:
            yield "test_params.test_model_path: found a list of less than two; nothing to compare"


def _generation_contradictions(where: str, params: GenerateParams) -> Iterator[str]:
    sampling = {"temperature", "top_k", "top_p", "min_p", "typical_p"}
    sampling |= {"epsilon_cutoff", "eta_cutoff"}
    if params.min_new_tokens > params.max_new_tokens:
        yield (
            f"{where}.min_new_tokens: found {params.min_new_tokens}, "
            f"more than max_new_tokens ({params.max_new_tokens})"
        )
    named = {n for n in sampling & params.model_fields_set if not _is_default(params, n)}
    if named and not params.do_sample:
        yield (
            f"{where}.do_sample: found false, but {', '.join(sorted(named))} would only act "
            "with do_sample: true"
        )


def _is_default(model: BaseModel, name: str) -> bool:
    return bool(getattr(model, name) == type(model).model_fields[name].default)


Config = TypeVar("Config", TrainConfig, TestConfig)


def load(schema: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and check a YAML file.

    Args:
        schema: `TrainConfig` or `TestConfig`.
        path: the YAML file.
        overrides: `a.b=value` strings from the command line; the value is YAML.

    Raises:
        UserError: with every problem of the file and the overrides in one message.
    """
    from extras.strict_yaml import read

    raw = read(Path(path))
    problems: list[str] = []
    for override in overrides or []:
        apply_override(raw, override, problems)
    return _validate(schema, raw, str(path), problems)


def from_dict(schema: type[Config], raw: dict[str, Any], name: str) -> Config:
    """Check a configuration that is already a dictionary; `name` stands for it in messages."""
    return _validate(schema, raw, name, [])


def _validate(schema: type[Config], raw: dict[str, Any], name: str, problems: list[str]) -> Config:
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        from extras.config_errors import describe

        problems += describe(schema, raw, error)
    else:
        problems += config.contradictions()
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{name}: {count}\n" + "\n".join(f"  {p}" for p in problems))
    return config


def apply_override(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    """Put `a.b=value` into a file's content, or say in `problems` what is wrong with it."""
    from extras.strict_yaml import is_text, parse

    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")) or not is_text(override):
        # Only its beginning is shown: a misplaced word may be the W&B key.
        shown = repr(override if len(override) <= 12 else override[:12] + "...")
        problems.append(f"{shown} on the command line: an override is written key.path=value")
        return
    try:
        value = parse(text)
    except yaml.YAMLError:
        problems.append(f"{path}: the value on the command line is not valid YAML")
        return
    *parents, leaf = path.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    for other in spellings(leaf):  # an override replaces the key however the file spells it
        node.pop(other, None)
    node[leaf] = value


def spellings(name: str) -> tuple[str, ...]:
    """All names of a key that has several, or nothing."""
    return next((names for names in (TRUNCATE_PROMPT, LOG_OBJ) if name in names), ())


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a schema as (full path, field), in the order of the file."""
    for name, field in schema.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.serialization_alias or name}", field


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def did_you_mean(name: str, known: Any) -> str:
    """The nearest of the known names, for a message; nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def resolved(config: BaseModel) -> dict[str, Any]:
    """The whole configuration with every default filled in and without secrets."""
    values = config.model_dump(by_alias=True)
    if values.get("wandb"):
        values["wandb"].pop("api", None)
    return values


def to_yaml(config: BaseModel) -> str:
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
