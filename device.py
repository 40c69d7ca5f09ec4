"""What differs between cpu, cuda, mps and xla; precision; ranks.

    device = open_device("auto", "bf16-mixed")

The training loop asks a `Device` for everything that differs between machines and never branches
on one itself. Several processes are started by `torchrun`; `Device.ranks` is how they
communicate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import freeze
from config import UserError
from data import Batch
from extras.probe import out_of_memory

if TYPE_CHECKING:
    from model import AnswerModel

WEIGHTS = {"64-true": torch.float64, "bf16-true": torch.bfloat16}  # float32 otherwise
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


Result = TypeVar("Result")


class Ranks:
    """The processes that work on one run: those that torchrun started, or this one alone.

    rank, world_size: among all of them; local_rank: among those of this machine.
    """

    def __init__(self, kind: str) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and not distributed.is_initialized():
            # gloo carries what the host decides, whatever carries the gradients. The group is never
            # destroyed: its destructor may wait for a thread that waits for Python's lock.
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            # After a restart, torchrun's store still holds the addresses of the dead processes.
            attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store, rank, count = next(distributed.rendezvous("env://"))
            store = distributed.PrefixStore(attempt, store)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on one rank at least."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Result) -> list[Result]:
        """The values of all ranks, in the order of the ranks, on every one of them."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            distributed.all_gather_object(values, value)
        return values

    def on_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Call it on rank 0 alone; its result on every rank.

        If it fails, rank 0 raises the error (and so reports it) and the others just exit.
        """
        if self.world_size == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error = raised
        sent = [result, error is not None]  # not the error, since not every one can be sent
        distributed.broadcast_object_list(sent)
        result, failed = sent
        if failed:
            raise error or UserError("")
        return result

    @contextmanager
    def one_by_machine(self) -> Iterator[None]:
        """Inside, the first rank of each machine goes ahead and the others follow when it is done.

        For work whose result is kept on the machine's disk, so that it is done once.
        """
        if self.local_rank > 0:
            self.any_rank(False)
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.any_rank(False)


def explain(error: RuntimeError) -> str | None:
    """What the user can do about an error of PyTorch's; None for any other error."""
    text = str(error)
    if out_of_memory(error):
        return (
            "out of memory: halve data.batch_size and double accumulate_grad_batches (the result "
            "is the same), set trainer.params.gradient_checkpointing: true, or lower "
            "data.max_length; in a test, lower test_params.batch_size"
        )
    # As gloo and NCCL put it.
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    if any(word in text for word in words):
        return (
            "another rank is gone (killed, or failed with a message of its own), so this one "
            "stops; go on with trainer.ckpt_path=last"
        )
    return None


