"""Table "parallel": two processes (gloo on a CPU, NCCL on GPUs) as data-parallel ranks and as the
stages of a pipeline.

The clipped gradient of two data-parallel ranks, and that of two stages with micro-batches (torch's
own GPipe schedule), against one process on the same batch; bytes that ranks exchange; time. Ranks
clip on their own and add once; stages exchange nothing for privacy.
"""

import copy
import math
import queue
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field
from torch import Tensor, nn

from projects.flashdp import labels
from projects.flashdp.decoder import Decoder
from projects.flashdp.experiments import common
from projects.flashdp.losses import per_sample_loss
from projects.flashdp.private import DPModel, make_private
from projects.flashdp.sampling import FixedSampling
from shared import experiment

RANKS = 2


class Config(experiment.Config):
    model: Literal[tuple(common.DECODERS)]  # type: ignore[valid-type]
    """a decoder by its name"""
    batch_size: int = Field(ge=RANKS)
    """samples in the batch of both ranks"""
    micro_batches: int = Field(ge=1)
    """pieces in which a batch goes through the pipeline"""
    tokens: int = Field(ge=2)
    """tokens of a sample"""
    repeats: int = Field(ge=1)
    """rounds in which every method makes one timed step"""
    sigma: float = Field(ge=0)
    """noise multiplier of the timed steps"""
    text: common.Text
    """WordNet's glosses, or token ids drawn at random"""
    device: common.Device = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    common.check_device(config.device, "flashdp/parallel")
    if config.device == "cuda" and torch.cuda.device_count() < RANKS:
        config = config.model_copy(update={"device": "cpu"})
        run.log(f"fewer than {RANKS} GPUs: the ranks run on the CPU")
    ids = common.batch_of(
        config.text,
        common.DECODERS[config.model][0],
        config.batch_size,
        config.tokens,
        "cpu",
        config.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        answers = context.Queue()
        arguments = (config.model_dump(), ids, str(Path(folder) / "rendezvous"), answers)
        workers = [
            context.Process(target=_rank, args=(rank, *arguments), daemon=True)
            for rank in range(RANKS)
        ]
        for worker in workers:
            worker.start()
        rows = []
        for _ in run.progress(RANKS, "ranks"):
            rows += _answer(answers, workers)
        for worker in workers:
            worker.join()
    for row in sorted(
        rows,
        key=lambda row: (
            row["kind"],
            row["layout"],
            row["method"],
            row["rank"],
            row.get("repeat", 0),
        ),
    ):
        run.row(**row)


def _answer(answers: Any, workers: list[Any]) -> list[dict[str, Any]]:
    """The rows of the next rank that is done. RuntimeError when one has died."""
    while True:
        try:
            return answers.get(timeout=1)
        except queue.Empty:
            for worker in workers:
                if worker.exitcode not in (None, 0):
                    raise RuntimeError(f"a rank ended with exit status {worker.exitcode}") from None


def _rank(rank: int, given: dict[str, Any], ids: Tensor, file: str, answers: Any) -> None:
    torch.set_num_threads(1)
    config = Config(**given)
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=RANKS,
    )
    ids = ids.to(device)
    answers.put(
        [
            {"rank": rank, **row}
            for row in (*data_parallel(config, ids, rank), *pipeline(config, ids, rank))
        ]
    )
    dist.destroy_process_group()


def private(
    model: nn.Module, config: Config, sigma: float, **options: Any
) -> tuple[DPModel, torch.optim.Optimizer]:
    """FlashDP on `model`, with the noise of one seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sampling = FixedSampling(config.batch_size, config.batch_size)
    return make_private(
        model, optimizer, sampling, noise_multiplier=sigma, noise_seed=config.seed, **options
    ), optimizer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in found)


def whole_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The relative difference of the whole gradient. With noise: a last bit of a sum may turn one
    element by a step of the noise's grid, which is much of a small parameter.
    """
    apart = torch.stack([(found[name] - wanted[name]).norm() for name in found]).norm()
    return float(apart / torch.stack([gradient.norm() for gradient in wanted.values()]).norm())


def reference(model: nn.Module, config: Config, ids: Tensor, sigma: float) -> dict[str, Tensor]:
    """The released gradient of one process."""
    model = copy.deepcopy(model)
    _, optimizer = private(model, config, sigma)
    per_sample_loss(model(ids), ids).sum().backward()
    optimizer.step()
    return gradients(model)


