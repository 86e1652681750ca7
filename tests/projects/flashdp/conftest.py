"""Small models in odd shapes, and DP-SGD done by hand: one plain backward per sample on a copy that
FlashDP never touched.

A test that takes the fixture `case` runs for every model; `parametrize("case", [...],
indirect=True)` picks some.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.flashdp import PoissonSampling, make_private
from projects.flashdp.private import DPModel

torch.set_num_threads(1)

VOCABULARY = 31
EPSILON_0 = 1e-10  # the paper's: factors are min(1, C / (norm + 1e-10))


# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and a batch. `make()` gives the same weights every time; `losses(model, batch)` is
    [B].
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    losses: Callable[[nn.Module, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-12  # in float64; wider where the layer itself computes in float32

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return copy.deepcopy(_made(self)).to(dtype)

    def data(self, dtype: torch.dtype = torch.float64) -> Tensor:
        batch = self.batch().clone()
        return batch.to(dtype) if batch.is_floating_point() else batch


@cache
def _made_named(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = CASES[name].build().double().eval()
        # no parameter at a value, such as LoRA's 0, that leaves others without a gradient
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _made(case: Case) -> nn.Module:
    return _made_named(case.name)


def randn(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, each sample of another size, so that bounds clip some and not others."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.3, 3, shape[0], dtype=torch.float64).view(
        -1, *[1] * (len(shape) - 1)
    )


def token_ids(samples: int, length: int, seed: int = 2) -> Tensor:
    """From a few tokens only, so that they repeat within a sample; every sample has the padding
    token 0 of the embedding's case.
    """
    ids = torch.randint(1, 9, (samples, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 0
    return ids


def value_losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).double().sub(0.3).square().mean(1)


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _between(*layers: nn.Module, width: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.Tanh(), *layers, nn.Tanh(), nn.Linear(width, 3)
    )


def _partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7))


def _llama_norm() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return _between(LlamaRMSNorm(5))


def _gemma_norm() -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return _between(GemmaRMSNorm(5))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=12,
            n_layer=2,
            n_head=3,
            n_positions=17,
            tie_word_embeddings=False,
            **_NO_DROPOUT,
        )
    )


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 12,
        "intermediate_size": 19,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    )


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 12,
        "ffn_dim": 19,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
        "max_position_embeddings": 17,
    }
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            dropout=0.0,
            **sizes,
        )
    )


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        _llama(),
        LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0),
    )


class Embedder(nn.Module):
    """Token embedding with a padding row, mixed over positions so that every row's gradient depends
    on the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, 6, padding_idx=0), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids).cumsum(1)))


class Decoder(nn.Module):
    """What Opacus has a rule for, layer by layer: embeddings, norms, linear layers. Positions have
    the batch dimension.
    """

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(17, width)
        self.up, self.down = nn.Linear(width, 23), nn.Linear(23, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]).repeat(len(ids), 1))
        # causal mixing
        x = self.norm_1(x).cumsum(1) / torch.arange(1, ids.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.head(self.norm_2(x + self.down(F.gelu(self.up(x)))))


def decoder_losses(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


OPT_FLATTENED = ("*.fc1", "*.fc2", "*.layers.*.final_layer_norm")

CASES = {
    case.name: case
    for case in (
        Case(
            "linear-2d",
            lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
            lambda: randn(5, 5),
            value_losses,
        ),
        Case(
            "linear-3d",
            lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)),
            lambda: randn(5, 11, 5),
            value_losses,
        ),
        Case(
            "linear-4d",
            lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
            lambda: randn(5, 2, 3, 5),
            value_losses,
        ),
        Case("partly-frozen", _partly_frozen, lambda: randn(5, 3, 5), value_losses),
        Case("conv1d", _conv1d, lambda: randn(5, 3, 5), value_losses),
        Case("layernorm", lambda: _between(nn.LayerNorm(5)), lambda: randn(5, 7, 5), value_losses),
        Case(
            "layernorm-2d",
            lambda: _between(nn.LayerNorm((3, 5))),
            lambda: randn(5, 2, 3, 5),
            value_losses,
        ),
        Case(
            "layernorm-whole-sample",
            lambda: _between(nn.LayerNorm((3, 5))),
            lambda: randn(5, 3, 5),
            value_losses,
        ),
        Case(
            "layernorm-no-bias",
            lambda: _between(nn.LayerNorm(5, bias=False)),
            lambda: randn(5, 7, 5),
            value_losses,
        ),
        Case("rmsnorm", lambda: _between(nn.RMSNorm(5)), lambda: randn(5, 7, 5), value_losses),
        Case(
            "rmsnorm-2d",
            lambda: _between(nn.RMSNorm((3, 5), eps=1e-3)),
            lambda: randn(5, 2, 3, 5),
            value_losses,
        ),
        Case("llama-rmsnorm", _llama_norm, lambda: randn(5, 7, 5), value_losses, tolerance=1e-6),
        Case("gemma-rmsnorm", _gemma_norm, lambda: randn(5, 7, 5), value_losses, tolerance=1e-6),
        Case("embedding", Embedder, lambda: token_ids(5, 11), value_losses),
        Case("decoder", Decoder, lambda: token_ids(5, 9), decoder_losses),
        Case("gpt2", _gpt2, lambda: token_ids(5, 9), token_losses),
        Case("llama", _llama, lambda: token_ids(5, 9), token_losses, tolerance=1e-6),
        Case("opt", _opt, lambda: token_ids(5, 9), token_losses, {"flattened": OPT_FLATTENED}),
        Case("lora", _lora, lambda: token_ids(5, 9), token_losses, tolerance=1e-6),
    )
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# ---- DP-SGD by hand ------------------------------------------------------------------------------

Gradients = dict[str, Tensor]


def per_sample_gradients(case: Case, batch: Tensor, model: nn.Module) -> list[Gradients]:
    """One plain backward per sample."""
    found = []
    for i in range(len(batch)):
        model.zero_grad()
        case.losses(model, batch[i : i + 1]).sum().backward()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        found.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
        )
    model.zero_grad()
    return found


