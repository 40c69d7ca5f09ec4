"""Write docs/configuration.md, the reference of all keys.

python -m docs.configuration > docs/configuration.md
"""

from __future__ import annotations

from typing import Any

import yaml

from config import TestConfig, TrainConfig, walk


def reference() -> str:
    """docs/configuration.md: every key with its default and meaning."""
    parts = [
        "# Configuration",
        "",
        "Made from `config.py` by `python -m docs.configuration > docs/configuration.md`;",
        "CI checks that it is up to date. A key without a default is required. On the command line",
        "`key.path=value` behind the file's name replaces a key. *Resume* says what happens when a",
        "checkpoint is resumed with another value: *fixed* is refused, *free* is used and named.",
        "",
        "`truncate_promt` and `log_obg` may be written `truncate_prompt` and `log_obj`, too.",
        "Without a `wandb` section, W&B is off; without `model_params.adapter` (`{}` takes its",
        "defaults) the model itself is trained.",
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
