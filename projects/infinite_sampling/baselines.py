"""What one would use otherwise: `generate` of transformers, for the whole group or in chunks, its
continuous batching; and TRL's trainer.

Their random numbers are one stream for a batch, so that their completions depend on the chunks;
their distribution is the same.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from shared.errors import UserError


def generate(
    model: Any, prompt: Sequence[int], group: int, rows: int, limit: int, eos: int, seed: int = 0
) -> list[int]:
    """Lengths of a group's completions by `model.generate`, `rows` at a time. The cache
    concatenates, and copies the prompt for each row.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    lengths: list[int] = []
    with torch.no_grad():
        while len(lengths) < group:
            made = model.generate(
                torch.tensor([list(prompt)], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=min(rows, group - len(lengths)),
                max_new_tokens=limit,
                eos_token_id=eos,
                pad_token_id=eos,
            )[:, len(prompt) :]
            ended = made == eos
            lengths += torch.where(
                ended.any(-1), ended.int().argmax(-1) + 1, made.shape[1]
            ).tolist()
    return lengths


def generate_batch(
    model: Any, prompt: Sequence[int], group: int, rows: int, limit: int, eos: int, seed: int = 0
) -> list[int]:
    """Lengths of a group's completions by the continuous batching of transformers, in a cache of
    about `rows` sequences.

    Left to itself it reserves nearly all free memory; here it gets as many blocks as the rows need.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = 32
    blocks = rows * -(-(len(prompt) + limit) // page) + 1
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos,
        num_return_sequences=group,
    )
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=blocks,
        max_batch_tokens=max(rows, len(prompt)) + rows,
        max_requests_per_batch=rows,
        auto_switch_to_flash=False,
        use_cuda_graph=False,
        use_async_batching=False,
        seed=seed,
    )
    attention = model.config._attn_implementation
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            made = model.generate_batch(
                [list(prompt)],
                generation_config=sampling,
                continuous_batching_config=batching,
                warmup=False,
            )
    finally:
        logging.disable(level)
        model.set_attn_implementation(attention)  # it leaves its own behind
    return [len(output.generated_tokens) for output in made.values()]


class TrlSteps:
    """TRL's `GRPOTrainer`, a step at a time, so that it can be measured in turns with others: its
    own loop, in a greenlet that comes back after each optimizer step.

    As the library's own step: loss `grpo`, AdamW with a constant rate, float32 throughout, prompts
    in the order given.

    Args:
        model: its weights are trained in place. TRL puts a forward of its own over the model's;
            make no deep copies of it from then on.
        prompts: texts, `prompts_per_step` for each of `steps` steps.
        reward: takes `prompts` and `completions`, texts, and returns numbers.
        micro_batch: completions in a backward.
        phase: a context for the part of a step that generates.
        rollout_func: completions in place of TRL's own.

    Raises:
        UserError: TRL is not installed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        reward: Callable[..., list[float]],
        *,
        steps: int,
        prompts_per_step: int,
        group: int,
        micro_batch: int,
        limit: int,
        lr: float,
        seed: int,
        phase: Callable[[], AbstractContextManager[Any]],
        rollout_func: Callable[..., Any] | None = None,
    ) -> None:
        try:
            import trl
        except ImportError:
            raise UserError(
                "this needs TRL: pip install -c constraints.txt -e '.[peers]'"
            ) from None
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback

        completions = prompts_per_step * group
        if completions % micro_batch:
            raise UserError(
                f"TRL's micro batches are equal: {completions} completions of a step are no"
                f" multiple of {micro_batch}"
            )
        self.rewards: list[float] = []  # of the last step
        self.lengths: list[int] = []

        class Back(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                getcurrent().parent.switch()

        def rewarded(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
            self.rewards = reward(prompts, completions)
            self.lengths = [len(ids) for ids in completion_ids]
            return self.rewards

        def inside(generate: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with phase():
                    return generate(*args, **kwargs)

            return wrapped

        self._folder = tempfile.TemporaryDirectory(prefix="trl-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that rollout_func may change
            args = trl.GRPOConfig(
                self._folder.name,
                use_cpu=next(model.parameters()).device.type == "cpu",
                bf16=False,
                max_steps=steps,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=completions // micro_batch,
                gradient_checkpointing=False,
                num_generations=group,
                max_completion_length=limit,
                loss_type="grpo",
                learning_rate=lr,
                lr_scheduler_type="constant",
                adam_beta2=0.95,
                seed=seed,
                shuffle_dataset=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = trl.GRPOTrainer(
                model=model,
                reward_funcs=rewarded,
                args=args,
                processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
                callbacks=[Back()],
                rollout_func=None if rollout_func is None else inside(rollout_func),
            )
        trainer.remove_callback(PrinterCallback)
        if rollout_func is None:
            model.generate = inside(model.generate)
        self._loop = greenlet(trainer.train)

    def step(self) -> tuple[list[float], list[int]]:
        """Make a step; rewards and lengths of its completions, groups one after another."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._loop.switch()
        return self.rewards, self.lengths

    def close(self) -> None:
        """End the loop, after the last step."""
        self.step()
        self._folder.cleanup()
