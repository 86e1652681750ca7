"""Small models of every family in odd shapes, and the MeZO run that ZO2 must equal bit for bit.

A test that takes the fixture `case` runs for every family; `parametrize("case", [...],
indirect=True)` picks some.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from projects.zo2 import ZO2, MeZO
from projects.zo2.mezo import model_loss

torch.set_num_threads(1)

VOCABULARY = 67
DECAY = 0.1


def falling(step: int) -> float:
    """A learning rate that differs in every step."""
    return 2e-3 / (1 + step) + 1e-4 * (step % 3)


def seed_of(step: int) -> int:
    """Seeds given by hand; the first is 0."""
    return 7 * step


class OddBlock(nn.Module):
    """A residual block of sizes that are no multiples of 16, with buffers: one that scales, one
    that counts its calls.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.gain = nn.Parameter(torch.tensor(1.1))  # a scalar
        self.down = nn.Linear(inner, width, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x))) * self.gain)) * self.scale


class Odd(nn.Module):
    """A plain module: parameters of its own (one not contiguous), blocks of different sizes,
    nothing from a library.
    """

    def __init__(self, depth: int = 3, width: int = 7):
        super().__init__()
        self.head = nn.Linear(width, 3)  # registered first, runs last
        # [width, 5] with the strides of its transpose
        self.mix = nn.Parameter(torch.randn(5, width).t())
        self.entry = nn.Linear(5, width)
        self.entry.weight = nn.Parameter(torch.randn(5, width).t())
        self.blocks = nn.ModuleList(OddBlock(width, 11 + 34 * index) for index in range(depth))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x) + x @ self.mix.t() + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of a classifier that returns logits."""
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


@dataclass(frozen=True)
class Case:
    """A model family: `make(depth)` gives the same weights every time; `order(depth)` is the noise
    order, written by hand.
    """

    name: str
    build: Callable[[int], nn.Module]
    batches: Callable[[], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor] = model_loss
    order: Callable[[int], list[str]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, depth: int = 3) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return self.build(depth).eval()


def _tokens(rows: int, length: int, seed: int) -> Tensor:
    """No padding token: autograd leaves its embedding without a gradient."""
    return torch.randint(
        3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


@cache
def _text() -> list[Any]:
    """Batches of different lengths; the last is partial."""
    shapes = [(3, 9), (3, 13), (3, 9), (1, 5)]
    return [
        {"input_ids": (ids := _tokens(*shape, seed)), "labels": ids}
        for seed, shape in enumerate(shapes)
    ]


@cache
def _labelled_text() -> list[Any]:
    return [{"input_ids": _tokens(n, 8, n), "labels": torch.arange(n) % 3} for n in (4, 3, 4, 1)]


def _images(size: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    def batches() -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(size)
        return [
            (torch.randn(n, 3, size, size, generator=g), torch.arange(n) % 5) for n in (3, 3, 2)
        ]

    return cache(batches)


@cache
def _vectors() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=g), torch.arange(n) % 3) for n in (6, 6, 6, 2)]


def _opt(tied: bool) -> Callable[[int], nn.Module]:
    def build(depth: int) -> nn.Module:
        from transformers import OPTConfig, OPTForCausalLM

        sizes = {
            "hidden_size": 20,
            "ffn_dim": 36,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 12,
        }
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                num_hidden_layers=depth,
                max_position_embeddings=40,
                tie_word_embeddings=tied,
                **sizes,
            )
        )

    return build


def _opt_order(tied: bool) -> Callable[[int], list[str]]:
    def order(depth: int) -> list[str]:
        both = ("weight", "bias")
        block = [f"self_attn.{m}_proj.{p}" for m in "kvq" for p in both]
        block += [
            f"{m}.{p}"
            for m in (
                "self_attn.out_proj",
                "self_attn_layer_norm",
                "fc1",
                "fc2",
                "final_layer_norm",
            )
            for p in both
        ]
        first = ["embed_tokens.weight", "embed_positions.weight", "project_in.weight"]
        layers = [f"layers.{i}.{name}" for i in range(depth) for name in block]
        last = ["final_layer_norm.weight", "final_layer_norm.bias", "project_out.weight"]
        return [f"model.decoder.{name}" for name in first + layers + last] + (
            [] if tied else ["lm_head.weight"]
        )

    return order


def _gpt2(depth: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=depth, n_head=4, n_positions=40)
    )


def _llama(depth: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 52,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_hidden_layers=depth, tie_word_embeddings=True, **sizes
        )
    )


def _llama_order(depth: int) -> list[str]:
    names = [f"self_attn.{m}_proj" for m in "qkvo"] + [
        f"mlp.{m}_proj" for m in ("gate", "up", "down")
    ]
    block = [f"{n}.weight" for n in (*names, "input_layernorm", "post_attention_layernorm")]
    return [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{n}" for i in range(depth) for n in block),
        "model.norm.weight",
    ]


def _qwen3(depth: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=depth, **sizes))


def _bert(depth: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_hidden_layers=depth, num_labels=3, **sizes)
    )


def _vit(depth: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_attention_heads": 4,
        "image_size": 18,
        "patch_size": 6,
    }
    return ViTForImageClassification(ViTConfig(num_hidden_layers=depth, num_labels=5, **sizes))


def _vit_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(pixel_values=batch[0], labels=batch[1]).loss


def _timm_vit(depth: int) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 18, "num_heads": 3, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(depth=depth, **sizes)
    nn.init.normal_(model.head.weight)  # zero as timm makes it: no gradient would reach the rest
    return model


def _odd_order(depth: int) -> list[str]:
    block = ["gain", "norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"]
    blocks = [f"blocks.{i}.{name}" for i in range(depth) for name in block]
    return ["mix", "shift", "entry.weight", "entry.bias", *blocks, "head.weight", "head.bias"]


CASES = {
    case.name: case
    for case in (
        Case("opt-tied", _opt(True), _text, order=_opt_order(True)),
        Case("opt-untied", _opt(False), _text, order=_opt_order(False)),
        Case("gpt2", _gpt2, _text),
        Case("llama-tied", _llama, _text, order=_llama_order),
        Case("qwen3", _qwen3, _text),
        Case("bert-classifier", _bert, _labelled_text),
        Case("vit", _vit, _images(18), _vit_loss),
        Case("timm-vit", _timm_vit, _images(16), class_loss),
        Case("plain", Odd, _vectors, class_loss, _odd_order),
    )
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def plain() -> Case:
    return CASES["plain"]


@dataclass
class Outcome:
    """What a run left: (loss, g) of every step and all tensors."""

    found: list[tuple[float, float]]
    state: dict[str, Tensor]


def moved(batch: Any, device: str) -> Any:
    """The batch on another device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: value.to(device) for key, value in batch.items()}
    return type(batch)(moved(b, device) for b in batch)


