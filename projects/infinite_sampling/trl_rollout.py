"""A rollout for TRL's `GRPOTrainer`: completions from this engine, all else TRL's.

    from trl import GRPOConfig, GRPOTrainer
    trainer = GRPOTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=...,
    rollout_func=rollout(Schedule(slots=8)))

TRL decodes a generation batch at once, so that its keys and values grow with `num_generations`;
here they follow the schedule's slots. TRL 1.16 hands over the prompts of a generation batch, each
as often as it wants completions (its own documentation says once), and takes tokens and
log-probabilities back in that order. Completions end with one of the trainer's end tokens or are
cut at its limit, which is how TRL tells those that were cut (`mask_truncated_completions`). All of
their tokens are the model's, so that there is no `env_mask`.

Nothing is imported of TRL; the function needs the trainer that it is called with.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import Online
from projects.infinite_sampling.rollout import Schedule
from shared.errors import UserError
from shared.seeding import step_seed

_PLAIN = {  # what the engine does not do otherwise
    "min_p": (0.0, None),
    "repetition_penalty": (1.0, None),
    "generation_kwargs": ({}, None),
}


def rollout(
    schedule: Schedule, online: Online | None = None
) -> Callable[[Sequence[Any], Any], dict[str, list[Any]]]:
    """The `rollout_func` of a `GRPOTrainer`.

    Args:
        schedule: how each batch is decoded; its slots bound the memory, whatever `num_generations`
            is.
        online: the schedule's predictor, if it is to learn from each training batch.

    Returns:
        A function of prompts (all texts, or all lists of messages) and the trainer, whose weights
        must be whole in each process (one device or data-parallel ones). It tokenizes as the
        trainer does, takes limit, temperature, `top_k`, `top_p`, end tokens and seed from it, and
        gives `prompt_ids`, `completion_ids` and `logprobs` (of the tempered distribution, before
        tokens are left out), a list for each prompt handed over. UserError for what the trainer is
        set to and this cannot do (`min_p`, penalties, tools, images), and for a model that gives
        other logits in rows of cache than in a plain forward, under the trainer's autocast.
    """
    calls: Counter[tuple[int, bool]] = Counter()

    def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        _check(trainer)
        rows = _tokens(prompts, trainer)
        numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        seen: Counter[int] = Counter()
        jobs = []
        for number in (numbers[row] for row in rows):
            jobs.append((number, seen[number]))
            seen[number] += 1
        model = trainer.accelerator.unwrap_model(trainer.model)
        training, step = model.training, trainer.state.global_step
        seed = rollout_seed(
            trainer.args.seed,
            step,
            calls[step, training],
            training,
            trainer.accelerator.process_index,
        )
        calls[step, training] += 1
        model.eval()
        try:
            with torch.no_grad():
                engine = Engine(
                    model,
                    trainer.eos_token_ids,
                    trainer.max_completion_length,
                    temperature=trainer.temperature,
                    top_k=trainer.args.top_k or 0,
                    top_p=1.0 if trainer.args.top_p is None else trainer.args.top_p,
                    seed=seed,
                )
                made = engine.run(list(numbers), jobs, schedule).completions
                if online is not None and training:
                    online.observe(list(numbers), made)
        finally:
            model.train(training)
        return {
            "prompt_ids": [list(row) for row in rows],
            "completion_ids": [c.tokens for c in made],
            "logprobs": [c.logprobs for c in made],
        }

    return rollout_func


def rollout_seed(
    seed: int, step: int, call: int = 0, training: bool = True, process: int = 0
) -> int:
    """The seed of the engine for one generation batch.

    Args:
        seed: the trainer's.
        step: optimizer steps made.
        call: generation batches before this one at the same step: several where gradients are
            accumulated over them, or in an evaluation.
        training: or evaluation.
        process: of data-parallel ones.
    """
    return step_seed(seed, "trl", step, call, training, process)


def _tokens(prompts: Sequence[Any], trainer: Any) -> list[tuple[int, ...]]:
    """Tokens of each prompt, as the trainer's own generation has them: the chat template writes
    what is special, and nothing is added.
    """
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        found = tokenizer(text=list(prompts))
    else:
        found = tokenizer.apply_chat_template(
            list(prompts),
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
    return [tuple(row) for row in found["input_ids"]]


def _check(trainer: Any) -> None:
    for name, values in _PLAIN.items():
        if getattr(trainer.args, name) not in values:
            raise UserError(
                f"{name}={getattr(trainer.args, name)} is not drawn by this rollout, which knows"
                " temperature, top_k and top_p"
            )
    if trainer.tools:
        raise UserError(
            "this rollout calls no tools; leave out tools and environments, or rollout_func"
        )
    if hasattr(trainer.processing_class, "image_processor"):
        raise UserError(
            "this rollout reads text alone; give the trainer a tokenizer in place of a processor"
        )
