"""The two YAML schemas. Every rule about a configuration key stands here, once.

    config = load(TrainConfig, "configs/trainer.yaml", ["trainer.params.max_epochs=1"])

A file is checked as a whole: `load` collects every problem (unknown keys, wrong types, values out
of range, contradictions) and raises one `UserError` that lists them with the key's full path, what
was found, what is allowed and the nearest known name. Nothing here imports torch, so that
`--help` and a wrong configuration answer at once.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo


class UserError(Exception):
    """Something that the user can put right. `sft.py` prints it alone and exits with code 2."""


def first_line(error: Exception) -> str:
    """What an error says, for a message of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


DEFAULT_TEMPLATE = "Question: {question} \nAnswer:"

# The original names are the names; these spellings are understood as well.
ALIASES = {"truncate_prompt": "truncate_promt", "log_obj": "log_obg", "log_objective": "log_obg"}

PRECISIONS = {
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "64": "64-true",
    "bf16-true": "bf16-true",
}

# The values that validation can produce, and which way is better.
VAL_LOSS_METRICS = {"val_loss": "min"}
VAL_TEXT_METRICS = {
    "val_bleu": "max",
    "val_rouge1": "max",
    "val_rouge2": "max",
    "val_rougeL": "max",
    "val_exact_match": "max",
    "val_token_f1": "max",
}

# Every other field of transformers' GenerationConfig, by the reason why it is refused.
_REASONS = {
    "one answer a question is decoded, token by token, greedily or by sampling": (
        "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
        "assistant_lookbehind constraints diversity_penalty dola_layers early_stopping "
        "force_words_ids guidance_scale is_assistant length_penalty low_memory "
        "max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
        "num_beam_groups num_beams num_return_sequences penalty_alpha prompt_lookup_num_tokens "
        "speculation_type target_lookbehind use_mtp"
    ),
    "this change of the logits is not among those that the engine makes": (
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
        "renormalize_logits sequence_bias token_healing top_h watermarking_config"
    ),
    "the engine lays out its cache and compiles as it sees fit; see test_params.use_cache": (
        "cache_config cache_implementation compile_config continuous_batching_config "
        "disable_compile max_cache_len prefill_chunk_size return_legacy_cache"
    ),
    "write test_params.use_cache (or model_params.use_cache)": "use_cache",
    "write max_new_tokens, which does not depend on the prompt": "max_length",
    "write min_new_tokens, which does not depend on the prompt": "min_length",
    "an answer must not depend on the machine's speed": "max_time",
    "answers end at the tokenizer's EOS token; see eos_token_id": "stop_strings",
    "padding is masked by position and needs no token of its own": "pad_token_id",
    "the tokenizer decides it": "bos_token_id",
    "causal models only": (
        "decoder_start_token_id encoder_no_repeat_ngram_size encoder_repetition_penalty"
    ),
    "only texts are written": (
        "output_attentions output_hidden_states output_logits output_scores return_dict_in_generate"
    ),
    "it would hide a broken model": "remove_invalid_values",
}
REFUSED_GENERATE_PARAMS = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}


def _precision(value: Any) -> Any:
    return PRECISIONS.get(str(value), value)


