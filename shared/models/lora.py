"""LoRA adapters, by PEFT."""

import warnings
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.finite import check_finite
from shared.models.guard import plain_errors


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


def load_lora(model: Any, folder: Path) -> Any:
    """`model` with the LoRA adapters of a folder, which alone can be trained, in eval mode.

    Raises:
        UserError: the folder holds no adapters in safetensors, or others than the model's: of
            another kind than LoRA, missing, unexpected, of another shape, not finite.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{file} does not exist; PEFT's save_pretrained writes it")
    with plain_errors(folder, "adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what does not fit; it is refused below
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA":
            raise UserError(f"{folder} holds adapters of {config.peft_type.value}, not of LoRA")
        stored = load_file(file)
        check_finite(stored.items(), str(file))
        tuned = PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
        # True and "auto" may ask the hub
        known = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if apart := sorted(stored.keys() ^ known.keys()):
        held = "has no place for" if apart[0] in stored else "has besides"
        raise UserError(f"{file} does not fit the model, which {held} '{apart[0]}'")
    return tuned.eval()
