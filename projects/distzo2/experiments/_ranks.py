"""One rank of an experiment, started by `_launch.py`: python -m projects.distzo2.experiments._ranks
TASK CONFIG FOLDER
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist

from projects.distzo2 import DistZO2, device_mesh, distributed
from projects.distzo2.baselines import NaiveRestore
from projects.distzo2.engine import digest, shared_engine
from projects.distzo2.experiments._tasks import global_batches, make_task
from projects.zo2 import ZO2
from projects.zo2.experiments.accuracy import digest as digest_in_any_order
from projects.zo2.tasks import Batch, random_tokens
from shared import meters
from shared.models import causal_lm_config, empty_causal_lm_of, random_causal_lm
from shared.models.shapes import OPT_SHAPES

Rows = list[dict[str, Any]]

LANES = ("upload", "exchange", "compute", "offload")

# mode: dp, pert, transfer
MODES = {
    "ZO2": (1, 1, "replicated"),
    "PertP": (1, 2, "replicated"),
    "PertP, sliced": (1, 2, "sliced"),
    "PertP, naive restore": (1, 2, "replicated"),
    "DDP": (2, 1, "replicated"),
    "DDP, sliced": (2, 1, "sliced"),
    "DDP x 3": (3, 1, "replicated"),
    "DDP x 3, sliced": (3, 1, "sliced"),
    "DDP x 4": (4, 1, "replicated"),
    "DDP x 4, sliced": (4, 1, "sliced"),
    "2D": (2, 2, "replicated"),
    "2D, sliced": (2, 2, "sliced"),
    "DDP x 8": (8, 1, "replicated"),
    "DDP x 8, sliced": (8, 1, "sliced"),
    "2D x 8": (4, 2, "replicated"),
    "2D x 8, sliced": (4, 2, "sliced"),
}


def world_of(mode: str) -> int:
    """How many ranks a mode takes."""
    dp, pert, _ = MODES[mode]
    return dp * pert


def shape_of(config: dict[str, Any]) -> Any:
    """The configuration of the model."""
    if config["model"]:
        return causal_lm_config(
            "opt", *OPT_SHAPES[config["model"]], positions=max(2048, config["tokens"])
        )
    return causal_lm_config(
        "llama",
        config["layers"],
        config["hidden"],
        config["heads"],
        config["vocabulary"],
        positions=config["tokens"],
    )


def make_model(config: dict[str, Any]) -> Any:
    """A model of that configuration with random weights."""
    return random_causal_lm(shape_of(config), config["seed"], getattr(torch, config["dtype"]))


def empty_model(config: dict[str, Any]) -> Any:
    """The same without memory for its parameters."""
    return empty_causal_lm_of(shape_of(config), getattr(torch, config["dtype"]))


def make_batch(config: dict[str, Any], step: int, shares: int) -> list[Batch]:
    """A global batch of `shares` micro-batches."""
    vocabulary = shape_of(config).vocab_size
    drawn = random_tokens(
        vocabulary, config["batch_size"], config["tokens"], shares, config["seed"] + 1000 * step
    )
    return [
        {name: tensor.to(config["device"]) for name, tensor in batch.items()} for batch in drawn
    ]


def options(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of the engines. The learning rate is large enough that the weights move."""
    return {
        "lr": config["lr"],
        "eps": 1e-3,
        "seed": config["seed"],
        "device": config["device"],
        **more,
    }


def make_engine(mode: str, config: dict[str, Any], folder: Path, **more: Any) -> DistZO2:
    """This rank's part of a mode."""
    dp, pert, transfer = MODES[mode]
    if transfer == "sliced":
        number = len(list(folder.glob("*.safetensors")))
        dist.barrier()
        file = folder / f"{mode}-{number}.safetensors"
        engine = shared_engine(
            lambda: make_model(config), file, lambda: empty_model(config), **options(config, **more)
        )
    else:
        kind = NaiveRestore if "naive" in mode else ZO2
        engine = kind(make_model(config), storage="ram", **options(config, **more))
    return DistZO2(engine, device_mesh(dp, pert), transfer, check_every=0)  # type: ignore[arg-type]


# ---- tasks ---------------------------------------------------------------------------------------


