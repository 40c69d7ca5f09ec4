"""The house: the pipeline stays short enough to be read in one sitting."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from conftest import ROOT

PIPELINE = "sft config data model freeze lora device checkpoint evaluate".split()
BUDGET = 2_900  # lines of code, comments, docstrings and empty lines aside
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, owners) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def test_code_is_counted_without_comments_docstrings_and_empty_lines() -> None:
    module = '"""A\n\nmodule."""\n\n# why\nx = [\n    1,  # one\n]\n'
    function = 'def f():\n    "f"\n\n    return """a\nb"""\n'
    assert code_lines(module + function) == 3 + 1 + 2


def test_the_pipeline_keeps_to_its_budget() -> None:
    files = [path for name in PIPELINE if (path := ROOT / f"{name}.py").exists()]
    counts = {path.name: code_lines(path.read_text()) for path in files}
    print("\n".join(f"{name:<16}{count:>6}" for name, count in counts.items()))
    assert sum(counts.values()) <= BUDGET, counts


def test_no_other_module_stands_beside_the_pipeline() -> None:
    assert {path.stem for path in Path(ROOT).glob("*.py")} <= set(PIPELINE)
