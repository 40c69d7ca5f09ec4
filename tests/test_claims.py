"""Every speed-up is really taken, family by family: an update that turns one off is a red test."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import model as model_module
import zoo
from config import GenerateParams
from data import Conversation, Prompt, Samples, collate
from device import Device
from extras import probe, speed
from extras.generation import Batching, Decoding, generate
from model import AnswerModel

# Batches without padding, the head on targets only, the cache in slots, and what stands in for the
# model's own modules. What is claimed in docs/details.md for a family is claimed here.
PLAIN, SWIGLU = {"FastLinear"}, {"FastLinear", "FusedGatedMLP", "FusedRMSNorm"}
CLAIMS: dict[str, tuple[bool, bool, str, set[str]]] = {
    "gpt_neo": (True, True, "slots", {"FastLinear", "FusedGPTNeoMLP", "SdpaGPTNeoAttention"}),
    "gpt2": (True, True, "slots", {"FastLinear", "FastConv1D", "GELU"}),
    "gpt_neox": (True, True, "slots", PLAIN),
    "opt": (True, True, "slots", PLAIN),
    "phi": (True, True, "slots", {"FastLinear", "GELU"}),
    "llama": (True, True, "slots", SWIGLU),
    "qwen2": (True, True, "slots", SWIGLU),
    "qwen3": (True, True, "slots", SWIGLU),
    "granite": (True, True, "slots", SWIGLU),
    "cohere": (True, True, "slots", {"FastLinear", "FusedGatedMLP"}),
    "olmo2": (True, True, "slots", SWIGLU),
    "bloom": (False, True, "slots", PLAIN),
    "mistral": (False, True, "slots", SWIGLU),
    "gemma2": (False, True, "slots", PLAIN),
    "gemma3_text": (False, True, "slots", PLAIN),
    "gpt_oss": (False, True, "slots", PLAIN),
    "llama4_text": (False, True, "groups", PLAIN),
    "mamba2": (False, True, "groups", PLAIN),
    "qwen3_next": (False, True, "groups", PLAIN),
    "lfm2": (False, True, "groups", PLAIN),
    "falcon_h1": (False, True, "groups", PLAIN),
}


@functools.cache
def opened(name: str) -> AnswerModel:
    plain = zoo.build(name, 1536, std=0.2)
    speed.speed_up(plain)
    return AnswerModel(plain).eval()


@pytest.fixture(scope="module")
def samples(samples: Samples) -> Samples:
    return samples.subset(np.arange(4))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_paths_that_a_family_takes(name: str) -> None:
    model, (packs, split, cache, stand_ins) = opened(name), CLAIMS[name]
    found = {type(module).__name__ for module in model.modules()}
    assert (model.can_pack, model.split, model.cache) == (packs, split, cache)
    assert stand_ins <= found
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert not left, "every plain linear map goes through `product`"
    if "FusedGatedMLP" in stand_ins:
        gated = [m for m in model.modules() if hasattr(m, "gate_proj")]
        assert gated and {type(m).__name__ for m in gated} == {"FusedGatedMLP"}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_token_goes_through_the_model_once(name: str, samples: Samples) -> None:
    """With a cache that is not found, each new token would bring all those before it again."""
    model, new = opened(name), 6
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].numel())

    prompts = [Prompt(Conversation.of_pair(i, ""), samples.prompt(i)) for i in range(len(samples))]
    never = GenerateParams(max_new_tokens=new, eos_token_id=1535, suppress_tokens=[1535])
    handle = model.model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        decoding, batching = Decoding(never, seed=0), Batching(batch_size=1)
        answers = list(generate(model, prompts, Device("cpu"), decoding, batching))
    finally:
        handle.remove()
    assert [len(answer.tokens) for answer in answers] == [new] * len(prompts)
    once = sum(len(prompt.input_ids) + new - 1 for prompt in prompts)
    assert sum(seen) == once


@pytest.mark.parametrize("name", [name for name, claim in CLAIMS.items() if claim[0]])
def test_packed_samples_are_attended_to_one_by_one(
    name: str, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PyTorch's fused attention, with no mask that would keep its fast kernel away."""
    model = opened(name)
    attended: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended.append(query.shape[2])
        if name != "gpt_neo":  # whose local layers need one
            assert kwargs.get("attn_mask") is None and kwargs["is_causal"]
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        model(collate(samples, np.arange(4), packed=True))
    depth = model.model.config.num_hidden_layers
    assert attended == samples.lengths.tolist() * depth


class Widest(TorchDispatchMode):
    """The largest number of positions for which logits exist at once."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("name", CLAIMS)
def test_no_logits_of_a_whole_sequence_exist(
    name: str, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the loss, its gradient, what `test` measures, and the first step of an answer."""
    chunk, model = 3, opened(name)
    size = model.model.get_input_embeddings().num_embeddings
    monkeypatch.setattr(model_module, "LOGITS_PER_CHUNK", chunk * size)
    batch = collate(samples, np.arange(4), packed=model.can_pack)
    width = model.model.get_input_embeddings().embedding_dim
    with Widest(size) as seen:
        model(batch).backward()
        model.target_losses(collate(samples, np.arange(4)))
    model.zero_grad(set_to_none=True)
    # The head's own weight may lie transposed, [C, V].
    assert seen.rows in (chunk, width), seen.rows
    with torch.no_grad(), Widest(size) as first:
        ids = torch.from_numpy(samples.sample(0)[0].astype(np.int64))[None]
        model.next_logits(ids, torch.tensor([ids.shape[1] - 1]))
    assert first.rows in (1, width)


