"""A rollout for TRL's `GRPOTrainer`: completions from this engine, all else TRL's.

    from trl import GRPOConfig, GRPOTrainer
    trainer = GRPOTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=..., rollout_func=rollout(Schedule("continuous", 8)))

TRL hands over the prompts of a generation batch, each as often as it wants completions, and takes tokens and log-probabilities back in that
order. TRL is not among this repository's dependencies; the function here needs nothing of it but the trainer that it is called with.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from projects.infinite_sampling.engine import Engine, Schedule
from projects.infinite_sampling.predictor import Online
from projects.infinite_sampling.prompts import ends
from shared.seeding import step_seed


def rollout(schedule: Schedule, online: Online | None = None) -> Callable[[Sequence[Any], Any], dict[str, list[Any]]]:
    """The `rollout_func` of a `GRPOTrainer`.

    Args:
        schedule: how each batch is decoded; its slots bound the memory, whatever `num_generations` is.
        online: the schedule's predictor, if it is to learn from each batch.

    Returns:
        A function of prompts (texts, or lists of messages) and the trainer. It takes the limit of tokens, the temperature and the seed from
        `trainer.args`, and gives `prompt_ids`, `completion_ids` and `logprobs`, a list for each prompt handed over.
    """

    def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        tokenizer, args = trainer.processing_class, trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model)
        texts = [p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        tokens = [tokenizer(text)["input_ids"] for text in numbers]
        seen: Counter[str] = Counter()
        jobs = []
        for text in texts:
            jobs.append((numbers[text], seen[text]))
            seen[text] += 1
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                engine = Engine(
                    model,
                    ends(model, tokenizer),
                    args.max_completion_length,
                    temperature=args.temperature,
                    seed=step_seed(args.seed, "trl", trainer.state.global_step, trainer.accelerator.process_index),
                )
                made = engine.run(tokens, jobs, schedule).completions
                if online is not None:
                    online.observe(tokens, made)
        finally:
            model.train(training)
        return {
            "prompt_ids": [tokens[c.prompt] for c in made],
            "completion_ids": [c.tokens for c in made],
            "logprobs": [c.logprobs for c in made],
        }

    return rollout_func
