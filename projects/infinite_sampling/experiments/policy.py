"""The small policy, trained in place on solutions of additions; its weights, which the other
experiments use.
"""

import numpy as np
from pydantic import Field

from projects.infinite_sampling import policy
from projects.infinite_sampling.data import LIMIT, problems, reward
from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.rollout import Schedule
from shared import experiment
from shared.seeding import step_seed


class Config(experiment.Config):
    layers: int = Field(ge=1)
    """of the model"""
    hidden: int = Field(ge=1)
    """size of the model, a multiple of `heads`"""
    heads: int = Field(ge=1)
    """of attention"""
    steps: int = Field(ge=1)
    """optimizer steps"""
    rows: int = Field(ge=1)
    """solutions in a step"""
    lr: float = Field(gt=0)
    """peak learning rate of AdamW, which rises and falls in one cycle"""
    largest: int = Field(ge=1)
    """operand"""
    test_prompts: int = Field(ge=1)
    """problems of which one completion each is judged"""


def run(config: Config, run: experiment.Run) -> None:
    recipe = policy.Recipe(**config.model_dump(exclude={"test_prompts"}))
    weights, loss = policy.train(recipe, lambda steps: run.progress(steps, "training the policy"))
    run.save_tensors("weights", weights)
    model, tokenizer = policy.policy_of(weights, recipe.layers, recipe.hidden, recipe.heads)
    texts = problems(config.test_prompts, step_seed(config.seed, "judged"), config.largest)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    made = Engine(model, [0], LIMIT, seed=config.seed).run(
        prompts, 1, Schedule("continuous", config.test_prompts)
    )
    answers = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made.completions]
    run.row(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        parameters=sum(weight.numel() for weight in weights.values()),
        steps=config.steps,
        final_loss=loss,
        right_share=float(np.mean(reward(texts, answers))),
    )