def batch_of(case: Case, step: int) -> Any:
    batches = case.batches()
    return batches[step % len(batches)]


def run_mezo(
    case: Case,
    steps: int = 30,
    *,
    model: nn.Module | None = None,
    order: list[str] | None = None,
    depth: int = 3,
    batch: Callable[[int], Any] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Outcome:
    """MeZO over `steps`, its parameters in the order written by hand (or in `order`)."""
    model = (model or case.make(depth)).to(device)
    if order is None:
        order = case.order(depth) if case.order else [n for n, _ in model.named_parameters()]
    named = dict(model.named_parameters())
    settings = {"lr": falling, "weight_decay": DECAY, "loss": case.loss} | options
    mezo = MeZO(model, parameters=[(name, named[name]) for name in order], **settings)
    found = [
        mezo.step(moved(batch(t) if batch else batch_of(case, t), device), seed_of(t))
        for t in range(steps)
    ]
    return Outcome(found, {name: tensor.cpu() for name, tensor in model.state_dict().items()})


def make_engine(
    case: Case, *, model: nn.Module | None = None, depth: int = 3, **options: Any
) -> ZO2:
    settings = {"lr": falling, "weight_decay": DECAY, "loss": case.loss} | case.options | options
    return ZO2(model if model is not None else case.make(depth), **settings)


def run_engine(
    engine: ZO2,
    case: Case,
    steps: int = 30,
    first: int = 0,
    batch: Callable[[int], Any] | None = None,
    device: str = "cpu",
) -> list[tuple[float, float]]:
    """`steps` steps from number `first` on; returns (loss, g) of each."""
    results = [
        engine.step(moved(batch(t) if batch else batch_of(case, t), device), seed=seed_of(t))
        for t in range(first, first + steps)
    ]
    return [(r.loss, r.projected_gradient) for r in results]


def run_zo2(
    case: Case,
    steps: int = 30,
    *,
    batch: Callable[[int], Any] | None = None,
    device: str = "cpu",
    model: nn.Module | None = None,
    **options: Any,
) -> Outcome:
    engine = make_engine(case, model=model, device=device, **options)
    found = run_engine(engine, case, steps, batch=batch, device=device)
    model = engine.unwrap()
    return Outcome(found, {name: tensor.cpu() for name, tensor in model.state_dict().items()})


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the last bit (the sign of a zero counts, a NaN
    equals itself).
    """

    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    assert a.keys() == b.keys()
    return [
        n
        for n in a
        if a[n].dtype != b[n].dtype
        or a[n].shape != b[n].shape
        or not torch.equal(raw(a[n]), raw(b[n]))
    ]


def assert_same(got: Outcome, wanted: Outcome) -> None:
    """Losses, projected gradients and every tensor are equal to the last bit."""
    assert got.found == wanted.found
    assert differing(got.state, wanted.state) == []
    assert all(math.isfinite(loss) and g != 0 for loss, g in wanted.found), (
        "a run that finds nothing shows nothing"
    )


@pytest.fixture
def helpers() -> SimpleNamespace:
    """The functions above, for the test modules."""
    names = (
        batch_of,
        seed_of,
        falling,
        run_mezo,
        make_engine,
        run_engine,
        run_zo2,
        differing,
        assert_same,
        moved,
        class_loss,
    )
    return SimpleNamespace(
        **{f.__name__: f for f in names}, CASES=CASES, Case=Case, Odd=Odd, OddBlock=OddBlock
    )


@pytest.fixture
def plain_reference(plain: Case) -> Callable[..., Outcome]:
    """MeZO on the plain module, computed once for each (depth, steps)."""
    return _plain_reference


@cache
def _plain_reference(depth: int = 3, steps: int = 30) -> Outcome:
    return run_mezo(CASES["plain"], steps, depth=depth)


@pytest.fixture
def interrupting() -> Callable[..., contextlib.AbstractContextManager[list[str]]]:
    """`with interrupting(model, at, error):` raises `error` at the end of the `at`-th module call;
    yields the calls seen.
    """
    return _interrupting


@contextlib.contextmanager
def _interrupting(model: nn.Module, at: int, error: type[BaseException]):  # type: ignore[no-untyped-def]
    calls: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls.append(name)
            if len(calls) - 1 == at:
                raise error("deliberate")

        return count

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(hook(f"{name} in")),
            module.register_forward_hook(hook(f"{name} out"), prepend=True),
        ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
