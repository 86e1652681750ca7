"""LoRA adapters, by PEFT."""

import warnings
from pathlib import Path
from typing import Any

from shared.errors import UserError


def add_lora(
    model: Any,
    rank: int,
    alpha: int,
    targets: list[str] | None,
    base_name: str,
    *,
    empty: bool = False,
) -> Any:
    """`model` with LoRA adapters and everything else frozen.

    Args:
        targets: the modules to adapt, by the ends of their names; None: all linear layers but the
            head.
        base_name: the folder that the model came from. PEFT puts that folder's path into the
            adapter's configuration whatever this says, and warns where the two differ.
        empty: put the adapters on the meta device; otherwise they begin as PEFT begins them, drawn
            from torch's global generator.

    Raises UserError, which speaks of `--lora-targets`, when a target does not exist.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets or "all-linear",
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    config.base_model_name_or_path = base_name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config, low_cpu_mem_usage=empty).eval()
    except ValueError as error:
        raise UserError(f"--lora-targets: {str(error).splitlines()[0]}") from None


def save_lora_configuration(model: Any, out: Path) -> None:
    """Write the `adapter_config.json` with which PEFT loads the adapters of `add_lora`."""
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(out)