# ----------------------------------------------------------- what must not be taken by a fast path


class Adapter(nn.Module):
    """A low-rank detour around a linear map, as LoRA has it."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


WRAPPED = {
    "gpt_neo": ("q_proj", "c_fc", "c_proj", "lm_head"),
    "llama": ("q_proj", "gate_proj", "down_proj", "lm_head"),
    "cohere": ("o_proj", "down_proj", "lm_head"),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("as_hook", [False, True], ids=["wrapper", "hook"])
def test_an_adapter_put_around_a_map_later_keeps_its_gradient(
    name: str, as_hook: bool, samples: Samples
) -> None:
    """The fused paths use a map's weight without calling it; around an adapter they must not."""
    results = []
    for fast in (True, False):
        plain = zoo.build(name, 1536, std=0.2)
        if fast:
            speed.speed_up(plain)
        model = AnswerModel(plain).train()
        torch.manual_seed(3)
        adapters = []
        for parent in list(model.model.modules()):
            for child, base in list(parent.named_children()):
                if child in WRAPPED[name]:
                    outputs, inputs = base.weight.shape
                    adapters.append(Adapter(base, inputs, outputs))
                    nn.init.normal_(adapters[-1].up.weight, std=0.1)
                    if as_hook:
                        detour = nn.Sequential(adapters[-1].down, adapters[-1].up)
                        base.register_forward_hook(lambda m, x, y, d=detour: y + d(x[0]))
                    else:
                        setattr(parent, child, adapters[-1])
        if not fast:
            model.split = False  # whole logits, and no function of ours
        loss = model(collate(samples, np.arange(4), packed=model.can_pack and fast))
        loss.backward()
        grads = [p.grad for adapter in adapters for p in (adapter.down.weight, adapter.up.weight)]
        assert all(grad is not None for grad in grads)
        results.append((loss.detach(), *grads))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


OTHER_FORMULAS = {  # GELU, norms of 1 + weight, a norm with a mean
    "gemma": {"GemmaMLP", "GemmaRMSNorm"},
    "gemma2": {"Gemma2MLP", "Gemma2RMSNorm"},
    "cohere": {"CohereLayerNorm"},
}


@pytest.mark.parametrize("scale", [1, 1e-8, 0.0])
@pytest.mark.parametrize("name", [*OTHER_FORMULAS, "granite"])
def test_no_stand_in_has_another_formula(name: str, scale: float) -> None:
    """Of zeros, every formula makes the same: the trial must not be made with them."""
    plain = zoo.build(name, 1536, std=0.2)
    own = {type(module).__name__ for module in plain.modules()}
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(scale)
    speed.speed_up(plain)
    found = {type(module).__name__ for module in plain.modules()}
    assert OTHER_FORMULAS.get(name, set()) <= own & found
    if name == "cohere":
        assert AnswerModel(plain).factor == plain.config.logit_scale
    if name == "granite":
        assert AnswerModel(plain).factor == 1 / plain.config.logits_scaling


def test_a_head_that_is_more_than_a_linear_map_is_called(samples: Samples) -> None:
    class Scaled(nn.Linear):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__(base.in_features, base.out_features, bias=False)
            self.weight = base.weight
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.scale

    plain = zoo.build("llama", 1536)
    plain.lm_head = Scaled(plain.lm_head)
    model = AnswerModel(plain)
    assert not model.split
    model(collate(samples, np.arange(4))).backward()
    assert plain.lm_head.scale.grad is not None and plain.lm_head.scale.grad != 0


def test_state_that_crosses_samples_is_seen_however_weak_it_is() -> None:
    """Weights this small hide a leak from every tolerance; packing is tried with others."""
    for name in ("jamba", "lfm2", "falcon_h1"):
        plain = zoo.build(name, 1536, std=0.2)
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(1e-3)
        assert not AnswerModel(plain).can_pack, name


def test_trying_a_model_out_leaves_it_as_it_was() -> None:
    plain = zoo.build("gpt2", 1536)
    before = {name: (p, p.clone()) for name, p in plain.named_parameters()}
    generator = torch.get_rng_state()
    speed.speed_up(plain)
    model = AnswerModel(plain)
    probe.check_trainable(model)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, p in plain.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.grad is None
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_no_module_loses_its_dropout_to_a_faster_one() -> None:
    """Also where it is a function call inside of the module, and is off while it is tried."""
    if "seed_oss" not in zoo.available():
        pytest.skip("this transformers has no Seed-OSS")
    row = zoo.ZOO["seed_oss"] | {"vocab_size": 1536, "residual_dropout": 0.1}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("seed_oss", **row))
    for training in (True, False):
        plain.train(training)
        speed.speed_up(plain)
        assert any(type(module).__name__ == "SeedOssMLP" for module in plain.modules())
        assert plain.training == training


def test_a_mask_of_ours_stands_for_none_that_says_more() -> None:
    for name, expected in (("llama", True), ("gpt2", True), ("gpt_neo", True), ("mistral", False)):
        model = opened(name)
        with torch.no_grad(), probe.random_weights(model):
            right = probe.succeeds(probe.takes_masks, model)
        assert (right and model.sees_everything) == expected, name
    for name in ("mamba", "bloom", "mpt", "opt"):
        model = opened(name)
        (ids,) = probe.ids_of(12, vocab_size=1536)
        with torch.no_grad(), probe.random_weights(model):
            model.makes_masks = model.sees_everything and probe.succeeds(probe.takes_masks, model)
        with torch.no_grad():
            found = model.hidden_states(ids)
            model.makes_masks = False
            assert torch.allclose(found, model.hidden_states(ids), atol=1e-4), name
