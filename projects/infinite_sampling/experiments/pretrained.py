"""Table 2 again on a pretrained model, SmolLM2-135M: fewer prompts and shorter completions, as a
step takes fifty times as long.

The same measurement as `schedule`; only its configuration differs.
"""

from projects.infinite_sampling.experiments.schedule import Config, run

__all__ = ["Config", "run"]
