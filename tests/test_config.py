"""Configuration: every rule about keys, and that one message names every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import config as schema
from config import TestConfig as ForTest  # pytest would collect a name like Test*
from config import TrainConfig as ForTrain
from config import UserError, from_dict, load, resolved, to_yaml, walk
from conftest import ROOT, Runner, cli, imported, write_yaml
from docs.configuration import reference

KEY = "0123456789abcdef0123456789abcdef01234567"


def minimal() -> dict[str, Any]:
    return {
        "data": {"data_dir": "d"},
        "model_name": "m",
        "trainer": {"checkpoint": {"dirpath": "r"}},
    }


def minimal_test() -> dict[str, Any]:
    return {"data": {"data_dir": "d"}, "model_name": "m", "test_params": {"log_file": "l.jsonl"}}


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """Load the minimal training configuration with overrides or a text in front of it."""

    def run(*overrides: str, text: str = "", content: dict[str, Any] | None = None) -> ForTrain:
        path = tmp_path / "c.yaml"
        path.write_text(text + yaml.safe_dump(minimal() if content is None else content))
        return load(ForTrain, path, list(overrides))

    return run


@pytest.fixture
def refuse(check: Any) -> Any:
    """The problems of a configuration that must be refused, one a line."""

    def run(*overrides: str, **kwargs: Any) -> list[str]:
        with pytest.raises(UserError) as caught:
            check(*overrides, **kwargs)
        first, *lines = str(caught.value).split("\n")
        if lines:
            assert first.endswith(f"{len(lines)} problem" + "s" * (len(lines) > 1))
        return [line.strip() for line in lines] or [first]

    return run


# ------------------------------------------------------------------------ all in one message


def test_five_different_mistakes_stand_in_one_message(
    run: Runner, tmp_path: Path, capsys: Any
) -> None:
    """Unknown key, wrong type, out of range, missing, contradiction; no traceback, exit code 2."""
    content = run.config(
        data__bach_size=8,
        seed="one",
        model_params__adam_betas=[0.9, 1.5],
        trainer__checkpoint={"mode": "max"},
    )
    assert cli("train", write_yaml(tmp_path / "c.yaml", content)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "5 problems" in error and "Traceback" not in error
    for part in (
        "data.bach_size: unknown key; did you mean batch_size?",
        "seed: found 'one' (str); allowed: an integer",
        "model_params.adam_betas.1: found 1.5 (float); allowed: less than 1",
        "trainer.checkpoint.dirpath: missing; it is required (directory of the run)",
        "trainer.checkpoint.mode: found 'max'; allowed: 'min', for val_loss",
    ):
        assert part in error


def test_a_mistake_of_the_test_command_is_reported_the_same_way(run: Runner, capsys: Any) -> None:
    run.test(
        code=2,
        data__padding_side="middle",
        cuda=1,
        generate_params={"top_p": 0.9, "min_new_tokens": 9, "max_new_tokens": 3},
    )
    error = capsys.readouterr().err
    assert "4 problems" in error
    assert "data.padding_side: found 'middle' (str); allowed: 'left' or 'right'" in error
    assert "cuda: found 1 (int); allowed: true or false" in error
    assert "generate_params.min_new_tokens: found 9, more than max_new_tokens (3)" in error
    assert "generate_params.do_sample: found false, but top_p would only act" in error


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.max_lenght=3", "data.max_lenght: unknown key; did you mean max_length?"),
        ("modle_name=x", "modle_name: unknown key; did you mean model_name?"),
        ("batch_size=3", "batch_size: unknown key; did you mean data.batch_size?"),
        (
            "trainer.xyzzy=1",
            "trainer.xyzzy: unknown key; known here: checkpoint, ckpt_path, params",
        ),
        ("data=3", "data: found 3 (int); allowed: a mapping of keys"),
        ("data.data_dir=", "data.data_dir: found nothing (null); allowed: a text"),
        ("data.data_dir=''", "data.data_dir: found '' (str); allowed: a text that is not empty"),
        (
            "data.batch_size=0",
            "data.batch_size: found 0 (int); allowed: greater than or equal to 1",
        ),
        ("data.batch_size=true", "data.batch_size: found True (bool); allowed: an integer"),
        ("data.batch_size=2.0", "data.batch_size: found 2.0 (float); allowed: an integer"),
        ("data.batch_size='2'", "data.batch_size: found '2' (str); allowed: an integer"),
        ("data.on_tpu=1", "data.on_tpu: found 1 (int); allowed: true or false"),
        ("data.on_tpu='yes'", "data.on_tpu: found 'yes' (str); allowed: true or false"),
        ("data.prompt_template=Q", "allowed: 'chat' or a text that holds {question} exactly once"),
        ("data.prompt_template='{question}{question}'", "{question} exactly once"),
        ("model_params.learning_rate=0", "learning_rate: found 0 (int); allowed: greater than 0"),
        ("model_params.learning_rate=.inf", "learning_rate: found inf (float); allowed: a finite"),
        ("model_params.weight_decay=.nan", "weight_decay: found nan (float); allowed: a finite"),
        ("model_params.warmup_steps_per_cent=101", "allowed: less than or equal to 100"),
        ("model_params.adam_betas=[0.9]", "model_params.adam_betas: found [0.9] (list)"),
        ("model_params.layers_not_to_freeze=[a]", "layers_not_to_freeze.0: found 'a' (str)"),
        ("seed=-1", "seed: found -1 (int)"),
        ("seed=4294967296", "seed: found 4294967296 (int); allowed: less than 4294967296"),
        ("seed=0x" + "f" * 5000, "seed: found a number of thousands of digits"),
        ("data.batch_size=9999999999", "allowed: less than or equal to 2147483647"),
        ("trainer.params.val_check_interval=0", "val_check_interval: found 0 (int); allowed: a"),
        ("trainer.params.val_check_interval=1.5", "float in (0, 1] (share of an epoch) or an"),
        ("trainer.params.val_check_interval=x", "found 'x' (str); allowed: an integer or a number"),
        ("trainer.params.overfit_batches=-1", "an integer >= 0 (batches) or a float in [0, 1]"),
        ("trainer.params.overfit_batches=.nan", "overfit_batches: found nan (float)"),
        ("trainer.params.precision=8", "precision: found 8 (int); allowed: '32-true', '16-mixed'"),
        ("trainer.params.precision=true", "precision: found True (bool); allowed: '32-true'"),
        (
            "trainer.params.accelerator=npu",
            "accelerator: found 'npu' (str); allowed: 'auto', 'cpu'",
        ),
        ("trainer.params.max_epochs=0", "max_epochs: found 0; allowed: an integer >= 1, or -1"),
        ("trainer.params.max_epochs=-1", "found -1 (endless), but max_steps is not set"),
        ("model_params.do_freeze=true", "do_freeze: found true, but none of freeze_emb, freeze_ln"),
        (
            "trainer.checkpoint.log_obg=val_los",
            "which this run does not produce; did you mean val_",
        ),
        ("trainer.checkpoint.log_obg=val_bleu", "(set model_params.do_compute_metrics: true to"),
        ("no-equals-sign", "on the command line: an override is written key.path=value"),
        ("=3", "on the command line: an override is written key.path=value"),
        ("data..batch_size=3", "on the command line: an override is written key.path=value"),
        ("data.data_dir=[", "data.data_dir: the value on the command line is not valid YAML"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(refuse: Any, override: str, line: str) -> None:
    (problem,) = refuse(override)
    assert line in problem


def test_contradictions_are_found_beside_a_missing_and_a_wrong_key(refuse: Any) -> None:
    content = minimal()
    del content["trainer"]["checkpoint"]["dirpath"]
    content["trainer"]["checkpoint"]["log_obg"] = "nonsense"
    lines = refuse("data.batch_size=x", "model_params.do_freeze=true", content=content)
    assert len(lines) == 4 and any(line.startswith("trainer.checkpoint.log_obg") for line in lines)


def test_a_metric_needs_its_own_direction_and_metrics_turned_on(check: Any, refuse: Any) -> None:
    bleu = "trainer.checkpoint.log_obg=val_bleu"
    assert check(bleu, "trainer.checkpoint.mode=max", "model_params.do_compute_metrics=true")
    assert "allowed: 'max', for val_bleu" in refuse(bleu, "model_params.do_compute_metrics=true")[0]


# ------------------------------------------------------------------------------- reading YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: the key 'seed' is given twice"),
        ("a: {b: 1, b: 2}\n", "line 1, column 11: not valid YAML: the key 'b' is given twice"),
        ("a: [1\nb: 2\n", "line 2, column 2: not valid YAML"),
        ("a:\tb: c\n", "line 1, column "),
        ("[a]: 1\n", "line 1, column 1: not valid YAML: a key must be a word"),
        ("a: &a {b: *a}\n", "line 1, column 4: not valid YAML: an anchor (&) that holds itself"),
        ('a: "\\ud800"\n', "line 1, column 4: not valid YAML: half a surrogate pair"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: !!bool maybe\n", "not valid YAML: KeyError: 'maybe'"),
        ("a: 2020-99-99\n", "not valid YAML: ValueError: month must be in 1..12"),
        ("a: " + "[" * 5000, "not valid YAML: lists or mappings are nested too deeply"),
    ],
)
def test_a_file_that_is_not_valid_yaml_is_refused_with_its_place(
    refuse: Any, text: str, message: str
) -> None:
    assert message in refuse(text=text)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found nothing; allowed: a mapping of keys (data:, ...)"),
        (b"- 1\n", "found only a list; allowed: a mapping of keys"),
        (b"\xff\xfe\xfd", "cannot be read as UTF-8 text"),
        (b"\0", "not valid YAML"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"c[.]yaml") as caught:
        load(ForTrain, tmp_path / "c.yaml")
    assert message in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        load(ForTrain, tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(ForTrain, tmp_path)


def test_keys_that_are_no_words_are_named(refuse: Any) -> None:
    lines = refuse(text="2: 1\n'foo(bar)': 1\n'data.batch_size': 1\nint: 1\n")
    assert len(lines) == 4
    assert any(line.startswith("2: found 2 (int) as a key") for line in lines)
    assert any(line.startswith("'foo(bar)': unknown key") for line in lines)
    assert any(line.startswith("int: unknown key") for line in lines)
    assert any("a file nests its keys, dots are for the command line" in line for line in lines)


def test_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "data: &base {data_dir: d, batch_size: 3}\nmodel_name: m\n"
        "trainer: {checkpoint: {dirpath: r}}\n"
    )
    assert load(ForTrain, path).data.batch_size == 3
    path.write_text(
        "model_name: m\ntrainer: {checkpoint: {dirpath: r}}\n"
        "data: {<<: {data_dir: d, batch_size: 3}, batch_size: 4}\n"
    )
    assert load(ForTrain, path).data.batch_size == 4


def test_numbers_are_read_as_people_write_them(check: Any) -> None:
    for text in ("1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".1e-3"):
        rate = check(f"model_params.learning_rate={text}").model_params.learning_rate
        assert rate == 1e-4 and isinstance(rate, float)
    assert check("model_params.weight_decay=0").model_params.weight_decay == 0
    assert check("wandb.args.name=1e-4x").wandb.args.name == "1e-4x"


# ----------------------------------------------------------------------- aliases, overrides


def test_the_correct_spellings_are_understood(check: Any) -> None:
    assert check().data.truncate_prompt is True
    content = minimal()
    content["data"]["truncate_prompt"] = False
    content["trainer"]["checkpoint"] |= {"log_obj": "val_rouge1", "mode": "max"}
    content["model_params"] = {"do_compute_metrics": True}
    loaded = check(content=content)
    assert loaded.data.truncate_prompt is False
    assert loaded.trainer.checkpoint.log_obj == "val_rouge1"
    assert resolved(loaded)["data"]["truncate_promt"] is False


@pytest.mark.parametrize(
    ("section", "alias", "name"),
    [("data", "truncate_prompt", "truncate_promt"), ("checkpoint", "log_obj", "log_obg")],
)
def test_both_spellings_at_once_are_an_error(
    refuse: Any, section: str, alias: str, name: str
) -> None:
    content = minimal()
    node = content["data"] if section == "data" else content["trainer"]["checkpoint"]
    value = False if section == "data" else "val_loss"
    node |= {alias: value, name: value}
    (line,) = refuse(content=content)
    assert f"{alias}: found together with another spelling ({name}" in line
    assert line.endswith("write only one")


def test_an_override_replaces_nested_keys_and_whole_sections(check: Any) -> None:
    content = minimal()
    content["data"]["batch_size"] = 3
    assert check(content=content).data.batch_size == 3
    changed = check("data.batch_size=5", "trainer.params.max_epochs=7", content=content)
    assert changed.data.batch_size == 5  # the override wins
    assert changed.trainer.params.max_epochs == 7  # a section that the file does not have
    assert changed.data.data_dir == "d"  # and nothing else is touched
    assert check("data.batch_size=5", "data.batch_size=6").data.batch_size == 6
    whole = check("model_params={weight_decay: 0.5, adam_betas: [0.1, 0.2]}")
    assert whole.model_params.adam_betas == [0.1, 0.2]
    assert check("wandb.args.name=a=b").wandb.args.name == "a=b"
    assert check("trainer.ckpt_path=null").trainer.ckpt_path is None


@pytest.mark.parametrize("in_file", ["truncate_promt", "truncate_prompt"])
@pytest.mark.parametrize("override", ["truncate_promt", "truncate_prompt"])
def test_an_override_replaces_either_spelling_by_either(
    check: Any, in_file: str, override: str
) -> None:
    content = minimal()
    content["data"][in_file] = True
    assert check(f"data.{override}=false", content=content).data.truncate_prompt is False


# ------------------------------------------------------------------------- values and kinds


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("32", "32-true"),
        ("'32'", "32-true"),
        ("32-true", "32-true"),
        ("16", "16-mixed"),
        ("'16'", "16-mixed"),
        ("16-mixed", "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("bf16-mixed", "bf16-mixed"),
        ("bf16-true", "bf16-true"),
        ("64", "64-true"),
        ("64-true", "64-true"),
    ],
)
def test_precisions_have_lightnings_names(check: Any, written: str, meant: str) -> None:
    assert check(f"trainer.params.precision={written}").trainer.params.precision == meant


@pytest.mark.parametrize("key", ["val_check_interval", "overfit_batches"])
def test_one_and_one_point_zero_stay_different(check: Any, key: str) -> None:
    """1 is a step or a batch, 1.0 is everything."""
    assert isinstance(getattr(check(f"trainer.params.{key}=1").trainer.params, key), int)
    assert isinstance(getattr(check(f"trainer.params.{key}=1.0").trainer.params, key), float)


def test_every_field_of_generation_config_is_ours_or_refused(refuse: Any) -> None:
    from transformers import GenerationConfig

    ours = set(schema.GenerateParams.model_fields)
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert ours <= theirs
    for name in sorted(theirs - ours):
        (line,) = refuse(f"model_params.val_generate_params.{name}=1")
        assert f"val_generate_params.{name}: unknown key; " in line
    (line,) = refuse("model_params.val_generate_params.num_beams=4")
    assert "answers are decoded greedily or by sampling; known here: bad_words_ids" in line


def test_sampling_parameters_without_sampling_are_a_contradiction(check: Any, refuse: Any) -> None:
    where = "model_params.val_generate_params"
    for name in ("temperature=0.5", "top_k=3", "top_p=0.5", "min_p=0.1", "typical_p=0.5"):
        (line,) = refuse(f"{where}.{name}")
        assert line.startswith(f"{where}.do_sample: found false, but {name.split('=')[0]}")
        assert check(f"{where}.{name}", f"{where}.do_sample=true")
    assert check(f"{where}.top_k=50")  # the default, written out


# ---------------------------------------------------------------------------------- secrets


def test_the_api_key_is_in_nothing_that_is_written(check: Any) -> None:
    loaded = check(f"wandb.api={KEY}", "wandb.args.name=n")
    assert loaded.wandb.api == KEY
    assert KEY not in to_yaml(loaded) and KEY not in str(resolved(loaded))
    assert resolved(loaded)["wandb"]["args"]["name"] == "n"
    assert "api" not in resolved(loaded)["wandb"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.batch_size=x", f"wandb.api={KEY}"],
        [f"wandb.api=[{KEY}]"],
        [f"wandb.api={{key: {KEY}}}"],
        [f"wandb={KEY}"],
        [f"wandb=[{KEY}]"],
        [f"wandb.args={KEY}"],
        [f"wandb.apy={KEY}"],
        [f"wandb.api.x={KEY}"],
        [f"wandb.api={KEY}: ["],
        [f"wandb.api:{KEY}"],
        ["wandb.api=", KEY],
    ],
)
def test_the_api_key_is_in_no_error_message(refuse: Any, overrides: list[str]) -> None:
    for line in refuse(*overrides):
        assert KEY not in line and KEY[:20] not in line


# --------------------------------------------------------------------- one place for defaults


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {path: field for path, field in walk(model) if not field.is_required()}


@pytest.mark.parametrize("kind", [ForTrain, ForTest])
def test_what_a_file_leaves_out_gets_the_schemas_default(kind: Any, tmp_path: Path) -> None:
    content = minimal() if kind is ForTrain else minimal_test()
    sections = ["wandb={}", *(["model_params.adapter={}"] if kind is ForTrain else [])]
    loaded = load(kind, write_yaml(tmp_path / "c.yaml", content), sections)
    for path, field in defaults(kind).items():
        value: Any = loaded
        for name in path.split("."):
            value = getattr(
                value, {"truncate_promt": "truncate_prompt", "log_obg": "log_obj"}.get(name, name)
            )
        default = field.default
        assert value == default and type(value) is type(default), path


@pytest.mark.parametrize("kind", [ForTrain, ForTest])
def test_the_resolved_configuration_loads_again_as_the_same(kind: Any, tmp_path: Path) -> None:
    content = minimal() if kind is ForTrain else minimal_test()
    loaded = load(kind, write_yaml(tmp_path / "c.yaml", content | {"wandb": {"api": KEY}}))
    (tmp_path / "again.yaml").write_text(to_yaml(loaded))
    again = load(kind, tmp_path / "again.yaml")
    assert resolved(again) == resolved(loaded)
    assert again.wandb.api is None


@pytest.mark.parametrize("kind", [ForTrain, ForTest])
def test_every_key_has_a_meaning(kind: Any) -> None:
    for path, field in walk(kind):
        assert field.description, path
    # Whether a resumed run may change a key is said for each, and only once: in the schema.
    if kind is ForTrain:
        assert {f.json_schema_extra["resume"] for _, f in walk(kind)} == {"fixed", "free"}


def test_the_reference_in_docs_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


def test_a_wrong_configuration_is_answered_without_torch(tmp_path: Path) -> None:
    """`--help` too: see tests/test_cli.py."""
    path = write_yaml(tmp_path / "c.yaml", {"modle_name": 1})
    for command in ("train", "test"):
        modules = imported(command, path, code=2)
        assert modules and not {"torch", "transformers", "numpy", "wandb"} & modules


def test_a_tilde_is_the_home_directory_in_every_path(
    run: Runner, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = run.config(model="~/model", trainer__ckpt_path="~/old")
    wanted["trainer"]["checkpoint"]["dirpath"] = "~/run"
    config = from_dict(ForTrain, wanted, "test")
    assert config.trainer.checkpoint.dirpath == str(tmp_path / "run")
    assert config.model_name == str(tmp_path / "model")
    assert config.trainer.ckpt_path == str(tmp_path / "old")