def data_parallel(config: Config, ids: Tensor, rank: int) -> list[dict[str, Any]]:
    """Each rank has every second sample."""
    model = common.model_of(config.model, config.tokens, str(ids.device), config.seed)
    part = ids[rank::RANKS]
    rows: list[dict[str, Any]] = []
    for noise, sigma in (("without noise", 0.0), ("with noise", config.sigma)):
        mine = copy.deepcopy(model)
        _, optimizer = private(mine, config, sigma, process_group=dist.group.WORLD)
        per_sample_loss(mine(part), part).sum().backward()
        moved = _count_all_reduced(optimizer.step)
        compare = whole_difference if sigma else largest_difference
        difference = compare(gradients(mine), reference(model, config, ids, sigma))
        held = sum(p.grad.nbytes for p in mine.parameters())
        row = {
            "kind": "equal",
            "layout": "data parallel",
            "method": noise,
            "relative_difference": difference,
        }
        rows.append({**row, "sent_bytes": moved, "gradient_bytes": held})
    plain, dp = copy.deepcopy(model), copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.0)
    _, optimizer = private(dp, config, config.sigma, process_group=dist.group.WORLD)

    def non_private() -> None:
        per_sample_loss(plain(part), part).mean().backward()
        for parameter in plain.parameters():
            dist.all_reduce(parameter.grad)
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def flash() -> None:
        per_sample_loss(dp(part), part).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return rows + timed(
        "data parallel", {labels.NON_PRIVATE: non_private, labels.FLASHDP: flash}, config.repeats
    )


def timed(
    layout: str, methods: dict[str, Callable[[], None]], repeats: int
) -> list[dict[str, Any]]:
    """Wall time in turns, both ranks at once: they wait for one another."""
    rows: list[dict[str, Any]] = []
    for repeat in range(-1, repeats):
        for method, step in methods.items():
            dist.barrier()
            start = perf_counter()
            step()
            dist.barrier()
            if repeat >= 0:
                rows.append(
                    {
                        "kind": "time",
                        "layout": layout,
                        "method": method,
                        "repeat": repeat,
                        "step_seconds": perf_counter() - start,
                    }
                )
    return rows


class _First(nn.Module):
    def __init__(self, model: Decoder, blocks: int):
        super().__init__()
        self.tokens, self.positions, self.blocks = (
            model.tokens,
            model.positions,
            model.blocks[:blocks],
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(
            torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        )
        for block in self.blocks:
            x = block(x)
        return x


class _Last(nn.Module):
    def __init__(self, model: Decoder, blocks: int):
        super().__init__()
        self.blocks, self.norm, self.head = model.blocks[blocks:], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pipeline(config: Config, ids: Tensor, rank: int) -> list[dict[str, Any]]:
    """Each rank has half of the blocks."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    vocabulary, hidden, layers, _ = common.DECODERS[config.model]
    size = config.batch_size // config.micro_batches
    whole = common.model_of(config.model, config.tokens, str(ids.device), config.seed)
    expected = reference(whole, config, ids, 0.0)
    groups = len(private(copy.deepcopy(whole), config, 0.0)[0].groups)

    def stage(sigma: float | None) -> tuple[nn.Module, Any, Any]:
        half = (_First, _Last)[rank](copy.deepcopy(whole), layers // 2)
        optimizer: Any = torch.optim.SGD(half.parameters(), lr=0.0)
        if sigma is not None:
            options = {"clip": {"*": 1 / math.sqrt(groups)}, "sensitivity": 1.0, "stage": rank}
            _, optimizer = private(half, config, sigma, **options)
        made = {"device": ids.device, "requires_grad": True}
        between, logits = (
            torch.zeros(size, config.tokens, hidden, **made),
            torch.zeros(size, config.tokens, vocabulary, **made),
        )
        inputs, outputs = ((ids[:size],), between) if rank == 0 else ((between,), logits)
        part = PipelineStage(half, rank, RANKS, ids.device, input_args=inputs, output_args=outputs)
        loss = lambda logits, targets: per_sample_loss(logits, targets).sum()  # noqa: E731
        return (
            half,
            optimizer,
            ScheduleGPipe(part, config.micro_batches, loss_fn=loss, scale_grads=False),
        )

    def step(optimizer: Any, schedule: Any) -> None:
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=ids)
        optimizer.step()

    def training(sigma: float | None) -> Callable[[], None]:
        _, optimizer, schedule = stage(sigma)

        def once() -> None:
            step(optimizer, schedule)
            optimizer.zero_grad()

        return once

    half, optimizer, schedule = stage(0.0)
    moved = _count_all_reduced(lambda: step(optimizer, schedule))
    found = {
        _whole_name(name, rank, layers // 2): gradient for name, gradient in gradients(half).items()
    }
    assert set(found) <= set(expected)
    difference = largest_difference(found, {name: expected[name] for name in found})
    row: dict[str, Any] = {
        "kind": "equal",
        "layout": "pipeline",
        "method": "without noise",
        "relative_difference": difference,
        "sent_bytes": moved,
    }
    row["gradient_bytes"] = sum(p.grad.nbytes for p in half.parameters())
    return [
        row,
        *timed(
            "pipeline",
            {labels.NON_PRIVATE: training(None), labels.FLASHDP: training(config.sigma)},
            config.repeats,
        ),
    ]


def _whole_name(name: str, rank: int, offset: int) -> str:
    """A parameter of a stage under its name in the whole model."""
    if rank == 0 or not name.startswith("blocks."):
        return name
    _, number, rest = name.split(".", 2)
    return f"blocks.{int(number) + offset}.{rest}"


def _count_all_reduced(work: Callable[[], object]) -> int:
    """The bytes that this rank gives to all_reduce in `work()`."""
    counted, original = 0, dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += tensor.nbytes
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        work()
    finally:
        dist.all_reduce = original
    return counted
