"""Frozen weights in 4 or 8 bits, and optimizers that keep less, through bitsandbytes.

    quantize(model, "nf4", device)      the projections below an adapter, packed
    small_optimizer(params, groups)     instead of AdamW

          ┌── Q [out, in], packed ── whole for one product, and thrown away ──┐
    x ────┤                                                                   + ──── y
          └─ A, B: lora.py's, in the dtype that they train in ────────────────┘

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314. `nf4` keeps 4 bits a weight and one scale for each
64 of them, the scales again in 8 bits (double quantisation): 4.13 bits in all. `int8` keeps the
weights of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), 8 bits and a scale for each row. Its
other half, activations in 8 bits but for columns with an outlier in some row of the batch, is left
out: an answer would depend on what else is in its batch.

Products are those of the whole weight, in the dtype of the precision, forward and backward. The
modules of bitsandbytes are not used: in evaluation on some CPUs theirs pack the weight anew, with
rounding, so that training would go on with another base.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lora
from config import ModelParams, UserError
from extras.speed import FastConv1D, FastLinear, product

BLOCK = 64  # weights that have a scale together in nf4
# What can be packed: maps that are their weight and bias and nothing else. Beside each what is left
# of it when the faster forward, which reads the weight, is gone.
PLAIN: dict[type, Any] = {
    nn.Linear: nn.Linear,
    FastLinear: nn.Linear,
    Conv1D: Conv1D,
    FastConv1D: Conv1D,
}


def bitsandbytes(key: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The library, for what a configuration key asks for.

    Raises:
        UserError: it is not installed, or has nothing for the device or the weights' dtype.
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{key}; bitsandbytes is used on CPUs and CUDA GPUs, not on {device.type}")
    if dtype == torch.float64:
        raise UserError(f"{key}; bitsandbytes has no float64 (trainer.params.precision: 64)")
    try:
        import bitsandbytes as library
    except ImportError:
        raise UserError(
            f"{key}, which needs bitsandbytes: pip install -r requirements-quantized.txt"
        ) from None
    return library


# -------------------------------------------------------------------------------- the weights


class Quantized(nn.Module):
    """What stands in front of a projection's own class: its product, through the packed weight.

    weight: nf4 uint8 [out * in / 2, 1], two weights in a byte; int8 [out, in]. scales: what
    bitsandbytes calls a QuantState, or float32 [out]. width: in.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scales: Any
    width: int

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return Product.apply(x, self)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as it acts."""
        from bitsandbytes import functional

        if self.weight.dtype == torch.int8:
            return functional.int8_vectorwise_dequant(self.weight, self.scales).to(dtype)
        self.scales.dtype = dtype
        return functional.dequantize_4bit(self.weight, self.scales).view(-1, self.width)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Take the scales along to another device; they keep their dtype."""
        super()._apply(fn, recurse)
        moved = self.scales.to(self.weight.device)
        self.scales = self.scales if moved is None else moved  # a QuantState changes itself
        return self


class Product(torch.autograd.Function):
    """x W^T + bias of a packed W, which is unpacked again for the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Quantized) -> Tensor:
        """x [..., in] -> [..., out]"""
        ctx.module, ctx.dtype = module, x.dtype
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        return product(x, module.whole(dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = outputs
        return product(grad, ctx.module.whole(grad.dtype).T).to(ctx.dtype), None


@functools.cache
def _quantized(kind: Any) -> Any:
    return type(f"Quantized{kind.__name__}", (Quantized, kind), {})


@torch.no_grad()
def quantize(model: PreTrainedModel, kind: str, device: torch.device) -> str:
    """Pack the frozen projections of a model that has its adapter; returns a remark for the user.

    Output head, embeddings, norms, experts in one tensor and blocks that train whole stay as they
    are. Each weight goes to `device` first, where packing is fast and whole weights have no room
    together.

    Raises:
        UserError: see `bitsandbytes`; or nothing can be packed.
    """
    key = f"model_params.adapter.quantize: found {kind!r}"
    library = bitsandbytes(key, device, model.dtype)
    before = _bytes(model.parameters())
    names = []
    for name, module in lora.projections(model).items():
        adapted = isinstance(module, lora.LoRA)
        own = type(module).__bases__[1] if adapted else type(module)
        if own not in PLAIN or module.weight.requires_grad or module.weight.numel() % BLOCK:
            continue
        whole = module.weight.T if isinstance(module, Conv1D) else module.weight
        packed, scales = _pack(library, whole.to(device).contiguous(), kind)
        module.weight = nn.Parameter(packed, requires_grad=False)
        packing = _quantized(PLAIN[own])
        module.__class__ = lora.adapted(packing) if adapted else packing
        module.scales, module.width = scales, whole.shape[1]  # type: ignore[assignment]
        names.append(name)
    if not names:
        raise UserError(f"{key}; {model.config.model_type} has no projections that can be packed")
    after = _bytes(model.parameters()) + _bytes(scales_of(model))
    return (
        f"{len(names)} projections of the base in {kind}: its weights take {after / 1e6:,.1f} MB "
        f"instead of {before / 1e6:,.1f}"
    )


def _pack(library: Any, whole: Tensor, kind: str) -> tuple[Tensor, Any]:
    """A weight [out, in] packed, and its scales; see `Quantized`."""
    functional = library.functional
    if kind == "nf4":
        # One block a row: with rows of 32 or 96, bitsandbytes 0.50 takes the wrong scales on a CPU.
        rows = whole.view(-1, BLOCK)
        return functional.quantize_4bit(
            rows, blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
    packed, scales, _ = functional.int8_vectorwise_quant(whole.half())  # the dtype it takes on GPUs
    return packed, scales


def scales_of(model: nn.Module) -> Iterator[Tensor]:
    """What lies in memory beside the packed weights."""
    for module in model.modules():
        if isinstance(module, Quantized):
            scales = module.scales
            yield from (scales,) if isinstance(scales, Tensor) else (
                scales.absmax, scales.state2.absmax
            )  # fmt: skip


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ----------------------------------------------------------------------------- the optimizers


def small_optimizer(params: ModelParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `model_params.optimizer` names, where that is not AdamW.

    `adamw_8bit` keeps AdamW's two moments in 8 bits, a scale for each 256 numbers; tensors of less
    than 4,096 numbers keep 32 bits (Dettmers et al. 2021, arXiv:2110.02861). `paged_adamw_8bit`
    lets them move to the host's memory where the GPU's is full. `adafactor` keeps sums over rows
    and columns in place of the second moment, and no first (Shazeer and Stern 2018,
    arXiv:1804.04235). `sgd` keeps nothing: no momentum.

    Args:
        groups: of parameters, each with its `weight_decay`.

    Raises:
        UserError: the parameters are on a device that cannot do it.
    """
    name, first = params.optimizer, groups[0]["params"][0]
    device = first.device
    key = f"model_params.optimizer: found {name!r}"
    if device.type == "xla":
        raise UserError(f"{key}; allowed on a TPU: adamw")
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=params.learning_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=params.learning_rate)
    library, paged = bitsandbytes(key, device, first.dtype), name.startswith("paged")
    if paged and device.type != "cuda":
        raise UserError(f"{key}, which needs a CUDA GPU; allowed here: adamw_8bit")
    return library.optim.AdamW8bit(
        groups, lr=params.learning_rate, betas=tuple(params.adam_betas), is_paged=paged
    )