def equality(config: dict[str, Any], folder: Path) -> Rows:
    """Losses, gradients and the digest of all weights after each mode's steps."""
    rows: Rows = []
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        steps = [
            ddp.step(make_batch(config, step, config["shares"])) for step in range(config["steps"])
        ]
        rows.append(
            {
                "mode": mode,
                "losses": [one.loss.hex() for one in steps],
                "gradients": [one.projected_gradient.hex() for one in steps],
                "weights": digest(ddp.engine.tensors()).hex(),
            }
        )
        ddp.engine.close()
    return rows


def communication(config: dict[str, Any], folder: Path) -> Rows:
    """Bytes of this rank a step, by what they are."""
    rows: Rows = []
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        ddp.step(make_batch(config, 0, config["shares"]))
        before = (
            ddp.engine.traffic.bytes_up,
            ddp.engine.traffic.bytes_down,
            ddp.exchanged.total(),
            ddp.bytes_sent,
        )
        for step in range(config["steps"]):
            ddp.step(make_batch(config, step, config["shares"]))
        after = (
            ddp.engine.traffic.bytes_up,
            ddp.engine.traffic.bytes_down,
            ddp.exchanged.total(),
            ddp.bytes_sent,
        )
        up, down, exchanged, sent = (
            (b - a) / config["steps"] for a, b in zip(before, after, strict=True)
        )
        rows.append(
            {
                "mode": mode,
                "host_up_bytes": up,
                "host_down_bytes": down,
                "exchanged_bytes": exchanged,
                "scalar_bytes": sent,
            }
        )
        ddp.engine.close()
    model = make_model(config).to(config["device"])
    batch = make_batch(config, 0, 1)[0]
    model(**batch).loss.backward()
    sent = 0
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        sent += parameter.grad.nbytes
    nothing = dict.fromkeys(("host_up_bytes", "host_down_bytes", "exchanged_bytes"), 0.0)
    return [*rows, {"mode": "first-order DDP", **nothing, "scalar_bytes": float(sent)}]


def memory(config: dict[str, Any], folder: Path) -> Rows:
    """The most bytes that torch hands out on this rank in a step, for each depth."""
    rows: Rows = []
    for mode in config["modes"]:
        for layers in config["depths"]:
            deep = {**config, "layers": layers}
            if config["device"] == "cpu":
                with meters.live_bytes() as meter:
                    ddp = make_engine(mode, deep, folder)
                    gc.collect()
                    ddp.step(make_batch(deep, 0, config["shares"]))
                    with meter.phase("step"):
                        ddp.step(make_batch(deep, 1, config["shares"]))
                    ddp.engine.close()
                counter, device_peak = "allocator", meter.peak_bytes("step")
            else:
                with meters.cuda_peak_bytes(config["device"]) as peaks:
                    ddp = make_engine(mode, deep, folder)
                    ddp.step(make_batch(deep, 0, config["shares"]))
                    ddp.step(make_batch(deep, 1, config["shares"]))
                    ddp.engine.close()
                counter, device_peak = "cuda_allocator", peaks()["cuda_allocator"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            row = {
                "mode": mode,
                "layers": layers,
                "counter": counter,
                "device_peak_bytes": device_peak,
            }
            rows.append({**row, "process_peak_bytes": peak})
            del ddp
            gc.collect()
    return rows


def throughput(config: dict[str, Any], folder: Path) -> Rows:
    """Seconds of a step of the same global batch, of each mode in turns: by one process (while the
    other ranks rest) and by all.
    """
    rank = dist.get_rank()
    work: dict[str, Callable[[int], None]] = {}
    if rank == 0:
        alone = ZO2(make_model(config), storage="ram", **options(config))
    for threads in config["alone_threads"]:

        def one(step: int, threads: int = threads) -> None:
            if rank == 0:
                torch.set_num_threads(threads)
                alone.step(make_batch(config, step, config["shares"]))
                torch.set_num_threads(1)

        work[f"one process, {threads} thread{'s' if threads > 1 else ''}"] = one
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        work[mode] = lambda step, ddp=ddp: ddp.step(make_batch(config, step, config["shares"]))  # type: ignore[misc]
    rows: Rows = []
    for repeat in range(-1, config["repeats"]):
        for mode, step in work.items():
            dist.barrier()
            start, own = perf_counter(), process_time()
            step(repeat + 1)
            own = process_time() - own  # before the barrier: gloo waits in a loop
            dist.barrier()
            if repeat >= 0:
                rows.append(
                    {
                        "mode": mode,
                        "repeat": repeat,
                        "step_seconds": perf_counter() - start,
                        "process_seconds": own,
                    }
                )
    return rows


def throttled(move: Callable[..., int], bytes_per_second: float) -> Callable[..., int]:
    """`move`, which returns how many bytes it moved, at no more than so many bytes a second; 0: as
    it is.
    """

    def slowly(*arguments: Any) -> int:
        start = perf_counter()
        moved = move(*arguments)
        if bytes_per_second:
            time.sleep(max(0.0, moved / bytes_per_second - (perf_counter() - start)))
        return moved

    return slowly


def link(config: dict[str, Any], folder: Path) -> Rows:
    """Seconds of a step when the ranks share a link to the host of so many bytes a second, which is
    emulated by waiting.
    """
    rows: Rows = []
    world = dist.get_world_size()
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder)
        store = ddp.engine.store
        assert store is not None
        plain = {"read": store.read, "write": store.write}
        for megabytes in config["link_megabytes_per_second"]:
            for name, move in plain.items():
                setattr(store, name, throttled(move, 1e6 * megabytes / world))
            ddp.step(make_batch(config, 0, config["shares"]))
            before = ddp.engine.traffic.bytes_up
            for repeat in range(config["repeats"]):
                dist.barrier()
                start = perf_counter()
                ddp.step(make_batch(config, repeat, config["shares"]))
                dist.barrier()
                seconds = perf_counter() - start
                row = {
                    "mode": mode,
                    "link_megabytes_per_second": megabytes,
                    "repeat": repeat,
                    "step_seconds": seconds,
                }
                rows.append({**row, "uploaded_bytes": ddp.engine.traffic.bytes_up - before})
                before = ddp.engine.traffic.bytes_up
        ddp.engine.close()
    return rows


