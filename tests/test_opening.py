"""Opening a model: what cannot be made right is refused by name, and nothing is random unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
)

import zoo
from config import UserError
from conftest import Runner, cli, newest, save, weights_of
from extras import probe
from extras.model_checks import context_length
from model import AnswerModel, checkpoint_activations, load_model, load_tokenizer


@pytest.fixture
def llama(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama directory of one's own, to be damaged."""
    return Path(shutil.copytree(model_dirs["llama"], tmp_path / "llama"))


def rewrite(directory: Path, change: Any) -> None:
    """Replace a directory's weights by what `change` makes of their dictionary."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def prefixed(prefix: str) -> Any:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(part: str) -> Any:
    return lambda weights: {name: t for name, t in weights.items() if part not in name}


def with_more(name: str) -> Any:
    return lambda weights: weights | {name: torch.zeros(4, 4)}


def not_a_number(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    return weights


def smaller(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:1000]}


DAMAGES = {
    "a prefix of torch.compile": (
        prefixed("_orig_mod."),
        "missing 30 parameters",
        "every name begins with '_orig_mod.'",
    ),
    "a prefix of DDP": (prefixed("module."), "missing 30 parameters", "module.lm_head.weight"),
    "a missing layer": (without("layers.2."), "missing 9 parameters", "model.layers.2."),
    "a missing head": (without("lm_head"), "missing 1 parameter\n", "lm_head.weight"),
    "one layer too many": (
        with_more("model.layers.3.mlp.up_proj.weight"),
        "that it has no place for, some in its own blocks",
        "model.layers.3.mlp.up_proj.weight",
    ),
    "an adapter that was not merged": (
        with_more("model.layers.0.self_attn.q_proj.lora_A.weight"),
        "that it has no place for, some in its own blocks",
        "lora_A",
    ),
    "another vocabulary": (
        smaller,
        "1 parameter of another shape",
        "found [1000, 32]; config.json wants [",
    ),
    "a number that is none": (
        not_a_number,
        "of model.layers.1.mlp.up_proj.weight 1 are not finite",
        "layers.1.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_of_another_model_are_refused_by_every_command(
    damage: str, llama: Path, run: Runner, capsys: Any
) -> None:
    change, message, name = DAMAGES[damage]
    rewrite(llama, change)
    training, testing = run.file(model=llama), run.test_file(model=llama)
    asking = ("ask", llama, "Why?")
    for command in (("train", training), ("check", training), ("test", testing), asking):
        assert cli(*command) == 2
        said = capsys.readouterr().err
        assert message in said and name in said and "Traceback" not in said, said


def test_a_head_for_another_task_is_left_over_and_said(llama: Path) -> None:
    rewrite(llama, with_more("score.weight"))
    _, remarks = load_model(str(llama))
    assert remarks == ["not used: 1 parameter that a causal LM has no place for (score.weight)"]


def test_caches_and_scales_of_other_programs_are_no_weights(llama: Path) -> None:
    for name in ("rotary_emb.cos_cached", "rotary_emb.inv_freq", "k_proj.k_scale"):
        rewrite(llama, with_more(f"model.layers.0.self_attn.{name}"))
    assert load_model(str(llama))[1] == []


def test_a_head_of_its_own_in_a_model_that_ties_is_said(llama: Path) -> None:
    change_json(llama / "config.json", tie_word_embeddings=True)
    _, remarks = load_model(str(llama))
    assert remarks == [
        "the file has an output head of its own, so it is not tied, whatever config.json says"
    ]


def test_a_tied_head_is_not_missing(model_dirs: dict[str, Path]) -> None:
    assert "lm_head.weight" not in weights_of(model_dirs["qwen2"])
    model, remarks = load_model(str(model_dirs["qwen2"]))
    assert remarks == [] and model.lm_head.weight is model.get_input_embeddings().weight


def test_every_parameter_lies_where_a_new_one_would(llama: Path) -> None:
    """A header of another length moves all tensors in the file to odd places."""
    rewrite(llama, lambda weights: weights | {"score.weight": torch.zeros(3, dtype=torch.uint8)})
    model, _ = load_model(str(llama))
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "data"])
def test_a_git_lfs_pointer_is_called_that(
    file: str, llama: Path, run: Runner, data_file: Path, capsys: Any
) -> None:
    place = data_file if file == "data" else llama / file
    place.write_text(POINTER)
    run(model=llama, code=2)
    said = capsys.readouterr().err
    assert f"{place}: a Git LFS pointer" in said and "git lfs pull" in said


def test_a_damaged_checkpoint_is_refused_as_a_base(run: Runner, capsys: Any) -> None:
    base = run(model="llama") / "best"
    run(model=base)
    config_file = base / "config.json"
    config_file.write_text(config_file.read_text().replace("1e-06", "1e-05"))
    capsys.readouterr()
    run(model=base, code=2)
    assert "damaged: the contents of config.json have changed" in capsys.readouterr().err


# ------------------------------------------------------------------------- kinds of models


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 32}
    layers = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    config = BartConfig(**sizes, **layers, **heads, **widths)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bart is an encoder-decoder model"):
        load_model(str(tmp_path))


def bert(directory: Path, depth: int, scale: float = 1.0) -> str:
    """A BERT that sees what comes, as it is published."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 300}
    config = BertConfig(**sizes, num_hidden_layers=depth, num_attention_heads=2, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    model.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("depth, scale", [(2, 1), (2, 1e-6), (12, 1), (24, 1)])
def test_a_model_that_sees_its_answers_is_refused(tmp_path: Path, depth: int, scale: float) -> None:
    """Also if its weights are so small, or its layers so many, that it hardly shows."""
    with pytest.raises(UserError, match="this bert is no causal language model"):
        AnswerModel(load_model(bert(tmp_path, depth, scale))[0])


@pytest.mark.parametrize("depth", [2, 6, 12])
def test_positions_are_found_out_in_a_deep_model_too(depth: int) -> None:
    """Norms behind each layer make tokens alike; padding that shifts positions still shows."""
    for kind, expected in (("roberta", {"none"}), ("bart", {"groups", "single", "none"})):
        row = dict(zoo.ZOO[kind])
        depths = {
            n: depth for n in row if n in ("num_hidden_layers", "decoder_layers", "encoder_layers")
        }
        assert depths, kind
        row |= depths | {"vocab_size": 1536, "bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **row))
        model = AnswerModel(plain)
        assert not model.pads_left and model.cache in expected, (kind, model.cache)


def test_what_transformers_cannot_train_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    if "reformer" not in zoo.available():
        pytest.skip("this transformers has no Reformer")
    zoo.build("reformer", len(tokenizer)).save_pretrained(tmp_path)
    model = AnswerModel(load_model(str(tmp_path))[0])
    with pytest.raises(UserError, match="reformer cannot be trained, in float32: If training"):
        probe.check_trainable(model)


@pytest.mark.parametrize("kind", ["ctrl", "openai-gpt"])
def test_gradient_checkpointing_is_refused_where_there_is_none(
    kind: str, run: Runner, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    model = save(zoo.build(kind, len(tokenizer)), tokenizer, tmp_path / "model")
    run(model=model, code=2, trainer__params__gradient_checkpointing=True)
    assert f"gradient_checkpointing: found true; {kind} cannot do it" in capsys.readouterr().err
    with pytest.raises(UserError):
        checkpoint_activations(zoo.build(kind, len(tokenizer)))


def test_a_router_loss_is_refused(run: Runner, tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    model = zoo.build("mixtral", len(tokenizer))
    model.config.output_router_logits = True
    run(model=save(model, tokenizer, tmp_path / "with"), code=2)
    assert "output_router_logits is true in its config.json" in capsys.readouterr().err
    model.config.output_router_logits = False
    run(model=save(model, tokenizer, tmp_path / "without"))


# ---------------------------------------------------------------- positions and vocabularies


@pytest.mark.parametrize(
    "kind, context", [("roberta", zoo.CONTEXT), ("xlm-roberta", zoo.CONTEXT), ("llama", 128)]
)
def test_a_text_as_long_as_the_context_fits_and_one_more_does_not(
    kind: str, context: int, tokenizer: Any
) -> None:
    model = zoo.build(kind, len(tokenizer))
    found = context_length(model)
    assert found is not None and found <= context + 2
    ids = torch.full((1, found), 9)
    assert model(ids).logits.shape[1] == found
    if kind != "llama":  # whose rotations have no last position
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, found + 1), 9))


def test_a_limit_of_minus_one_is_none(tokenizer: Any) -> None:
    model = zoo.build("llama", len(tokenizer))
    model.config.max_position_embeddings = -1  # as XLNet has it
    assert context_length(model) is None


def with_a_token(directory: Path, token: str) -> None:
    made = load_tokenizer(str(directory))
    made.add_special_tokens({"additional_special_tokens": [token]})
    made.save_pretrained(directory)


def test_a_token_without_an_embedding_matters_only_if_a_text_gives_it(
    llama: Path, run: Runner, capsys: Any
) -> None:
    """As with gemma-3-1b, or a Llama 2 with an added padding token."""
    with_a_token(llama, "<image>")
    run(model=llama)
    capsys.readouterr()
    assert cli("check", run.file(model=llama)) == 0
    assert "no text here gives one of the others" in capsys.readouterr().out
    run(model=llama, code=2, data__prompt_template="<image>{question}:")
    said = capsys.readouterr().err
    assert "token '<image>' has the id" in said and "the model has embeddings for" in said


# ------------------------------------------------------------------------------- what is shipped


def shipped(directory: Path) -> dict[str, Any]:
    """The generation settings of a model directory."""
    return json.loads((directory / "generation_config.json").read_text())


def test_what_is_shipped_ends_as_it_was_trained_to(llama: Path, run: Runner) -> None:
    """The base ends with another token, and a third one; `generate` must stop at ours."""
    tokenizer = load_tokenizer(str(llama))
    other, third = tokenizer.convert_tokens_to_ids(["'", "("])
    for before, after in ((other, [0, other]), ([other, third], [0, other, third]), (0, 0)):
        for name in ("config.json", "generation_config.json"):
            change_json(llama / name, eos_token_id=before)
        directory = run(model=llama)
        for place in (directory / "best", newest(directory)):
            assert shipped(place)["eos_token_id"] == after
    model = AutoModelForCausalLM.from_pretrained(directory / "best")
    assert model.generation_config.eos_token_id == 0


def test_an_end_that_only_a_default_names_is_no_end(llama: Path, run: Runner) -> None:
    """LlamaConfig's default is 2, a letter of this tokenizer."""
    (llama / "generation_config.json").unlink()
    change_json(llama / "config.json", eos_token_id=2)
    assert shipped(run(model=llama) / "best")["eos_token_id"] == 0


def test_settings_that_transformers_would_not_write_are_kept(llama: Path, run: Runner) -> None:
    """As Vicuna has them: temperature without do_sample."""
    settings = {"temperature": 0.6, "top_p": 0.9}
    change_json(llama / "generation_config.json", eos_token_id=7, **settings)
    found = shipped(run(model=llama) / "best")
    assert found["eos_token_id"] == [0, 7] and settings.items() <= found.items()


def test_the_tokenizers_files_are_shipped_unchanged(llama: Path, run: Runner) -> None:
    """transformers would write its own class name, which transformers 4 and llama.cpp lack."""
    file = llama / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=3))
    (llama / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    names = [p.name for p in llama.iterdir() if "token" in p.name or "template" in p.name]
    assert len(names) >= 3
    directory = run(model=llama, trainer__params__max_epochs=1)
    run.resume(directory, "trainer.params.max_epochs=2")
    names.remove("chat_template.jinja")  # that one becomes what the model was trained with
    for place in (directory / "best", newest(directory)):
        for name in names:
            assert (place / name).read_bytes() == (llama / name).read_bytes(), name
        assert "one question with one answer" in (place / "chat_template.jinja").read_text()


def test_a_chat_template_among_the_settings_is_replaced_there_too(llama: Path, run: Runner) -> None:
    change_json(llama / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    best = run(model=llama, trainer__params__max_epochs=1) / "best"
    before, after = (
        json.loads((place / "tokenizer_config.json").read_text()) for place in (llama, best)
    )
    assert after.pop("chat_template") == (best / "chat_template.jinja").read_text()
    assert before.pop("chat_template") and before == after
