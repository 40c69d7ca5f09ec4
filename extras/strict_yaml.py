"""YAML that is read as people mean it, and refused where it could mean two things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from config import UserError


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
        if isinstance(text, str) and not is_text(text):
            raise yaml.MarkedYAMLError(
                problem="half a surrogate pair is not a character; write the character itself",
                problem_mark=node.start_mark,
            )
        return text


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8."""
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


def read(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        UserError: it cannot be read, is not valid YAML, or is no mapping of keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        raw = parse(text)
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


def parse(text: str) -> Any:
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
