"""Faster modules with the same results, for any model that has their like.

    speed_up(model)     puts them in place of the model's own

Attention through PyTorch's fused kernels, float32 products on CPUs through oneDNN, feed-forward
blocks that keep less for the backward pass, norms in fewer passes. What replaces what is in
`speed_up`; a module that is not known, or does not compute the same, stays as it is.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP, GPTNeoSelfAttention
from transformers.pytorch_utils import Conv1D

from data import IGNORE
from extras.probe import close, random_weights, succeeds

# --------------------------------------------------------------------------------- attention


def packed_mask(lengths: list[int], device: torch.device) -> Tensor:
    """The lengths of a packed row's samples, in the place of an attention mask: int64 [1, 1, 1, N].

    transformers passes a mask of four dimensions on to the attention as it is. Where a model makes
    another one of it, it has more to say than where samples end, and cannot be packed.
    """
    return torch.tensor(lengths, device=device)[None, None, None]


def packed_lengths(attention_mask: Tensor | None) -> list[int] | None:
    """What `packed_mask` was given; None for any other mask, which is bool or of floats."""
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.ndim != 4:
        return None
    return attention_mask.flatten().tolist()


class SdpaGPTNeoAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention through scaled_dot_product_attention.

    transformers has GPT-Neo in eager form only, which builds a float32 [B, H, T, S] matrix a
    layer. Two things are GPT-Neo's own: queries are not scaled, and in local layers a token sees
    only the `window_size` newest tokens, itself included.
    """

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query [B, H, T, D]; key, value [B, H, S, D]; mask bool or additive, [B, 1, T, S].

        With a `packed_mask` each sample is attended to alone.
        """
        lengths = packed_lengths(attention_mask)
        if lengths is None:
            return self._attend(query, key, value, attention_mask), None
        parts = _samples(lengths, query, key, value)
        return torch.cat([self._attend(q, k, v, None) for q, k, v in parts], dim=2), None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        T, S = query.size(-2), key.size(-2)
        window = self.config.window_size if self.attention_type == "local" else S
        if T == 1 and S > window:  # one new token: the window is the newest keys
            key, value = key[..., -window:, :], value[..., -window:, :]
            attention_mask = None if attention_mask is None else attention_mask[..., -window:]
        elif S > window:
            near = _causal_window(T, S, window, query.device)
            if attention_mask is None:
                attention_mask = near
            elif attention_mask.dtype == torch.bool:
                attention_mask = attention_mask & near
            else:
                lowest = torch.finfo(attention_mask.dtype).min
                attention_mask = attention_mask.masked_fill(~near, lowest)
        elif attention_mask is None and 1 < T < S:
            attention_mask = _causal_window(T, S, S, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=attention_mask is None and T > 1,
            scale=1.0,
        )


def _packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, which attends to the samples of a packed row one by one.

    query [B, H, T, D]; key, value [B, G, S, D] -> [B, T, H, D]
    """
    lengths = packed_lengths(attention_mask)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = _samples(lengths, query, key, value)
    outputs = [sdpa_attention_forward(module, *qkv, None, **kwargs)[0] for qkv in parts]
    return torch.cat(outputs, dim=1), None