def lanes(config: dict[str, Any], folder: Path) -> Rows:
    """What each lane of this rank does during one step over an emulated link, in seconds from the
    step's start.
    """
    rows: Rows = []
    rate = 1e6 * config["link_megabytes_per_second"] / dist.get_world_size()
    for mode in config["modes"]:
        ddp = make_engine(mode, config, folder, trace=True)
        store = ddp.engine.store
        assert store is not None
        for name in ("read", "write"):
            setattr(store, name, throttled(getattr(store, name), rate))
        for step in range(3):
            ddp.step(make_batch(config, step, config["shares"]))
        dist.barrier()
        start = perf_counter()
        ddp.step(make_batch(config, 3, config["shares"]))
        end = perf_counter()
        dist.barrier()
        for span in ddp.engine.spans:
            if span.end > start and span.start < end:
                own = {
                    "begin_seconds": max(span.start, start) - start,
                    "end_seconds": min(span.end, end) - start,
                }
                rows.append(
                    {
                        "mode": mode,
                        "lane": span.lane,
                        "block": span.block,
                        **own,
                        "step_seconds": end - start,
                    }
                )
        ddp.engine.close()
    return rows


def cost(config: dict[str, Any], folder: Path) -> Rows:
    """Steps of each case and mode in turns, with what each lane did in them; and how long the ranks
    take to gather their losses.
    """
    rank = dist.get_rank()
    # what the row says, who, the case, bytes a second
    work: list[tuple[dict[str, Any], ZO2 | DistZO2, dict[str, Any], float]] = []
    for case in config["cases"]:
        own = {**config, **case}
        said = {
            "kind": "fit" if case["fit"] else "held out",
            "shape": f"{case['layers']} x {case['hidden']}",
        }
        said |= {
            name: own[name]
            for name in (
                "layers",
                "hidden",
                "heads",
                "vocabulary",
                "tokens",
                "batch_size",
                "shares",
            )
        }
        alone = ZO2(make_model(own), storage="ram", **options(own, trace=True))
        work += [
            ({**said, "mode": mode, "processes": count}, alone, own, 0.0)
            for mode, count in (("ZO2", 1), ("ZO2, twice", 2))
        ]
        for mode in config["modes"]:
            ddp = make_engine(mode, own, folder, trace=True)
            said_too = {**said, "mode": mode, "processes": 2}
            if "PertP" in mode:
                said_too["kind"] = "held out"
            rates = (
                [0.0]
                if case["fit"] or "PertP" in mode
                else [0.0, *config["link_megabytes_per_second"]]
            )
            work += [(said_too, ddp, own, 1e6 * rate) for rate in rates]
    rows: Rows = []
    for repeat in range(-1, config["repeats"]):
        for said, who, own, rate in work:
            engine = who.engine if isinstance(who, DistZO2) else who
            store = engine.store
            assert store is not None
            plain = {"read": store.read, "write": store.write}
            for name, move in plain.items():
                setattr(store, name, throttled(move, rate / 2))
            batch = make_batch(own, repeat + 1, own["shares"])
            moved, exchanged = (
                engine.traffic,
                who.exchanged.total() if isinstance(who, DistZO2) else 0,
            )
            before = moved.bytes_up, moved.bytes_down
            engine.spans.clear()
            dist.barrier()
            start = perf_counter()
            if said["processes"] == 2 or rank == 0:
                who.step(batch)
            seconds = perf_counter() - start
            dist.barrier()
            moved = engine.traffic
            for name, move in plain.items():
                setattr(store, name, move)
            if repeat < 0 or (said["processes"] == 1 and rank > 0):
                continue
            busy = {
                f"{lane}_busy_seconds": sum(s.end - s.start for s in engine.spans if s.lane == lane)
                for lane in LANES
            }
            nbytes = {
                "uploaded_bytes": moved.bytes_up - before[0],
                "offloaded_bytes": moved.bytes_down - before[1],
            }
            nbytes["exchanged_bytes"] = (
                who.exchanged.total() if isinstance(who, DistZO2) else 0
            ) - exchanged
            link = {"emulated": rate > 0, "link_gigabytes_per_second": rate / 1e9}
            rows.append(
                {**said, **link, "repeat": repeat, "step_seconds": seconds, **busy, **nbytes}
            )
    scalars = torch.zeros(3, 1, dtype=torch.float64)
    found = [torch.empty_like(scalars) for _ in range(dist.get_world_size())]
    for repeat in range(50):
        start = perf_counter()
        dist.all_gather(found, scalars)
        rows.append(
            {
                "kind": "gather",
                "processes": 2,
                "repeat": repeat,
                "step_seconds": perf_counter() - start,
            }
        )
    return rows


