"""TPUs, through torch_xla."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from data import Batch
from device import Device
from extras import probe
from model import AnswerModel, evaluating


class XlaDevice(Device):
    """A TPU, or whatever else PJRT_DEVICE names, through torch_xla.

    Operations are collected into a graph, which is compiled when it is new and runs at a
    `synchronise`. So shapes never change, a step is one graph with one break behind it, and
    nothing in between asks for a value. One process drives all chips of the machine: batches are
    split among them, parameters are on each, and XLA adds up the gradients (SPMD). A successor of
    torch_xla belongs here and nowhere else.
    """

    static_shapes = True

    def __init__(self, kind: str, precision: str = "32-true") -> None:
        import torch_xla
        from torch_xla.core import xla_model

        if precision == "16-mixed":
            raise UserError("trainer.params.precision: found 16; TPUs compute in bf16: bf16-mixed")
        super().__init__(kind, precision)
        self.xla, self.xla_model = torch_xla, xla_model
        if self.ranks.world_size > 1:
            raise UserError(
                "trainer.params.accelerator: a TPU has one process; start it without torchrun"
            )
        runtime = torch_xla.runtime
        self.shards = runtime.global_runtime_device_count()
        self.sharding = None
        if self.shards > 1:
            from torch_xla.distributed import spmd

            runtime.use_spmd()
            mesh = spmd.Mesh(np.arange(self.shards), (self.shards,), ("batch",))
            self.sharding = spmd.ShardingSpec(mesh, ("batch", None))
        self.torch_device = torch_xla.device()

    def describe(self) -> str:
        return f"xla ({self.shards} x {self.xla.runtime.device_type()})"

    def slow_precision(self) -> str | None:
        if self.precision == "64-true":
            return "TPUs emulate float64; use 32 or bf16-mixed"
        return None

    def move_model(self, model: AnswerModel) -> None:
        # transformers looks at values to see which mask it needs, and XLA must not wait for them.
        # One mask of ours is right for all layers where each sees all that came before.
        if model.sees_everything:
            with torch.no_grad(), evaluating(model), probe.random_weights(model):
                model.makes_masks = probe.succeeds(probe.takes_masks, model)
        model.to(self.torch_device)
        model.model.tie_weights()  # moving to XLA makes two parameters of a shared one

    def synchronise(self) -> None:
        self.xla.sync()

    def _uploaded(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        from torch_xla.distributed.parallel_loader import ParallelLoader

        # Without its iterator, which would break the graph between backward pass and update.
        # An error in its threads just ends the batches, so it is kept here and raised.
        errors: list[Exception] = []

        def watched() -> Iterator[Batch]:
            try:
                yield from batches
            except Exception as error:
                errors.append(error)

        loader = ParallelLoader(watched(), [self.torch_device], input_sharding=self.sharding)
        try:
            while (batch := loader.next_item(self.torch_device)) is not None:
                yield batch
            while not loader._exception_queue.empty():
                errors.append(loader._exception_queue.get())
            if errors:
                raise errors[0]
        finally:
            loader.close()

    def step_if(self, finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """As on other devices, but decided inside the graph: what a step changed is put back."""
        before = {id(t): t.clone() for t in _updated(optimizer)}
        optimizer.step()
        with torch.no_grad():
            for t in _updated(optimizer):
                t.copy_(torch.where(finite, t, before.get(id(t), torch.zeros_like(t))))

    def peak_memory(self) -> int:
        try:
            return int(self.xla_model.get_memory_info(self.torch_device)["peak_bytes_used"])
        except (KeyError, RuntimeError):  # PJRT's CPU does not say
            return super().peak_memory()

    def rng_state(self) -> dict[str, Any]:
        return {**super().rng_state(), "xla": self.xla_model.get_rng_state()}

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.xla_model.set_rng_state(seed)

    def set_rng_state(self, state: dict[str, Any]) -> None:
        super().set_rng_state(state)
        if "xla" in state:
            self.xla_model.set_rng_state(state["xla"])


def _updated(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor that a step of the optimizer changes."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p
            yield from (v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor))