def _template(value: str) -> str:
    if value.count("{question}") != 1:
        raise ValueError("Input should be a text that holds {question} exactly once")
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
CountOrMinusOne = Annotated[int, Field(ge=-1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Annotated[
    Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"],
    BeforeValidator(_precision),
]


def key(default: Any, meaning: str, *, resume: Literal["fixed", "free"] = "fixed") -> Any:
    """One configuration key. `default=...` makes it required.

    `resume` says what happens when a checkpoint was written with another value: `fixed` is an
    error (it would change what the stored state means), `free` means that the config wins and the
    change is named.
    """
    return Field(default, description=meaning, json_schema_extra={"resume": resume})


def free(default: Any, meaning: str) -> Any:
    return key(default, meaning, resume="free")


def section(model: type[BaseModel]) -> Any:
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
    group: str | None = key(None, "groups runs in W&B", resume="free")
    job_type: str | None = key(None, "W&B job type", resume="free")
    name: str | None = key(None, "name of the run", resume="free")
    project_name: str = key("sft", "W&B project", resume="free")


class Wandb(Section):
    api: str | None = key(
        None,
        "API key; null: `WANDB_API_KEY`, and without that offline. Never stored",
        resume="free",
    )
    args: WandbArgs = section(WandbArgs)


class GenerateParams(Section):
    do_sample: bool = free(False, "sample instead of taking the likeliest token")
    max_new_tokens: PositiveInt = free(64, "at most so many tokens an answer")
    min_new_tokens: Count = free(0, "EOS is not allowed before")
    no_repeat_ngram_size: Count = free(
        0, "no n-gram of this size twice in prompt + answer; 0 = off"
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = free(1.0, "above 1 discourages repeats")
    temperature: Annotated[float, Field(gt=0)] = free(1.0, "divides the logits when sampling")
    top_k: Count = free(50, "sample among the k likeliest; 0 = all")
    top_p: Annotated[float, Field(gt=0, le=1)] = free(1.0, "sample within this probability mass")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = free(
        None, "sample tokens at least this likely relative to the likeliest"
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] = free(1.0, "locally typical sampling")
    epsilon_cutoff: Share = free(0.0, "sample tokens at least this likely")
    eta_cutoff: Share = free(0.0, "entropy-dependent form of epsilon_cutoff")
    bad_words_ids: list[Annotated[list[Count], Field(min_length=1)]] | None = free(
        None, "token sequences never to generate"
    )
    suppress_tokens: list[Count] | None = free(None, "token ids never to generate")
    begin_suppress_tokens: list[Count] | None = free(None, "token ids not to begin an answer with")
    eos_token_id: Count | Annotated[list[Count], Field(min_length=1)] | None = free(
        None, "what ends an answer; null: the tokenizer's EOS and what generation_config.json names"
    )


class TrainData(Section):
    batch_size: PositiveInt = key(8, "samples per micro-batch and rank", resume="free")
    data_dir: str = key(
        ..., "the data: a .json, .jsonl or .csv file, or a directory", resume="free"
    )
    question_key: str = key("Question", "name of the column or field with the question")
    answer_key: str = key("Answer", "name of the column or field with the answer")
    max_length: Annotated[int, Field(ge=2, le=LARGEST)] = key(
        512, "tokens per sample, prompt and answer"
    )
    on_tpu: bool = key(
        False, "static shapes: every batch padded to `max_length`; implied by `tpu`", resume="free"
    )
    truncate_promt: bool = key(True, "shorten the question of a sample that is too long")
    prompt_template: Annotated[str, AfterValidator(_template)] = key(
        DEFAULT_TEMPLATE, "the prompt; holds `{question}` once"
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = key(
        0.05, "share of `train` held out when the data has no `val` split"
    )
    group_by_length: bool = key(True, "batches of samples of like lengths")


class ModelParams(Section):
    adam_betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = key(
        [0.9, 0.999], "AdamW's betas"
    )
    do_compute_metrics: bool = key(
        False, "also generate answers at each validation and score them", resume="free"
    )
    learning_rate: Annotated[float, Field(gt=0)] = key(5e-5, "peak of the schedule")
    use_cache: bool = key(True, "the model's KV cache while generating", resume="free")
    warmup_steps_per_cent: Annotated[float, Field(ge=0, le=100)] = key(
        0.03, "linear warm-up: below 1 a share of all steps, from 1 to 100 a percentage"
    )
    weight_decay: Annotated[float, Field(ge=0)] = key(0.01, "AdamW's; not on biases and norms")
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
    val_generate_samples: PositiveInt = key(
        64, "validation samples to answer when `do_compute_metrics`", resume="free"
    )
    val_generate_params: GenerateParams = section(GenerateParams)


class Checkpoint(Section):
    dirpath: str = key(..., "directory of the run", resume="free")
    every_n_train_steps: PositiveInt = key(
        500, "optimizer steps between checkpoints", resume="free"
    )
    log_obg: str = key("val_loss", "metric that selects `best`", resume="free")
    mode: Literal["min", "max"] = key("min", "whether less or more of it is better", resume="free")
    save_top_k: PositiveInt = key(2, "newest resumable checkpoints to keep", resume="free")


class TrainerParams(Section):
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = key(
        "auto", "where to run; naming an absent one is an error", resume="free"
    )
    accumulate_grad_batches: PositiveInt = key(1, "batches per step", resume="free")
    gradient_clip_val: Annotated[float, Field(ge=0)] | None = key(
        1.0, "largest global L2 norm of the gradient; null or 0 = off"
    )
    log_every_n_steps: PositiveInt = key(10, "optimizer steps between log points", resume="free")
    max_epochs: CountOrMinusOne = key(
        3, "passes over the data; -1 = until `max_steps`", resume="free"
    )
    max_steps: PositiveInt | None = key(None, "stop after so many optimizer steps", resume="free")
    num_sanity_val_steps: CountOrMinusOne = key(
        2, "validation batches before training; -1 = all, 0 = none", resume="free"
    )
    overfit_batches: Annotated[int | float, AfterValidator(_batches_or_share)] = key(
        0, "train and validate on the same few batches (int) or share (float); 0 = off"
    )
    precision: Precision = key("32-true", "`32`, `16-mixed`, `bf16-mixed`, `bf16-true`, `64`")
    val_check_interval: Annotated[int | float, AfterValidator(_fraction_or_steps)] = key(
        1.0, "validate: float = share of an epoch, int = every so many steps", resume="free"
    )
    strategy: Literal["ddp", "fsdp"] = key(
        "ddp",
        "with several ranks: `ddp` keeps a whole model on each, `fsdp` a slice of it",
        resume="free",
    )
    compile: bool = key(False, "`torch.compile` the model", resume="free")
    gradient_checkpointing: bool = key(
        False, "recompute blocks in the backward pass: less memory, a third slower", resume="free"
    )
    max_bad_steps: PositiveInt = key(
        10, "stop after so many non-finite steps in a row", resume="free"
    )


class Trainer(Section):
    checkpoint: Checkpoint
    ckpt_path: str | None = key(
        None, "checkpoint to resume from, or `last`, or null", resume="free"
    )
    params: TrainerParams = section(TrainerParams)


class TrainConfig(Section):
    data: TrainData
    model_name: str = key(..., "hub id or local directory", resume="free")
    model_params: ModelParams = section(ModelParams)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(42, "all randomness")
    trainer: Trainer
    wandb: Wandb | None = Field(None, description="no section: W&B is off")

    def contradictions(self) -> Iterator[str]:
        produced = dict(VAL_LOSS_METRICS)
        if self.model_params.do_compute_metrics:
            produced |= VAL_TEXT_METRICS
        metric, mode = self.trainer.checkpoint.log_obg, self.trainer.checkpoint.mode
        where = "trainer.checkpoint"
        if metric not in produced:
            hint = (
                " (set model_params.do_compute_metrics: true to get it)"
                if metric in VAL_TEXT_METRICS
                else _did_you_mean(metric, produced)
            )
            yield (
                f"{where}.log_obg: found {metric!r}, which this run does not produce{hint}; "
                f"allowed: {', '.join(produced)}"
            )
        elif mode != produced[metric]:
            yield f"{where}.mode: found {mode!r}, but of {metric} {produced[metric]!r} is the best"
        flags = ("freeze_emb", "freeze_ln", "freeze_attn", "freeze_ff", "freeze_other")
        if self.model_params.do_freeze and not any(getattr(self.model_params, f) for f in flags):
            yield f"model_params.do_freeze: found true, but none of {', '.join(flags)} is true"
        params = self.trainer.params
        if params.max_epochs == -1 and params.max_steps is None:
            yield "trainer.params.max_epochs: found -1 (endless), but max_steps is not set"
        if params.strategy == "fsdp":
            for name, on in (
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


class TestData(Section):
    data_dir: str = key(..., "the data: a .json, .jsonl or .csv file, or a directory")
    question_key: str = key("Question", "name of the column or field with the question")
    answer_key: str = key("Answer", "name of the column or field with the answer")
    max_prompt_length: PositiveInt = key(256, "tokens per prompt")
    padding: bool = key(
        False, "true: batches padded to `max_prompt_length`; false: to their longest prompt"
    )
    padding_side: Literal["left", "right"] = key(
        "left", "changes no answer; where padding in front would change one, it stands behind"
    )
    split: str = key("test", "which split to answer")
    truncate_promt: bool = key(True, "shorten the question of a prompt that is too long")
    prompt_template: Annotated[str, AfterValidator(_template)] | None = key(
        None, "null: the checkpoint's own, else the default; another one than trained is an error"
    )


class TestParams(Section):
    batch_size: PositiveInt = key(16, "prompts at a time; changes speed, never an answer")
    do_compute_metrics: bool = key(True, "BLEU and ROUGE as well")
    log_file: str = key(..., "the answers, one JSON object a line")
    from_scratch: bool = key(
        False, "a model directory without weights is initialised from `seed`: a baseline"
    )
    save_steps: PositiveInt = key(
        200, "answers between two writes to the disk; a stop waits for the started ones"
    )
    test_model_path: str | list[str | None] | None = key(
        None,
        "run, checkpoint or model directory to test; null: `model_name`; a list compares them",
    )
    use_cache: bool = key(True, "the model's KV cache")


class TestConfig(Section):
    cuda: bool = key(False, "use a CUDA GPU; an error when there is none")
    tpu: bool = key(False, "use a TPU through torch_xla; an error when there is none")
    data: TestData
    generate_params: GenerateParams = section(GenerateParams)
    model_name: str = key(..., "hub id or local directory")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(42, "all randomness")
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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key given
    twice (plain YAML silently takes the last one)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # refuses an anchor that holds itself

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            name = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(name, (dict, list)):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word", problem_mark=key_node.start_mark
                )
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and not _is_text(text):
            raise yaml.MarkedYAMLError(
                problem="half a surrogate pair is not a character; write the character itself",
                problem_mark=node.start_mark,
            )
        return text


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load(schema: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and check a YAML file.

    Args:
        schema: `TrainConfig` or `TestConfig`.
        path: the YAML file.
        overrides: `a.b=value` strings from the command line; the value is YAML.

    Raises:
        UserError: with every problem of the file and the overrides in one message.
    """
    raw = _read_yaml(Path(path))
    problems: list[str] = []
    for override in overrides or []:
        _apply_override(raw, override, problems)
    return _validate(schema, raw, str(path), problems)


def from_dict(schema: type[Config], raw: dict[str, Any], name: str) -> Config:
    """Check a configuration that is already a dictionary; `name` stands for it in messages."""
    return _validate(schema, raw, name, [])


def _validate(schema: type[Config], raw: dict[str, Any], name: str, problems: list[str]) -> Config:
    _rename_aliases(raw, "", problems)
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        problems += _describe_all(schema, error)
        problems += _contradictions_of_the_rest(schema, raw, error)
    else:
        problems += config.contradictions()
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{name}: {count}\n" + "\n".join(f"  {p}" for p in problems))
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        raw = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = str(error.problem).replace(
            "found unconstructable recursive node", "an anchor (&) that holds itself"
        )
        raise UserError(f"{path}{where}: not valid YAML: {what}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"only a {type(raw).__name__}"
        raise UserError(f"{path}: found {found}; allowed: a mapping of keys (data:, ...)")
    return raw


def _parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not valid YAML.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None
    except Exception as error:  # PyYAML's constructors raise anything: KeyError on `!!bool x`
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    return value


def _apply_override(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")) or not _is_text(override):
        # Only its beginning is shown: a misplaced word may be the W&B key.
        shown = repr(override if len(override) <= 12 else override[:12] + "...")
        problems.append(f"{shown} on the command line: an override is written key.path=value")
        return
    try:
        value = _parse(text)
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
    leaf = ALIASES.get(leaf, leaf)
    for wrong, right in ALIASES.items():  # an override replaces the key however the file spells it
        if right == leaf:
            node.pop(wrong, None)
    node[leaf] = value


def _rename_aliases(node: Any, where: str, problems: list[str]) -> None:
    if not isinstance(node, dict):
        return
    for name in list(node):
        _rename_aliases(node[name], f"{where}{name}.", problems)
        right = ALIASES.get(name) if isinstance(name, str) else None
        if right and right in node:
            problems.append(f"{where}{name}: found together with {right}; write only one")
            del node[name]
        elif right:
            node[right] = node.pop(name)


def _contradictions_of_the_rest(
    schema: type[Config], raw: dict[str, Any], error: ValidationError
) -> list[str]:
    """Contradictions among the keys that are right by themselves, so that one message has all."""
    rest = copy.deepcopy(raw)
    for detail in error.errors(include_url=False):
        if detail["type"] == "missing":
            continue
        node, last = rest, None
        for part in detail["loc"]:  # drop the innermost named key that the error is about
            if isinstance(node, dict) and part in node:
                last, node = (node, part), node[part]
        if last is not None:
            last[0].pop(last[1], None)
    for path, field in walk(schema):
        if field.is_required():  # any text will do: it takes part in no contradiction
            _apply_override(rest, f"{path}=unknown", [])
    try:
        return list(schema.model_validate(rest).contradictions())
    except ValidationError:
        return []


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a schema as (full path, field), in the order of the file."""
    for name, field in schema.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out thousands of digits
        text = "a number of thousands of digits"
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def _describe_all(schema: type[BaseModel], error: ValidationError) -> list[str]:
    """pydantic's errors as lines; a value that fits no member of a union gives only one."""
    lines: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        found, allowed = _describe(schema, detail)
        if allowed not in lines.setdefault(found, []):
            lines[found].append(allowed)
    return [found + " or ".join(allowed) for found, allowed in lines.items()]


def _describe(schema: type[BaseModel], detail: Any) -> tuple[str, str]:
    """One pydantic error: (path and what was found, what is allowed or the nearest name)."""
    known = dict(walk(schema))
    parts, kind = list(detail["loc"]), detail["type"]
    if kind not in ("extra_forbidden", "invalid_key"):
        # Members of unions add their own tags to the location; only keys and indices are kept.
        names = {name for key_path in known for name in key_path.split(".")}
        parts = [p for p in parts if isinstance(p, int) or p in names]
    path = ".".join(str(p) if re.fullmatch(r"[\w-]+", str(p)) else repr(p) for p in parts)
    if kind == "invalid_key":
        return f"{path}: found {_show(detail['input'])} as a key; ", "a key must be a word"
    if kind == "extra_forbidden":
        *parents, leaf = map(str, parts)
        inside = ".".join(parents)
        if "." in leaf:
            return f"{path}: unknown key; ", "a file nests its keys, dots are for the command line"
        refused = REFUSED_GENERATE_PARAMS.get(leaf)
        if refused and parents and parents[-1] in ("generate_params", "val_generate_params"):
            return f"{path}: not supported: ", refused
        siblings = {
            p[len(inside) + 1 if inside else 0 :].split(".")[0]
            for p in known
            if not inside or p.startswith(inside + ".")
        }
        elsewhere = [p for p in known if p.split(".")[-1] == leaf]
        hint = _did_you_mean(leaf, siblings)
        if not hint and elsewhere:
            hint = f"; did you mean {elsewhere[0]}?"
        return f"{path}: unknown key", hint or "; known here: " + ", ".join(sorted(siblings))
    if kind == "missing":
        field = known.get(path)
        what = f" ({field.description})" if field is not None else " (a section)"
        return f"{path}: missing; ", f"it is required{what}"
    allowed = re.sub(r"^(Value error, )?Input should (be )?", "", detail["msg"])
    allowed = ALLOWED.get(kind, allowed)
    # The W&B section may hold the API key, also where it was not meant to stand.
    secret = bool(parts) and parts[0] == "wandb"
    found = "a value that is not shown" if secret else _show(detail["input"])
    return f"{path}: found {found}; allowed: ", allowed


# pydantic's words for these are not ours.
ALLOWED = {
    "model_type": "a mapping of keys",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "string_too_short": "a text that is not empty",
    "finite_number": "a finite number",
}


def resolved(config: BaseModel) -> dict[str, Any]:
    """The whole configuration with every default filled in and without secrets."""
    values = config.model_dump()
    if values.get("wandb"):
        values["wandb"].pop("api", None)
    return values


def to_yaml(config: BaseModel) -> str:
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def reference() -> str:
    """docs/configuration.md: every key with its default and meaning."""
    parts = [
        "# Configuration",
        "",
        "Made from `config.py` by `python config.py > docs/configuration.md`; CI checks that it is",
        "up to date. A key without a default is required. On the command line, `key.path=value`",
        "behind the file's name replaces a key. *Resume* says what happens when a checkpoint is",
        "resumed with another value: *fixed* is refused, *free* is used and named.",
        "",
        "`truncate_promt` and `log_obg` are the names; `truncate_prompt` and `log_obj` work too.",
        "Without a `wandb` section, W&B is off.",
    ]
    for title, schema in (("trainer.yaml", TrainConfig), ("test.yaml", TestConfig)):
        resume = schema is TrainConfig
        parts += ["", f"## {title}", "", "| key | default | meaning |" + " resume |" * resume]
        parts.append("|---|---|---|" + "---|" * resume)
        for path, field in walk(schema):
            extra = field.json_schema_extra
            default = "required" if field.is_required() else f"`{_as_yaml(field.default)}`"
            cells = [f"`{path}`", default, field.description or ""]
            if resume:
                cells.append(str(extra["resume"]) if isinstance(extra, dict) else "")
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip().replace("\n", "\\n")


if __name__ == "__main__":
    print(reference(), end="")
