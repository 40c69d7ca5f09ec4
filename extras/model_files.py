"""Where a model's files are: in a directory, or in the hub's cache; and whether they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from config import UserError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
LFS_POINTER = b"version https://git-lfs"


def file_of(name: str, file: str) -> Path | None:
    """Where a file of a directory, or of a hub id that was loaded, lies; None if it has none."""
    path: Any = Path(name) / file
    if not Path(name).is_dir():
        path = try_to_load_from_cache(name, file)
    return Path(path) if isinstance(path, (str, Path)) and Path(path).is_file() else None


def place_of(name: str) -> str:
    absent = " (not a local directory, as a run's is once it has trained; so taken as a hub id)"
    return f"model_name: {name}" + ("" if Path(name).exists() else absent)


def check_place(name: str, from_scratch: bool) -> bool:
    """Whether a local model directory has weights.

    Raises:
        UserError: it is no model directory, or has no weights without `from_scratch`.
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
    refuse_pointers(path, "config.json", *WEIGHT_FILES)
    return has_weights


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


def refuse_pointers(directory: Path, *patterns: str) -> None:
    """Raise a UserError for a file that `git lfs` has not fetched yet."""
    if directory.is_dir():
        for pattern in patterns:
            for file in directory.glob(pattern):
                refuse_lfs_pointer(file)


def tokenizer_files(name: str, tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer was loaded from, by their names.

    A model is exported with these and not with what `tokenizer.save_pretrained` makes of them: it
    writes the names of transformers 5, which transformers 4, llama.cpp and others do not know.

    Args:
        name: the hub id or the directory that it was loaded from.
    """
    found = {}
    for file in sorted({*TOKENIZER_FILES, *type(tokenizer).vocab_files_names.values()}):
        path = file_of(name, file)
        if path is not None:
            found[file] = path.read_bytes()
    return found


def write_chat_template(directory: Path, chat_template: str) -> None:
    """Put a chat template in the place of a tokenizer's own."""
    (directory / "chat_template.jinja").write_text(chat_template, "utf-8")
    settings = directory / "tokenizer_config.json"  # where older tokenizers have it
    content = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    if "chat_template" in content:
        content["chat_template"] = chat_template
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