def train(config: dict[str, Any], folder: Path) -> Rows:
    """Losses of real training in each mode at each size of the global batch; scores on held-out
    rows by rank 0; digests of the weights.
    """
    rows: Rows = []
    task = make_task(config)
    for batch_size in config["batch_sizes"]:
        batches = global_batches(task, config, batch_size)
        for mode in config["modes"]:
            dp, pert, transfer = MODES[mode]
            model = task.model()
            named = {name for name, _ in model.named_parameters()}
            engine = ZO2(
                model,
                storage="ram",
                lr=config["lr"],
                eps=config["eps"],
                loss=task.loss,
                device=config["device"],
            )
            ddp = DistZO2(engine, device_mesh(dp, pert), transfer)
            losses = [ddp.step(batch, seed=number).loss for number, batch in enumerate(batches)]
            scores = (
                engine.forward(lambda model: task.evaluate(model, config["test_rows"]))
                if dist.get_rank() == 0
                else None
            )
            weights = digest_in_any_order(
                (name, tensor) for name, tensor in engine.tensors() if name in named
            )
            rows.append(
                {
                    "mode": mode,
                    "batch_size": batch_size,
                    "losses": losses,
                    "scores": scores,
                    "weights": weights,
                }
            )
            engine.close()
    return rows


TASKS = {
    task.__name__: task
    for task in (equality, communication, memory, throughput, link, lanes, cost, train)
}


def main(task: str, config: str, folder: str) -> None:
    torch.set_num_threads(1)
    values = json.loads(config)
    with distributed(values["device"], timeout_seconds=1800) as device:
        rows = TASKS[task]({**values, "device": str(device)}, Path(folder))
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