def _samples(lengths: list[int], *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The parts of each sample of a packed row, of tensors [B, H, T, D]."""
    return zip(*(tensor.split(lengths, dim=2) for tensor in packed))


ALL_ATTENTION_FUNCTIONS.register("sdpa", _packed_sdpa)  # the same with any other mask


@functools.lru_cache(maxsize=8)  # one for each batch width, shared by all layers
def _causal_window(T: int, S: int, window: int, device: torch.device) -> Tensor:
    """bool [T, S]: which of S keys each of the T newest queries sees."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    return (distance >= 0) & (distance < window)


def whole_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool [B or 1, 1, T, T]: which keys each query sees, for a mask int64 [B, T] or None.

    A padding position sees itself, since a softmax over nothing would not be a number.
    """
    T = input_ids.shape[1]
    mask = _causal_window(T, T, T, input_ids.device)[None, None]
    if attention_mask is not None:
        itself = torch.eye(T, dtype=torch.bool, device=input_ids.device)
        mask = mask & attention_mask[:, None, None].bool() | itself
    return mask


# ----------------------------------------------------------- products, feed-forward and norms


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight [O, I] transposed + bias [O] -> [..., O], as F.linear.

    torch gives float32 products on CPUs to MKL, which leaves the AVX-512 of AMD's alone; oneDNN,
    which torch has as well, was about twice as fast on a Zen 5.
    """
    if (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and type(x) in PLAIN
        and type(weight) in PLAIN  # and not FSDP's, which is shared among ranks
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


PLAIN = (Tensor, nn.Parameter)
AdapterWeights = tuple[Tensor | None, Tensor | None, float]  # A [r, I], B [O, r] and their scale
NO_ADAPTER: AdapterWeights = (None, None, 1.0)
# An activation, and its gradient from that of its output and its input.
GELU = (
    functools.partial(F.gelu, approximate="tanh"),
    functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
)
SILU = (F.silu, torch.ops.aten.silu_backward)
GATED = ("gate_proj", "up_proj", "down_proj")
SAME = 1e-5  # a faster module stands in for one whose output it gives to this, see probe.close


def is_plain(module: Any) -> bool:
    """Whether a linear map is its weight and bias and nothing else.

    Not a subclass that scales or masks, not an adapter around it, nothing hooked onto it: only
    then may its weight be used without calling it.
    """
    return type(module) in (nn.Linear, FastLinear) and not _is_hooked(module)


def _is_hooked(module: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def adapter_of(module: Any) -> AdapterWeights:
    """Those of a linear map with one of lora.py's adapters, to be given to `linear`.

    Not of one that must be called: something is hooked onto it, or its adapter has dropout.
    """
    adapted = isinstance(module, FastLinear) and hasattr(module, "lora_A")
    if not adapted or _is_hooked(module) or (module.training and module.lora_dropout.p):
        return NO_ADAPTER
    return module.lora_A.weight, module.lora_B.weight, module.lora_scale


class LinearFunction(torch.autograd.Function):
    """linear(activation(x) * up) that keeps x and up for the backward pass, and nothing else.

    They are the widest tensors of a block, three to four times the hidden size; computing the
    activation and the product again costs about 1 % of a step. With an adapter (lora.py) its
    r numbers of each row are kept too; its update is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: Any,
        up: Tensor | None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """x, up [N, I], weight [C, I], bias [C], a [r, I], b [C, r] -> [N, C]

        kind: GELU, SILU or None.
        """
        ctx.kind, ctx.dtype, ctx.scale = kind, x.dtype, scale
        active = kind[0](x) if kind else x
        active = active if up is None else active.mul_(up)
        result, low = product(active, weight, bias), None
        if a is not None and b is not None:
            low = product(active, a) * scale
            result.addmm_(low, b.T.to(result.dtype))
        # Under a frozen weight, x is of no use afterwards.
        needed = kind is not None or up is not None or ctx.needs_input_grad[1] or a is not None
        ctx.save_for_backward(x if needed else None, up, weight, a, b, low)
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight, a, b, low = ctx.saved_tensors
        need_x, need_weight, need_bias, _, need_up = ctx.needs_input_grad[:5]
        (grad,) = outputs
        x_grad = up_grad = weight_grad = a_grad = b_grad = low_grad = None
        active = ctx.kind[0](x) if ctx.kind else x
        if need_weight or a is not None:
            inputs = (active if up is None else active * up).to(grad.dtype)
            if need_weight:
                weight_grad = product(grad.T, inputs.T).to(weight.dtype)
            if a is not None:
                low_grad = product(grad, b.T.to(grad.dtype)) * ctx.scale
                a_grad = product(low_grad.T, inputs.T).to(a.dtype)
                b_grad = torch.mm(grad.T, low.to(grad.dtype)).to(b.dtype)
            del inputs
        if need_x or need_up:
            x_grad = product(grad, weight.T.to(grad.dtype))
            if low_grad is not None:
                x_grad.addmm_(low_grad, a.to(grad.dtype))
            x_grad = x_grad.to(ctx.dtype)
            if up is not None:
                up_grad = active.mul_(x_grad) if need_up else None
                x_grad.mul_(up)
            if ctx.kind:
                x_grad = ctx.kind[1](x_grad, x)
        bias_grad = grad.sum(0).to(weight.dtype) if need_bias else None
        return x_grad, weight_grad, bias_grad, None, up_grad, a_grad, b_grad, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: Any = None,
    up: Tensor | None = None,
    adapter: AdapterWeights = NO_ADAPTER,
) -> Tensor:
    """linear(activation(x) * up): x, up [..., I], weight [O, I], bias [O] -> [..., O]

    adapter: see `adapter_of`.
    """
    if kind is None and adapter[0] is None and not torch.is_grad_enabled():
        return product(x, weight, bias)
    # Two dimensions inside: a view that a Function returns could not be changed in place.
    flat = None if up is None else up.reshape(-1, up.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    result = LinearFunction.apply(rows, weight, bias, kind, flat, *adapter)
    return result.view(*x.shape[:-1], weight.shape[0])


class FastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FastConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


class FusedGPTNeoMLP(GPTNeoMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        down, adapter = self.c_proj, adapter_of(self.c_proj)
        ours = is_plain(down) or adapter[0] is not None
        if not torch.is_grad_enabled() or not ours:  # then nothing is kept
            return super().forward(hidden_states)
        x = linear(self.c_fc(hidden_states), down.weight, down.bias, GELU, adapter=adapter)
        return self.dropout(x)


class FusedGatedMLP(nn.Module):
    """SwiGLU, the feed-forward block of Llama and most models after it."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        adapter = adapter_of(down)
        if not torch.is_grad_enabled():
            return down(F.silu(gate).mul_(up))
        if not is_plain(down) and adapter[0] is None:  # one with dropout, say
            return down(F.silu(gate) * up)
        return linear(gate, down.weight, down.bias, SILU, up, adapter)


class ScaledRMS(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight in float32, as Llama has it, in half as many passes.

    Zhang and Sennrich 2019, arXiv:1910.07467. With n = x * scale and C the width, the gradient of
    x is scale * (g * weight - n * mean(g * weight * n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., C], weight [C]"""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        grad = outputs[0].float()
        normed = x.float() * scale
        product = grad * normed
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        x_grad = (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)
        weight_grad = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad, None


class FusedRMSNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ScaledRMS.apply(hidden_states, self.weight, self.variance_epsilon)


def _stands_in(faster: type[nn.Module], module: nn.Module, width: int) -> bool:
    """Whether the class computes what the module does, on inputs of any usual size [4, width].

    Also while it trains: a module with dropout gives something else each time.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator).to(next(module.parameters()).device)

    def same() -> bool:
        return all(
            close(faster.forward(module, x * size), module.train(mode)(x * size), SAME)  # type: ignore[arg-type]
            for mode in (True, False)
            for size in (1.0, 30.0, 1e-3)
        )

    training = module.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]), random_weights(module):
        try:
            return succeeds(same)
        finally:
            module.train(training)


def _likeness(module: nn.Module) -> Any:
    """What modules have in common that need to be tried only once."""
    plain = {n: v for n, v in vars(module).items() if isinstance(v, (int, float, str))}
    plain.pop("layer_idx", None)
    shapes = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
    return type(module), shapes, tuple(plain.items()), str(getattr(module, "act_fn", None))


def _is_gated(module: nn.Module) -> bool:
    """Whether the module is three plain linear maps by the usual names, and an activation."""
    children = dict(module.named_children())
    owners = {name.partition(".")[0] for name, _ in module.named_parameters()}
    return (
        owners == set(GATED)
        and set(children) == {*GATED, "act_fn"}
        and all(is_plain(children[name]) for name in GATED)
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether the module is an RMSNorm that holds one weight and nothing else."""
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"]


def speed_up(model: PreTrainedModel) -> None:
    """Put faster modules with the same results in place of the model's own."""
    tried: dict[Any, bool] = {}

    def stands_in(faster: type[nn.Module], module: nn.Module, width: int) -> bool:
        like = (faster, *_likeness(module))
        if like not in tried:
            tried[like] = _stands_in(faster, module, width)
        return tried[like]

    for module in model.modules():
        children = dict(module.named_children())
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        if type(module) is Conv1D:
            module.__class__ = FastConv1D
        if type(module) is GPTNeoSelfAttention:
            module.__class__ = SdpaGPTNeoAttention
            module.bias = None  # the [1, 1, context, context] mask of the eager form
        if type(module) is GPTNeoMLP and type(module.act) is NewGELUActivation:
            module.__class__ = FusedGPTNeoMLP
        for name, child in children.items():
            # The same formula written out in Python, as eight operations over the widest tensor.
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
        if model.dtype != torch.float32:  # transformers rounds to float32 inside, in any dtype
            continue
        if _is_gated(module) and stands_in(FusedGatedMLP, module, module.gate_proj.in_features):
            module.__class__ = FusedGatedMLP
        if _is_norm(module) and stands_in(FusedRMSNorm, module, module.weight.numel()):
            module.__class__ = FusedRMSNorm
    if model.config.model_type == "gpt_neo":
        # Lets transformers skip the mask when causality alone decides.
        model.config._attn_implementation = "sdpa"
    if model.config.model_type == "rwkv":
        # For float16 RWKV divides its own weights when it stops training and multiplies them when
        # it goes on; a checkpoint made in between would hold other weights.
        model.base_model._rescale_layers = lambda: None


# ------------------------------------------------------------------------- the loss, in chunks


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy through the output head, in chunks of positions.

    The gradient of a chunk is taken while its logits are there, so that neither logits nor their
    gradient ever exist for more than one chunk. softmax(logits) - onehot(target) is written over
    the logits themselves, and the head's gradient grows in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target_ids: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: tuple[float, float | None],
        rows: int,
    ) -> Tensor:
        """hidden [M, C], target_ids [M], weight [V, C], bias [V]; the summed loss, a scalar.

        scaling: a factor on the logits, and a soft cap. rows: of hidden, in a chunk.
        """
        factor, softcap = scaling
        need_hidden, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.zeros_like(hidden) if need_hidden else None
        weight_grad: Tensor | None = None
        bias_grad = torch.zeros_like(bias) if need_bias and bias is not None else None
        for start in range(0, len(hidden), rows):
            h, ids = hidden[start : start + rows], target_ids[start : start + rows]
            logits = product(h, weight, bias)
            dtype = logits.dtype  # autocast's, if it is on
            scores = logits.to(exact)  # the same memory when there is nothing to convert
            if factor != 1.0:
                scores *= factor
            if softcap:
                scores = scores.div_(softcap).tanh_()
                slope = 1 - scores.square()
                scores = scores * softcap
            valid = (ids != IGNORE)[:, None]
            ids = ids[:, None].where(valid, 0)
            # In place, as a second tensor of this size is not in the processor's cache any more.
            scores -= scores.amax(-1, keepdim=True)
            chosen = scores.gather(-1, ids)
            total = scores.exp_().sum(-1, keepdim=True)
            loss += ((total.log() - chosen) * valid).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            scores *= valid / total
            scores.scatter_add_(-1, ids, -valid.to(exact))
            if softcap:
                scores *= slope
            if factor != 1.0:
                scores *= factor
            if bias_grad is not None:
                bias_grad += scores.sum(0)
            scores = scores.to(dtype)
            if hidden_grad is not None:
                hidden_grad[start : start + rows] = product(scores, weight.T.to(dtype))
            if need_weight:
                h = h.to(dtype)
                if weight_grad is None:
                    weight_grad = product(scores.T, h.T).to(weight.dtype)
                elif weight_grad.dtype == dtype:
                    weight_grad.addmm_(scores.T, h)
                else:
                    weight_grad += scores.T @ h
        if need_weight and weight_grad is None:  # a batch without targets
            weight_grad = torch.zeros_like(weight)
        ctx.grads = (hidden_grad, None, weight_grad, bias_grad, None, None)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # so that autograd may add others to them in place
        return tuple(None if g is None else g.mul_(outputs[0]) for g in grads)


# ------------------------------------------------------------------------------------ memory


def set_allocator(keep_freed: bool) -> None:
    """Let glibc keep freed buffers for the next step, or return them to the kernel at once.

    Activations and gradients are freed and allocated anew in every step; giving their pages back
    and faulting them in again costs about 6 % of a step. With several ranks the threads that carry
    gradients allocate too, each from a heap of its own, and what is kept there was measured to
    make 4.2 GB of 2.9. Elsewhere than on glibc nothing happens.

    oneDNN keeps the code for 1,024 shapes of products, about 0.6 MB each, although every step
    brings new ones; those of one step are enough. It reads the variable at its first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if not keep_freed:
        mallopt(m_mmap_threshold, 2**20)
        return
    mallopt(m_mmap_threshold, 32 * 2**20)  # the most that glibc allows
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)
