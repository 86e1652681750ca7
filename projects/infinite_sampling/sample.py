"""`sample`: completions of the user's prompts, into `completions.jsonl` of a folder.

A completion is on the disk as soon as it ends, and depends on no other, so that after a crash only
those are sampled that are not there.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import Online
from projects.infinite_sampling.prompts import (
    Prompts,
    engine_of,
    load,
    same_run,
    schedule_of,
    whole_lines,
)
from projects.infinite_sampling.rollout import Completion, Schedule, Stats
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import stop_signals
from shared.files import atomic_write, sha256
from shared.models import fingerprint, local_model
from shared.tables import human_bytes


def sample(options: argparse.Namespace) -> int:
    """`python -m projects.infinite_sampling sample`. Returns the exit status."""
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = local_model(options.model)
    data = sha256(options.prompts)
    with locked(options.out, "completions.jsonl", early=("run.json",)):
        about = {
            "model": fingerprint(folder),
            "prompts": data,
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "stop": options.stop or [],
            "seed": options.seed,
            "dtype": options.dtype,
        }
        model, tokenizer = load(folder, options.dtype, device)
        prompts = Prompts.read(options.prompts, tokenizer)
        schedule, online = schedule_of(options, len(tokenizer), model)
        engine = engine_of(options, model, tokenizer, options.seed)
        same_run(options.out / "run.json", about)
        return _Sampling(options, prompts, engine, schedule, online, tokenizer).go()


class _Sampling:
    def __init__(
        self,
        options: argparse.Namespace,
        prompts: Prompts,
        engine: Engine,
        schedule: Schedule,
        online: Online | None,
        tokenizer: Any,
    ) -> None:
        self.options, self.prompts, self.engine = options, prompts, engine
        self.schedule, self.online, self.tokenizer = schedule, online, tokenizer
        self.console = Console(highlight=False, soft_wrap=True)
        self.path: Path = options.out / "completions.jsonl"

    def go(self) -> int:
        options, total = self.options, len(self.prompts.tokens) * self.options.group
        lines = whole_lines(self.path)
        done = {(line["prompt_index"], line["index"]) for line in lines}
        # without a line that a crash cut
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        if done:
            self.console.print(
                f"going on: {len(done)} of {total} completions are there", markup=False
            )
        batches = range(0, len(self.prompts.tokens), options.prompts_at_once)
        steps = busy = rows = peak = tokens = 0
        with (
            open(self.path, "a", encoding="utf-8") as self.file,
            stop_signals() as stop,
            Progress(self.console, len(done), total) as bar,
        ):

            def ended(one: Completion) -> None:
                self._write(one)
                done.add((one.prompt, one.index))

            def stepped(stats: Stats) -> None:
                if len(done):
                    bar.step(
                        len(done),
                        0,
                        None,
                        f"slots {stats.occupancy:.0%} busy, step {steps + stats.steps}",
                    )
                if stop:
                    raise _Stopped

            for first in batches:
                chosen = range(
                    first, min(first + options.prompts_at_once, len(self.prompts.tokens))
                )
                jobs = [(p, i) for p in chosen for i in range(options.group) if (p, i) not in done]
                try:
                    made = self.engine.run(self.prompts.tokens, jobs, self.schedule, ended, stepped)
                except _Stopped:
                    self._sync()
                    self.console.print(
                        f"stopped with {len(done)} of {total} completions; the same command"
                        " goes on",
                        markup=False,
                    )
                    return 128 + stop[0]
                self._sync()
                if self.online is not None:
                    self.online.observe(self.prompts.tokens, made.completions)
                stats = made.stats
                steps, busy, rows, tokens = (
                    steps + stats.steps,
                    busy + stats.busy,
                    rows + stats.rows,
                    tokens + stats.tokens,
                )
                peak = max(peak, stats.kv_bytes)
        self.console.print(
            f"{len(done)} completions in {self.path}; {tokens} tokens in {steps} steps, slots"
            f" {busy / rows if rows else 1:.0%} busy, {human_bytes(peak)} of keys and values at the"
            " most",
            markup=False,
        )
        return 0

    def _write(self, one: Completion) -> None:
        text = self.tokenizer.decode(one.tokens, skip_special_tokens=True)
        line = {
            "prompt_index": one.prompt,
            "index": one.index,
            "prompt": self.prompts.texts[one.prompt],
            "completion": text,
            "finish": one.finish,
            "tokens": one.tokens,
            "logprobs": one.logprobs,
        }
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()

    def _sync(self) -> None:
        os.fsync(self.file.fileno())


class _Stopped(Exception):
    """A signal came; what has ended is in the file."""
