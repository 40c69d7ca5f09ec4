"""run.ipynb, executed whole in a copy of the project."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, copy_project

nbformat = pytest.importorskip("nbformat")


def test_the_notebook_in_git_has_no_outputs() -> None:
    for cell in nbformat.read(ROOT / "run.ipynb", as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    copy = copy_project(tmp_path / "sft")
    notebook = nbformat.read(copy / "run.ipynb", as_version=4)
    resources = {"metadata": {"path": str(copy)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    for command in ("check", "train", "test", "ask"):
        assert f"$ python sft.py {command} " in text
    scores = re.search(r"exact_match +([\d.]+)", text)
    assert scores is not None and float(scores[1]) >= 0.9
    assert text.rstrip().endswith("Paris")  # the answer of the last cell
    print("exact match", scores[1])

    pictures: list[Any] = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]) == (copy / "runs/notebook/curves.png").read_bytes()
