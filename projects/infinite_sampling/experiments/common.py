"""What the experiments share: the model and its prompts by name, the schedules by the names that
tables show, predictions written down.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from projects.infinite_sampling import labels
from projects.infinite_sampling.data import LIMIT, QUESTIONS, problems
from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.policy import policy_of
from projects.infinite_sampling.prompts import Prompts
from projects.infinite_sampling.rollout import Prefixes, Schedule
from shared import experiment, meters
from shared.errors import UserError
from shared.seeding import step_seed

RANDOM = {  # layers, hidden size, heads: Qwen3's own
    "random-qwen3-0.6b": (28, 1024, 16),
    "random-qwen3-1.7b": (28, 2048, 16),
}


@dataclass
class Subject:
    """A model, prompts for it, and the token that ends a completion; `forced` lengths where the
    weights are random.
    """

    name: str
    model: Any
    prompts: list[list[int]]
    eos: list[int]
    vocabulary: int
    limit: int
    texts: list[str]
    tokenizer: Any = None
    forced: dict[tuple[int, int], int] | None = None

    def engine(self, seed: int, **options: Any) -> Engine:
        """An engine of the subject's."""
        return Engine(self.model, self.eos, self.limit, seed=seed, **options)


def subject(
    name: str,
    prompts: int,
    seed: int,
    *,
    limit: int,
    run: experiment.Run,
    device: str = "cpu",
    group: int = 1,
    file: str | None = None,
) -> Subject:
    """`policy` (trained by the experiment of that name, which `run` must use), `random-qwen3-...`
    (random weights, forced lengths), or a model of the catalogue, a folder or a hub id.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "infinite_sampling: this scale needs a GPU, and torch sees none; use --scale cpu"
        )
    if name == "policy":
        try:
            (shape,) = run.used_rows("policy")
        except ValueError:
            raise UserError(
                "infinite_sampling: the policy is there for experiments that paper.yaml lets use"
                " it at this scale (uses: [policy])"
            ) from None
        model, tokenizer = policy_of(
            run.used_tensors("policy", "weights"),
            **{key: shape[key] for key in ("layers", "hidden", "heads")},
        )
        texts = problems(prompts, step_seed(seed, "prompts"))
        ids = [tokenizer(text)["input_ids"] for text in texts]
        return Subject(
            name, model.to(device), ids, [0], len(tokenizer), min(limit, LIMIT), texts, tokenizer
        )
    if name in RANDOM:
        from shared.models import causal_lm_config, random_causal_lm

        config = causal_lm_config("qwen3", *RANDOM[name], positions=4096, tied=True)
        model = random_causal_lm(config, dtype=torch.bfloat16, device=device)
        rng = np.random.default_rng(step_seed(seed, "forced"))
        ids = rng.integers(0, config.vocab_size, (prompts, 150)).tolist()
        forced = {
            (p, i): int(np.clip(rng.lognormal(5.9, 0.6), 1, limit))
            for p in range(prompts)
            for i in range(group)
        }
        return Subject(name, model, ids, [], config.vocab_size, limit, [""] * prompts, None, forced)
    from shared.models import end_tokens, load_causal_lm

    model, tokenizer = load_causal_lm(name)
    if file is not None:
        read = Prompts.read(Path(file), tokenizer)
        texts, ids = read.texts[:prompts], read.tokens[:prompts]
    else:
        asked = [
            [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(prompts)
        ]
        texts = [
            tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            for one in asked
        ]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Subject(
        name,
        model.to(device),
        ids,
        end_tokens(model, tokenizer),
        len(tokenizer),
        limit,
        texts,
        tokenizer,
    )


class Recorder:
    """A predictor that writes down what it said, by (prompt, index)."""

    def __init__(self, of: Any) -> None:
        self.of, self.needs_hidden = of, of.needs_hidden
        self.said: dict[tuple[int, int], float] = {}

    def predict(self, prefixes: Prefixes) -> np.ndarray:
        found: np.ndarray = self.of.predict(prefixes)
        self.said = dict(zip(prefixes.jobs, found.tolist(), strict=True))
        return found


def schedules(slots: int, prefix: int, learnt: Any, oracle: Any) -> dict[str, Schedule]:
    """By the names of the tables. `learnt` and `oracle` predict."""
    return {
        labels.FULL: Schedule("full"),
        labels.MICRO: Schedule("micro", slots),
        labels.SORTED_MICRO: Schedule("micro", slots, "lpt_global", 0, oracle),
        labels.FIFO: Schedule("continuous", slots),
        labels.SJF: Schedule("continuous", slots, "sjf_global", prefix, learnt),
        labels.LPT: Schedule("continuous", slots, "lpt_global", prefix, learnt),
        labels.FRAMEWORK: Schedule("continuous", slots, "plan_sjf", prefix, learnt),
        labels.FRAMEWORK_LPT: Schedule("continuous", slots, "plan_lpt", prefix, learnt),
        labels.ORACLE: Schedule("continuous", slots, "plan_sjf", 0, oracle),
        labels.DYNAMIC: Schedule("dynamic", slots),
        labels.DYNAMIC_LPT: Schedule("dynamic", slots, "lpt_global", prefix, learnt),
    }


def clock_of(device: str) -> Callable[[], float]:
    """Process time of one thread on a CPU; on a GPU wall time, with its work done."""

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else wall


class Meter:
    """What a piece of work took: bytes beyond those that were there before, at the most, in all and
    within what is marked as `rollout`.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._live: meters.LiveBytes | None = None
        self._marked = False

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Mark the rollout; of no effect outside `peaks`."""
        self._marked = True
        with nullcontext() if self._live is None else self._live.phase("rollout"):
            yield

    def peaks(self, work: Callable[[], Any]) -> tuple[Any, int, int | None, str]:
        """What `work` returns; its peak; the peak of its rollout (None on a GPU, and where none was
        marked); the counter.
        """
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            with meters.cuda_peak_bytes() as found:
                made = work()
            return made, found()["cuda_allocator"] - before, None, "cuda_allocator"
        self._marked = False
        with meters.live_bytes() as live:
            self._live = live
            made = work()
        self._live = None
        return (
            made,
            live.peak_bytes(),
            live.peak_bytes("rollout") if self._marked else None,
            "allocator",
        )


def durations(completions: Sequence[Any], prompt: int) -> list[int]:
    """Decoding steps of each completion of a prompt, by index."""
    return [
        len(c.tokens) - 1
        for c in sorted((c for c in completions if c.prompt == prompt), key=lambda c: c.index)
    ]