@cache
def _sample_gradients(name: str, dtype: torch.dtype) -> list[Gradients]:
    return per_sample_gradients(CASES[name], CASES[name].data(dtype), CASES[name].make(dtype))


def sample_gradients(case: Case, dtype: torch.dtype = torch.float64) -> list[Gradients]:
    """Of the case's own model and batch; computed once."""
    return _sample_gradients(case.name, dtype)


def members(names: Sequence[str], groups: str) -> dict[str, list[str]]:
    """Names of parameters by clip group."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0] if groups == "layer" else name, []).append(name)
    return found


def norm_of(gradients: Gradients, names: Sequence[str]) -> float:
    return math.sqrt(sum(float(gradients[n].double().square().sum()) for n in names))


def bounds_in_the_middle(samples: list[Gradients], groups: str) -> dict[str, float]:
    """For each group a bound that some samples exceed and others do not (a group without any
    gradient gets a small one).
    """
    bounds = {}
    for group, names in members(list(samples[0]), groups).items():
        norms = sorted(norm_of(one, names) for one in samples)
        middle = len(norms) // 2
        bounds[group] = max(1e-6, 0.5 * (norms[middle - 1] + norms[middle]))
    return bounds


def clipped_by_hand(gradients: Gradients, bounds: dict[str, float], groups: str) -> Gradients:
    """A sample's share: each group of its gradient scaled down to its bound, or nothing where it is
    not finite.
    """
    found = {}
    for group, names in members(list(gradients), groups).items():
        norm = norm_of(gradients, names)
        factor = min(1.0, bounds[group] / (norm + EPSILON_0))
        found |= {
            n: gradients[n] * factor if math.isfinite(norm) else torch.zeros_like(gradients[n])
            for n in names
        }
    return found


def summed(shares: Sequence[Gradients]) -> Gradients:
    return {n: torch.stack([one[n] for one in shares]).sum(0) for n in shares[0]}


def clipped_share(samples: list[Gradients], bounds: dict[str, float], groups: str) -> float:
    """Of the (sample, group) pairs with a gradient, how many are above the bound."""
    pairs = [
        (norm_of(one, names), bounds[g])
        for g, names in members(list(samples[0]), groups).items()
        for one in samples
    ]
    pairs = [(norm, bound) for norm, bound in pairs if norm > 1e-9]
    return sum(norm > bound for norm, bound in pairs) / len(pairs)


# ---- FlashDP -------------------------------------------------------------------------------------


def wrap(
    model: nn.Module, *, size: int = 1000, expected: float = 4, lr: float = 1.0, **options: Any
) -> tuple[DPModel, Any]:
    """A private model, without noise unless asked for, and its optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    options = {
        "noise_multiplier": 0.0,
        "sampling": PoissonSampling(size, expected),
        "noise_seed": 3,
    } | options
    return make_private(model, optimizer, options.pop("sampling"), **options), optimizer


def gradients_of(model: nn.Module) -> Gradients:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def private_sums(
    case: Case,
    bounds: Any,
    *,
    batch: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    model: nn.Module | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> Gradients:
    """What a backward of FlashDP leaves in `.grad`, before the step. `weights` scale the samples'
    losses.
    """
    model = case.make(dtype) if model is None else model
    wrap(model, clip=bounds, **case.options | options)
    losses = case.losses(model, case.data(dtype) if batch is None else batch)
    if weights is not None:
        losses = losses * weights
    (losses.mean() if options.get("loss_reduction") == "mean" else losses.sum()).backward()
    return gradients_of(model)


def furthest(got: Gradients, wanted: Gradients, absolute: float = 1e-14) -> float:
    """The largest relative distance of a parameter's gradients, beyond `absolute`."""
    assert got.keys() == wanted.keys()
    distances = {n: float((got[n].double() - wanted[n].double()).norm()) for n in wanted}
    assert all(math.isfinite(d) for d in distances.values())
    return max(
        max(0.0, d - absolute) / max(float(wanted[n].double().norm()), 1e-300)
        for n, d in distances.items()
    )


@pytest.fixture
def helpers() -> SimpleNamespace:
    """The functions above, for the test modules."""
    functions = (
        *(
            randn,
            token_ids,
            value_losses,
            token_losses,
            decoder_losses,
            per_sample_gradients,
            sample_gradients,
            members,
            norm_of,
        ),
        *(
            bounds_in_the_middle,
            clipped_by_hand,
            summed,
            clipped_share,
            wrap,
            gradients_of,
            private_sums,
            furthest,
        ),
    )
    return SimpleNamespace(
        **{f.__name__: f for f in functions},
        CASES=CASES,
        Case=Case,
        Decoder=Decoder,
        Embedder=Embedder,
    )