class Device:
    """A CPU, a CUDA GPU or an MPS GPU, and this process's place among the ranks.

    static_shapes: every batch must have the same shape, because each new one is compiled.
    packing_pays: whether batches without padding are faster. They take one attention call for each
        sample, which was measured on CPUs only and may cost a GPU more than it saves.
    shards: devices that this process spreads each batch over (the chips of a TPU).
    lockstep: a forward pass takes all ranks, because each has a slice of the parameters.
    """

    static_shapes = False
    shards = 1
    lockstep = False

    def __init__(self, kind: str, precision: str = "32-true") -> None:
        """
        Raises:
            UserError: it cannot do the precision.
        """
        self.ranks = Ranks(kind)
        index = self.ranks.local_rank if kind == "cuda" else None
        self.torch_device = torch.device(kind) if index is None else torch.device(kind, index)
        self.kind = kind
        self.packing_pays = kind == "cpu"
        self.precision = precision
        self.weights_dtype = WEIGHTS.get(precision, torch.float32)
        self.autocast_dtype = AUTOCAST.get(precision)
        if self.kind == "mps" and precision in ("64-true",):
            raise UserError("trainer.params.precision: found 64; MPS has no float64")
        self.scaler = torch.amp.GradScaler(self.kind, enabled=precision == "16-mixed")
        if self.kind == "cpu":
            from extras.speed import set_allocator

            set_allocator(keep_freed=self.ranks.world_size == 1)
        if self.kind == "cuda":
            if self.ranks.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun --nproc_per_node: found {os.environ['LOCAL_WORLD_SIZE']}; allowed: "
                    f"at most {torch.cuda.device_count()}, the GPUs of this machine"
                )
            torch.cuda.set_device(self.torch_device)
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
        emulated = self.kind == "cuda" and not torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        if "bf16" in self.precision and emulated:
            return f"this GPU emulates bfloat16; use 16-mixed instead of {self.precision}"
        if self.kind == "cuda" and self.precision == "64-true":
            return "float64 runs at 1/2 to 1/64 of float32's rate on GPUs"
        return None

    # ----------------------------------------------------------------------------- ranks

    def parallel(self, model: AnswerModel, strategy: str, reached: bool = True) -> nn.Module:
        """The model on this device, as what the loop calls: several ranks add up their gradients.

        `ddp` keeps the whole model on every rank. `fsdp` (FSDP2) changes `model` in place: each
        rank keeps a slice of every parameter, and whole ones exist for one block at a time.

        reached: whether any text reaches every parameter that trains; if not, DDP searches for
            those that it does not reach (experts that no token of a batch chose, the encoder of
            another modality).

        Raises:
            UserError: `fsdp` for a model without a stack of blocks.
        """
        if self.ranks.world_size == 1 or strategy == "ddp":
            self.move_model(model)
        if self.ranks.world_size == 1:
            return model
        if strategy == "ddp":
            # All ranks alike: those that look tell each other what they found.
            looks = self.ranks.any_rank(not reached)
            return DistributedDataParallel(
                model, gradient_as_bucket_view=True, find_unused_parameters=looks
            )
        self.lockstep = True
        mesh = init_device_mesh(self.kind, (self.ranks.world_size,))
        for block in freeze.blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in ("next_logits", "target_losses"):
            register_fsdp_forward_method(model, method)
        return model

    def move_model(self, model: AnswerModel) -> None:
        model.to(self.torch_device)

    def exchange_gradients(self, model: nn.Module, now: bool) -> None:
        """Set whether the next backward pass ends with adding up the gradients over the ranks.

        Once a step is enough for DDP. FSDP does it in every pass: to wait would mean to keep
        whole gradients, and it is there to keep slices.
        """
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = now

    def goes_on(self, busy: bool) -> bool:
        """Whether to run another forward pass: in lockstep, as long as any rank has work."""
        return self.ranks.any_rank(busy) if self.lockstep else busy

    # -------------------------------------------------------------------------- one step

    def feed(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """(batch on the device, whether it is the last), each copied while another is worked on."""
        ready: Batch | None = None
        for batch in self._uploaded(batches):
            if ready is not None:
                yield ready, False
            ready = batch
        if ready is not None:
            yield ready, True

    def _uploaded(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return map(self.upload, batches)

    def synchronise(self) -> None:
        """Run what was collected so far, on a device that collects operations first."""

    def upload(self, batch: Batch) -> Batch:
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
        dtype = torch.float32 if self.kind in ("mps", "xla") else torch.float64
        return torch.zeros((), dtype=dtype, device=self.torch_device)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.kind, dtype=self.autocast_dtype)

    def step_if(self, finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step if `finite`; else weights and optimizer state stay as they are.

        XlaDevice does the same inside of its graph, where the host does not look at `finite`.
        """
        if finite:  # here the host waits for the device, once a step
            self.scaler.step(optimizer)

    def read(self, *scalars: Tensor) -> list[float]:
        """The values of scalars, which ends the device's work on a step."""
        dtype = self.zero().dtype
        values = torch.stack([scalar.to(dtype) for scalar in scalars])
        self.synchronise()
        return values.tolist()

    def peak_memory(self) -> int:
        """Bytes: the device's peak allocation, or the process's largest resident set on a CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device)
        try:  # on Linux ru_maxrss is never less than that of the process that started this one
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource  # not on Windows

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # ------------------------------------------------------------------------ randomness

    def seed(self, seed: int) -> None:
        """Seed what training draws from; each rank draws numbers of its own, for dropout."""
        torch.manual_seed(seed + self.ranks.rank)

    def rng_state(self) -> dict[str, Tensor]:
        """The states of the generators that training draws from: torch's, of CPU and device."""
        state = {"torch": torch.get_rng_state()}
        if self.kind == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.torch_device)
        if self.kind == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])
        if self.kind == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.torch_device)
        if self.kind == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which FSDP keeps a slice on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def available() -> list[str]:
    """The accelerators of this machine, best first."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    chips = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")
    if find_spec("torch_xla") and (os.environ.get("PJRT_DEVICE") or chips):
        # In front only where there is a TPU: PJRT_DEVICE=CPU is for trying things out.
        found.insert(0 if os.environ.get("PJRT_DEVICE", "TPU") == "TPU" else len(found), "tpu")
    return [*found, "cpu"]


def open_device(
    accelerator: str = "auto",
    precision: str = "32-true",
    key: str = "trainer.params.accelerator",
) -> Device:
    """The device that the configuration asks for; `key` is the key to name in messages.

    Raises:
        UserError: the accelerator is absent or cannot do the precision.
    """
    there = available()
    wanted = {"auto": there[0], "gpu": "cuda"}.get(accelerator, accelerator)
    if wanted not in there:
        found, allowed = repr(accelerator), ["auto", *there]
        if key == accelerator:  # test.yaml's `cuda` and `tpu`
            found, allowed = "true", ["false"]
        raise UserError(
            f"{key}: found {found}, but this machine has {' and '.join(there)}; "
            f"allowed here: {', '.join(allowed)}"
        )
    if wanted != "tpu":
        return Device(wanted, precision)
    from extras.xla import XlaDevice

    return XlaDevice("xla", precision)
