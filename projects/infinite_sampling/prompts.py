"""The user's prompts, and the folder of a run: what `sample` and `train` share."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import PREDICTORS, Online
from projects.infinite_sampling.rollout import Predictor, Schedule
from shared.errors import UserError
from shared.files import atomic_json
from shared.models import end_tokens, load_causal_lm


@dataclass(frozen=True)
class Prompts:
    """Prompts of a file: `texts` as the model reads them, `tokens`, and what else stood on their
    lines, for the reward function.
    """

    texts: list[str]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def read(cls, file: Path, tokenizer: Any) -> "Prompts":
        """A `.txt` file has a prompt on each line. A `.jsonl` file has on each line an object with
        `prompt`, or with `messages`, a list of {"role", "content"} that go through the tokenizer's
        chat template; other keys go to the reward function.

        Raises UserError, with the number of the line, for a line that is none of these, and for an
        empty prompt.
        """
        texts: list[str] = []
        tokens: list[list[int]] = []
        others: list[dict[str, Any]] = []
        for number, record in _records(file):
            text, special = record.pop("prompt", None), True
            if (messages := record.pop("messages", None)) is not None:
                try:
                    text, special = (
                        tokenizer.apply_chat_template(
                            messages, tokenize=False, add_generation_prompt=True
                        ),
                        False,
                    )
                except Exception as error:  # templates raise whatever they like
                    raise UserError(
                        f"{file}, line {number}: the chat template refuses it:"
                        f" {str(error).splitlines()[0]}"
                    ) from None
            if not isinstance(text, str):
                raise UserError(
                    f'{file}, line {number}: needs a "prompt" or "messages" with "role" and'
                    ' "content"'
                )
            found = tokenizer(text, add_special_tokens=special)["input_ids"] if text else []
            if not found:
                raise UserError(f"{file}, line {number}: an empty prompt")
            texts.append(text)
            tokens.append(found)
            others.append(record)
        if not texts:
            raise UserError(f"{file} holds no prompts")
        keys = [key for key in others[0] if all(key in record for record in others)]
        return cls(texts, tokens, {key: [record[key] for record in others] for key in keys})


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{file}: name a .jsonl or a .txt file")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if file.suffix == ".txt":
            yield number, {"prompt": line}
        elif line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(
                    f'{file}, line {number}: needs an object with "prompt" or "messages"'
                )
            yield number, record


def load(folder: Path, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The model of a folder on a device, in eval mode, and its tokenizer. Raises UserError as
    `load_causal_lm` does.
    """
    model, tokenizer = load_causal_lm(folder, getattr(torch, dtype))
    return model.to(device), tokenizer


def schedule_of(
    options: argparse.Namespace, vocabulary: int, model: Any
) -> tuple[Schedule, Online | None]:
    """The schedule of the options, and the predictor that it learns with."""
    if options.slots > options.group and options.mode != "dynamic":
        runs_with = f"--slots {options.slots} is more than --group {options.group}"
        raise UserError(f"{runs_with}; a group fits in as many rows as it has completions")
    refill = options.refill or ("lpt_global" if options.mode == "dynamic" else "plan_sjf")
    online: Online | None = None
    predictor: Predictor | None = None
    prefix = 0
    if options.mode in ("continuous", "dynamic") and options.predictor != "none":
        if options.mode == "dynamic" and refill.startswith("plan_"):
            raise UserError(
                "--mode dynamic has no planned queues: use --refill fifo, sjf_global or lpt_global"
            )
        prefix = options.prefix
        online = Online(PREDICTORS[options.predictor](vocabulary), prefix, model=model)
        predictor = online
    else:
        refill = "fifo"
    return (
        Schedule(
            options.mode,
            options.slots,
            refill,
            prefix,
            predictor,
            options.eps,
            options.budget_tokens,
            options.page,
        ),
        online,
    )


def engine_of(options: argparse.Namespace, model: Any, tokenizer: Any, seed: int) -> Engine:
    """The engine of the options."""
    return Engine(
        model,
        end_tokens(model, tokenizer),
        options.max_new_tokens,
        temperature=options.temperature,
        seed=seed,
        stop=options.stop or (),
        tokenizer=tokenizer,
        fixed_shape=options.fixed_shape,
    )


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log as far as they are whole."""
    found = []
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                found.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return found


def same_run(path: Path, about: dict[str, Any]) -> None:
    """Write down what a run is, or refuse to go on with another one than that which the folder
    holds.
    """
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        atomic_json(path, about)
        return
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); name another --out") from None
    for key, value in about.items():
        if known.get(key) != value:
            what = key.replace("_", "-")
            raise UserError(
                f"{path.parent} holds a run with another --{what} ({known.get(key)!r}, not"
                f" {value!r}); name another --out"
            )
