"""One run of one peer, in a process of its own: python benchmarks/peers.py NAME JOB.json

Started by training.py with the peers' Python. Trains one epoch as the job says and prints one JSON
line. Every peer gets the same model directory, the same token ids, AdamW without weight decay, a
rate that falls linearly to 0, gradients clipped to norm 1, float32 on the CPU; whatever else a
peer does is its default, and what differs from it is in TRL_SETTINGS.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

IGNORE = -100
VERSIONS = ("torch", "transformers", "trl", "peft", "lightning")

# What is set beside TRL's defaults. One of them is gradient checkpointing, which costs time and
# saves memory: the last three are without it, so that TRL's fastest setting is among the rows.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-packing": {"packing": True},
    "trl-group-by-length": {"train_sampling_strategy": "group_by_length"},
    "trl-no-checkpointing": {"gradient_checkpointing": False},
    "trl-packing-no-checkpointing": {"packing": True, "gradient_checkpointing": False},
    "trl-group-by-length-no-checkpointing": {
        "train_sampling_strategy": "group_by_length",
        "gradient_checkpointing": False,
    },
}


def main(name: str, path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    if name in TRL_SETTINGS:
        result = train_trl(model, job, TRL_SETTINGS[name])
    elif name == "transformers":
        result = train_transformers(model, job)
    elif name == "lightning":
        result = train_lightning(model, job)
    else:
        raise SystemExit(f"no peer {name!r}")
    # Before the held-out loss, which is a check of the benchmark and no part of the training.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result |= {
        "peak_memory": memory * (1 if sys.platform == "darwin" else 1024),
        "final_loss": result["losses"][-1],
        "held_out_loss": held_out_loss(model, job),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in VERSIONS if find_spec(p)},
    }
    print(json.dumps(result), flush=True)


# --------------------------------------------------------------------------------- shared parts


class Counted:
    """A collator that counts what passes through it."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.counts = {"samples": 0, "tokens": 0, "targets": 0, "positions": 0}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        ids, labels = batch["input_ids"], batch["labels"]
        mask = batch.get("attention_mask")
        packed = "seq_lengths" in examples[0]
        samples = sum(len(e["seq_lengths"]) for e in examples) if packed else len(examples)
        self.counts["samples"] += samples
        self.counts["tokens"] += int(ids.numel() if mask is None else mask.sum())
        self.counts["targets"] += int((labels != IGNORE).sum())
        self.counts["positions"] += ids.numel()  # with padding
        return batch


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each [B, T]."""
    width = max(len(e["input_ids"]) for e in examples)
    batch = {}
    for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE)):
        rows = [e[key] + [fill] * (width - len(e[key])) for e in examples]
        batch[key] = torch.tensor(rows)
    return batch


def labelled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The job's samples with labels that leave the prompt out."""
    return [
        {
            "input_ids": s["input_ids"],
            "attention_mask": [1] * len(s["input_ids"]),
            "labels": [IGNORE] * s["prompt"] + s["input_ids"][s["prompt"] :],
        }
        for s in samples
    ]


@torch.no_grad()
def held_out_loss(model: Any, job: dict[str, Any]) -> float:
    """Mean loss of the trained model over the target tokens of samples that it never saw."""
    model.eval()
    total, targets = 0.0, 0
    for sample in labelled(job["held_out"]):
        batch = pad([sample])
        logits = model(batch["input_ids"]).logits[0, :-1].float()
        labels = batch["labels"][0, 1:]
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        targets += int((labels != IGNORE).sum())
    return total / targets


# ------------------------------------------------------------------------ TRL and transformers


class Clock(TrainerCallback):
    """From the start of the loop to the end of its last step."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.began


class KeepsLosses:
    """Trainer logs rounded losses; this keeps those of all steps as they are."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("step_losses", []).append(loss.detach())
        return loss


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What TRL's and transformers' trainers are told alike; nothing is logged or saved."""
    return {
        "output_dir": job["scratch"],
        "num_train_epochs": 1,
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential" if job["in_order"] else "random",
        "use_cpu": True,
        "bf16": False,
        "seed": job["seed"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(trainer: Any) -> dict[str, Any]:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.data_collator = counted = Counted(trainer.data_collator)
    trainer.train()
    return {
        "seconds": clock.seconds,
        "steps": trainer.state.global_step,
        "losses": [float(loss) for loss in trainer.step_losses],
        **counted.counts,
    }


def train_trl(model: Any, job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Keeping(KeepsLosses, SFTTrainer):
        pass

    rows = [
        {
            "input_ids": s["input_ids"],
            "completion_mask": [0] * s["prompt"] + [1] * (len(s["input_ids"]) - s["prompt"]),
        }
        for s in job["samples"]
    ]
    options = arguments(job) | {"max_length": job["max_length"], "completion_only_loss": True}
    if settings.get("packing"):  # a step of about as many tokens as the others'
        options["per_device_train_batch_size"] = job["packs_per_batch"]
    trainer = Keeping(
        model=model,
        args=SFTConfig(**(options | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    return run(trainer)


def train_transformers(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    class Keeping(KeepsLosses, Trainer):
        pass

    trainer = Keeping(
        model=model,
        args=Arguments(**arguments(job)),
        train_dataset=labelled(job["samples"]),
        data_collator=pad,
    )
    return run(trainer)


# ------------------------------------------------------------------------------------ Lightning


def train_lightning(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    import lightning
    from torch.utils.data import DataLoader

    losses: list[torch.Tensor] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = self.model(**batch, use_cache=False).loss
            losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=job["lr"], weight_decay=0.0, fused=True
            )
            total = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / total)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class LightningClock(lightning.Callback):
        seconds = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    torch.manual_seed(job["seed"])
    model.train()
    clock, counted = LightningClock(), Counted(pad)
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        labelled(job["samples"]),  # type: ignore[arg-type]
        batch_size=job["batch_size"],
        shuffle=not job["in_order"],
        collate_fn=counted,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job["scratch"],
    )
    trainer.fit(Module(), loader)
    return {
        "seconds": clock.seconds,
        "steps": trainer.global_step,
        "losses": [float(loss) for loss in losses],
        **counted.counts,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
