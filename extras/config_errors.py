"""What is wrong with a configuration, in our words: where, what was found, what is allowed."""

from __future__ import annotations

import copy
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from config import Config, apply_override, did_you_mean, spellings, walk


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out thousands of digits
        text = "a number of thousands of digits"
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def describe(schema: type[Config], raw: dict[str, Any], error: ValidationError) -> list[str]:
    """All that is wrong with a file's content, a line for each key.

    A value that fits no member of a union is pydantic's error once for each member, and one line.
    """
    lines: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        found, allowed = _describe(schema, detail)
        if allowed not in lines.setdefault(found, []):
            lines[found].append(allowed)
    wrong = [found + " or ".join(allowed) for found, allowed in lines.items()]
    return wrong + _contradictions_of_the_rest(schema, raw, error)


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
        if spellings(leaf):
            others = " or ".join(n for n in spellings(leaf) if n != leaf)
            return f"{path}: found together with another spelling ({others}); ", "write only one"
        siblings = {
            p[len(inside) + 1 if inside else 0 :].split(".")[0]
            for p in known
            if not inside or p.startswith(inside + ".")
        }
        elsewhere = [p for p in known if p.split(".")[-1] == leaf]
        hint = did_you_mean(leaf, siblings)
        if not hint and elsewhere:
            hint = f"; did you mean {elsewhere[0]}?"
        way = "answers are decoded greedily or by sampling; " * inside.endswith("generate_params")
        return f"{path}: unknown key", hint or f"; {way}known here: {', '.join(sorted(siblings))}"
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
            apply_override(rest, f"{path}=unknown", [])
    try:
        return list(schema.model_validate(rest).contradictions())
    except ValidationError:
        return []
