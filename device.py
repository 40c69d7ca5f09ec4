"""The one place that knows about cpu, cuda and mps, about precision and about ranks.

The training loop asks a `Device` for everything that differs between machines and never branches
on one itself.
"""

from __future__ import annotations

import ctypes
import math
import random
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError
from data import Batch

WEIGHTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16}  # float32 otherwise
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    loss: sum over the step's targets. grad_norm: global L2 norm before clipping.
    applied: the weights changed. overflow: skipped by the GradScaler, which lowers its scale.
    """

    loss: float
    grad_norm: float
    applied: bool
    overflow: bool


class Device:
    def __init__(
        self,
        accelerator: str = "auto",
        precision: str = "32-true",
        key: str = "trainer.params.accelerator",
    ) -> None:
        """`key` is the configuration key to name in messages.

        Raises:
            UserError: the accelerator is absent or cannot do the precision.
        """
        self.torch_device = torch.device(_choose(accelerator, key))
        self.kind = self.torch_device.type
        self.precision = precision
        self.weights_dtype = WEIGHTS.get(precision, torch.float32)
        self.autocast_dtype = AUTOCAST.get(precision)
        self.rank, self.world_size = 0, 1
        if self.kind == "mps" and precision in ("64-true",):
            raise UserError("trainer.params.precision: found 64; MPS has no float64")
        self.scaler = torch.amp.GradScaler(self.kind, enabled=precision == "16-mixed")
        if self.kind == "cpu":
            _keep_freed_memory()
        if self.kind == "cuda":
            # Full float32 products for precision 32: TF32 keeps 10 of 23 bits. Whoever wants
            # speed on tensor cores asks for bf16-mixed, which says so in the configuration.
            torch.set_float32_matmul_precision("highest")

    def describe(self) -> str:
        if self.kind == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.torch_device)})"
        if self.kind == "cpu":
            return f"cpu ({torch.get_num_threads()} threads)"
        return self.kind

    def slow_precision(self) -> str | None:
        """Why the precision has no fast path here, or None if it has one."""
        if self.precision in ("16-mixed", "bf16-mixed", "bf16-true") and self.kind == "cpu":
            return (
                f"{self.precision} has no fast path on most CPUs (a bfloat16 product was measured "
                "100 times slower than float32); use 32"
            )
        if self.kind == "cuda" and "bf16" in self.precision and not torch.cuda.is_bf16_supported():
            return f"this GPU emulates bfloat16; use 16-mixed instead of {self.precision}"
        if self.kind == "cuda" and self.precision == "64-true":
            return "float64 runs at 1/2 to 1/64 of float32's rate on GPUs"
        return None

    # -------------------------------------------------------------------------- one step

    def feed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the device, each copied there while the one before is worked on."""
        ready: Batch | None = None
        for batch in batches:
            moved = self.place(batch)
            if ready is not None:
                yield ready
            ready = moved
        if ready is not None:
            yield ready

    def place(self, batch: Batch) -> Batch:
        return replace(
            batch,
            input_ids=self.move(batch.input_ids),
            target_positions=self.move(batch.target_positions),
            target_ids=self.move(batch.target_ids),
            prefix=None if batch.prefix is None else self.move(batch.prefix),
        )

    def move(self, tensor: Tensor) -> Tensor:
        if self.kind == "cuda":  # a copy from pinned memory runs beside the computation
            return tensor.pin_memory().to(self.torch_device, non_blocking=True)
        return tensor.to(self.torch_device)

    def zero(self) -> Tensor:
        """A float64 zero for sums; float32 where the device has no float64."""
        dtype = torch.float32 if self.kind == "mps" else torch.float64
        return torch.zeros((), dtype=dtype, device=self.torch_device)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.kind, dtype=self.autocast_dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        clip: float | None,
        loss: Tensor,
    ) -> StepResult:
        """Unscale, clip, update and clear the gradients.

        A non-finite loss or norm leaves weights and optimizer state as they are. This is where
        the host waits for the device, once a step.
        """
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss_value, norm_value = torch.stack([loss.double(), norm.double()]).tolist()
        applied = math.isfinite(loss_value) and math.isfinite(norm_value)
        if applied:
            if clip and norm_value > clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            self.scaler.step(optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        # A scale below 1 cannot be what made a number too large: then it is the model or the data.
        lowered = self.scaler.get_scale() < scale
        overflow = not applied and lowered and math.isfinite(loss_value) and scale >= 1
        optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_value, norm_value, applied, overflow)

    def peak_memory(self) -> int:
        """Bytes: the device's peak allocation, or the process's largest resident set on a CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        try:  # on Linux ru_maxrss is never less than that of the process that started this one
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # ------------------------------------------------------------------------ randomness

    def seed(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        """Every generator's state, as tensors and plain values (no pickled objects)."""
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        key_tensor = torch.from_numpy(np.asarray(keys).astype(np.int64))
        state = {
            "python": [version, list(internal), gauss],
            "numpy": [
                name,
                key_tensor,
                position,
                has_gauss,
                cached,
            ],
            "torch": torch.get_rng_state(),
        }
        if self.kind == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.torch_device)
        if self.kind == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if self.kind == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.torch_device)
        if self.kind == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])


def _keep_freed_memory() -> None:
    """Let glibc keep freed buffers for the next step instead of returning them to the kernel.

    Activations and gradients are freed and allocated anew in every step; giving their pages back
    and faulting them in again costs about 6 % of a step. Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 32 * 2**20)  # the most that glibc allows
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def available() -> list[str]:
    """The accelerators of this machine, best first."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def _choose(accelerator: str, key: str) -> str:
    there = available()
    wanted = {"auto": there[0], "gpu": "cuda", "tpu": "xla"}.get(accelerator, accelerator)
    if wanted not in there:
        raise UserError(
            f"{key}: found {accelerator!r}, which this machine does not "
            f"have; allowed here: {', '.join(['auto', *there])}"
        )
    return wanted
