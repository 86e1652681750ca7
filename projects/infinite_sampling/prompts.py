"""The user's prompts, and what a run depends on: what `sample` and `train` share."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import PREDICTORS, Online
from projects.infinite_sampling.recipe import Recipe
from projects.infinite_sampling.rollout import Predictor, Schedule
from shared.commands.key import digest
from shared.corpus import prompt_tokens
from shared.errors import UserError
from shared.models import check_length, end_tokens, fingerprint, load_causal_lm
from shared.records import is_conversation, is_jsonl, lines, objects


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
            if "messages" in record and (text is not None or record.get("tools")):
                other = "prompt" if text is not None else "tools"
                raise UserError(f'{file}, line {number}: "{other}" beside "messages"; leave it out')
            messages = record.pop("messages", None)
            if is_conversation(messages):
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
            found: list[int] = []
            if text and special:
                found = prompt_tokens(tokenizer, text)
            elif text:  # a template writes its own
                found = tokenizer(text, add_special_tokens=False)["input_ids"]
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
    if is_jsonl(file):
        yield from objects(file)
    else:
        yield from ((number, {"prompt": line}) for number, line in lines(file))


def load(folder: Path, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The model of a folder on a device, in eval mode, and its tokenizer. Raises UserError as
    `load_causal_lm` does.
    """
    model, tokenizer = load_causal_lm(folder, getattr(torch, dtype))
    return model.to(device), tokenizer


def schedule_of(recipe: Recipe, vocabulary: int, model: Any) -> tuple[Schedule, Online | None]:
    """The schedule of a recipe, and the predictor that it learns with."""
    mode = recipe.rows_mode
    refill = recipe.refill or ("lpt_global" if mode == "dynamic" else "plan_sjf")
    online: Online | None = None
    predictor: Predictor | None = None
    prefix = 0
    if mode in ("continuous", "dynamic") and recipe.predictor != "none":
        prefix = recipe.prefix
        online = Online(PREDICTORS[recipe.predictor](vocabulary), prefix, model=model)
        predictor = online
    else:
        refill = "fifo"
    return (
        Schedule(
            mode,
            recipe.slots,
            refill,
            prefix,
            predictor,
            recipe.eps,
            recipe.budget_tokens,
            recipe.page,
        ),
        online,
    )


def engine_of(recipe: Recipe, model: Any, tokenizer: Any, seed: int) -> Engine:
    """The engine of a recipe."""
    return Engine(
        model,
        end_tokens(model, tokenizer),
        recipe.max_new_tokens,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        seed=seed,
        stop=recipe.stop,
        tokenizer=tokenizer,
        fixed_shape=recipe.fixed_shape,
    )


def check_room(recipe: Recipe, prompts: Prompts, model: Any) -> None:
    """UserError unless the model has positions for the longest prompt and its completion."""
    longest = max(map(len, prompts.tokens))
    check_length(
        model,
        longest + recipe.max_new_tokens,
        f"a prompt of {longest} tokens with --max-new-tokens {recipe.max_new_tokens}:",
    )


def about(
    recipe: Recipe, folder: Path, model: Any, tokenizer: Any, prompts: Prompts
) -> dict[str, Any]:
    """Everything that completions depend on, for `shared.commands.folder.begin`."""
    files = {
        "weights": fingerprint(folder),
        "vocabulary": json.dumps(tokenizer.get_vocab(), sort_keys=True),
        "ends": end_tokens(model, tokenizer),
    }
    # as text at once: a digest of each number of many prompts takes minutes
    read = json.dumps([prompts.texts, prompts.tokens, prompts.columns], sort_keys=True)
    return {"model": digest(files), "prompts": digest({"read": read}), **recipe.decisive()}
