"""The documents: every link and every file that they name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

FOLDERS = (".ci/", ".github/", "benchmarks/", "configs/", "data/", "docs/", "tests/")
ENDINGS = (".py", ".ipynb", ".md", ".toml", "requirements.txt", "-dev.txt", "-tpu.txt")
OF_OTHERS = (  # in comparison.md
    "trainer.py",
    "sft_trainer.py",
    "chat_sft.py",
    "base_train.py",
    "scripts/chat_sft.py",
    "checkpoint_connector.py",
    "loops/optimization/automatic.py",
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue  # an address elsewhere
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_project_that_is_named_exists(document: Path) -> None:
    for word in re.findall(r"[\w./*-]+", document.read_text()):
        name = word.rstrip("./-")
        if name in OF_OTHERS or not (name.startswith(FOLDERS) or name.endswith(ENDINGS)):
            continue
        places = (ROOT / name, document.parent / name)
        assert any(place.exists() for place in places), f"{document.name}: {name}"


def test_the_readme_lists_every_file_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tree = (ROOT / "README.md").read_text().partition("## Files")[2].partition("\n## ")[0]
    for name in {path.split("/")[0] for path in listed.stdout.splitlines()}:
        assert name.startswith(".git") or name in tree, name
