"""Encoded samples, remembered between runs of the same data, tokenizer and lengths."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from checkpoint import lock
from config import UserError
from data import (
    INPUT_IDS,
    TARGET_MASK,
    Counts,
    Encoder,
    Samples,
    map_array,
    prepare_train,
)
from extras.formats import DataSource, overlap

INDEX = "index.npy"


def cached_samples(
    source: DataSource, split: str, encoder: Encoder, max_length: int, truncate_prompt: bool
) -> tuple[Samples, dict[str, int]]:
    """`prepare_train` of a split and `overlap` of the data, remembered between runs.

    The cache key is a hash of everything the result depends on: the data's content, the
    tokenizer, the template and the lengths. An entry appears by renaming a finished directory, so
    a reader never sees half of one. `SFT_CACHE` names another place than ~/.cache/sft.
    """
    parts = (source.fingerprint, split, encoder.fingerprint(), max_length, truncate_prompt, "v2")
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    root = Path(os.environ.get("SFT_CACHE", "~/.cache/sft")).expanduser()
    entry = root / name
    found = _read_entry(entry)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError:  # a read-only home: the same work, in memory
        samples = prepare_train(source.conversations(split), encoder, max_length, truncate_prompt)
        return samples, overlap(source)
    try:
        with _one_at_a_time(root / f".{name}.lock"):
            found = _read_entry(entry)  # made while this process waited
            if found is not None:
                return found
            _write_entry(scratch, source, split, encoder, max_length, truncate_prompt)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            scratch.rename(entry)
    except OSError as error:
        if _read_entry(entry) is None:
            raise UserError(
                f"{root}: cannot write the token cache: {error.strerror}; free some space, or "
                "set SFT_CACHE to another directory"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made = _read_entry(entry)
    if made is None:
        raise UserError(f"{entry}: the token cache changes while it is used; start again")
    return made


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for the process that is inside, whose work then is there already."""
    with path.open("w") as handle:
        lock(handle, wait=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _read_entry(entry: Path) -> tuple[Samples, dict[str, int]] | None:
    """What the cache holds; None if that is nothing, or damaged (say, by a loss of power)."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        flat = map_array(entry / INPUT_IDS, np.int32), map_array(entry / TARGET_MASK, np.uint8)
        index = np.load(entry / INDEX, mmap_mode="r")
        samples = Samples.of(*flat, index, Counts(**meta["counts"]))
        whole = all(len(array) == samples.lengths.sum() for array in flat)
        if whole and len(samples) == samples.counts.kept:
            return samples, meta["overlap"]
    except (OSError, ValueError, EOFError, LookupError, TypeError):
        pass
    return None


def _write_entry(
    directory: Path,
    source: DataSource,
    split: str,
    encoder: Encoder,
    max_length: int,
    truncate_prompt: bool,
) -> None:
    conversations = source.conversations(split)
    samples = prepare_train(conversations, encoder, max_length, truncate_prompt, directory)
    index = np.stack([samples.lengths, samples.target_lengths, samples.rows], axis=1)
    np.save(directory / INDEX, index.astype(np.int32))
    meta = {"counts": asdict(samples.counts), "overlap": overlap(source)}
    (directory / "meta.json").write_text(json.dumps(meta))
