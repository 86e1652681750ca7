"""A model's tensors on their way between files: one at a time, so that no model is ever in memory
as a whole.

A model is built on the meta device (`shared.models.empty_causal_lm`) and gets its values from a
folder of safetensors files, or from a checkpoint of a run. With LoRA the base stays as it is and
only the adapters are saved.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from projects.zo2.engine import ZO2
from projects.zo2.storage import Field, SafetensorsReader, safetensors_writer
from projects.zo2.units import find_blocks
from shared.errors import UserError
from shared.finite import check_finite
from shared.models import Stored
from shared.seeding import generator

Source = Callable[[list[str]], Tensor]  # the names under which a model knows a tensor -> its value

_PEFT_PREFIX = "base_model.model."


def folder_source(stored: dict[str, Stored]) -> Source:
    """The tensors of a model folder, as `shared.models.stored_tensors` finds them there. Reading
    one raises UserError where it holds NaN or infinity.
    """
    files = {file for tensor in stored.values() for file, _ in tensor.sources}
    readers = {file: SafetensorsReader(file) for file in files}

    def read(names: list[str]) -> Tensor:
        plain = (name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".") for name in names)
        name = next(name for name in plain if name in stored)
        sources = stored[name].sources
        value = stored[name].make([readers[file].read(source) for file, source in sources])
        check_finite([(name, value)], str(sources[0][0].parent))
        return value

    return read


def file_source(path: Path) -> Source:
    """The tensors of a checkpoint that `save_weights` wrote."""
    reader = SafetensorsReader(path)

    def read(names: list[str]) -> Tensor:
        for name in names:
            if name in reader:
                return reader.read(name)
        raise UserError(f"{path} holds no tensor '{names[0]}'")

    return read


def adapter_source(base: Source, model: nn.Module, seed: int, saved: Path | None) -> Source:
    """`base`, and the adapters from the file `saved`, or as LoRA begins: B = 0 and A uniform, each
    drawn from its own seed.
    """
    reader = SafetensorsReader(saved) if saved is not None else None
    shapes = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def read(names: list[str]) -> Tensor:
        name = names[0]
        if name not in shapes:
            return base(names)
        if reader is not None:
            return reader.read(_adapter_name(name))
        value = torch.zeros(shapes[name].shape)
        if "lora_A" in name:
            # what PEFT's kaiming_uniform_(a=sqrt(5)) comes to
            bound = 1 / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=generator(seed, "lora", name))
        return value

    return read


def _adapter_name(name: str) -> str:
    return name.replace(".default.", ".")


def _aliases(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield from names.values()


def write_working_file(
    model: nn.Module, source: Source, path: Path, storage_dtype: torch.dtype | None
) -> None:
    """The file that is trained in place: all parameters, the blocks' buffers too, blocks held as
    `storage_dtype`.
    """
    blocks = find_blocks(model, None)
    inside = {
        id(tensor)
        for block in blocks.values()
        for tensor in (*block.parameters(), *block.buffers())
    }
    parameters = [(parameter, names) for parameter, names in _aliases(model)]
    buffers = [
        (n, b) for prefix, block in blocks.items() for n, b in block.named_buffers(prefix=prefix)
    ]

    def stored(tensor: Tensor) -> torch.dtype:
        return (
            storage_dtype
            if storage_dtype is not None and id(tensor) in inside and tensor.is_floating_point()
            else tensor.dtype
        )

    fields = [Field(names[0], tuple(p.shape), stored(p), True) for p, names in parameters]
    fields += [Field(name, tuple(b.shape), stored(b), True) for name, b in buffers]
    with safetensors_writer(path, fields) as writer:
        for parameter, names in parameters:
            writer.write(_fitting(source, parameter, names).to(parameter.dtype))
        for _, buffer in buffers:
            writer.write(buffer)


def fill(model: nn.Module, source: Source) -> None:
    """Take a model off the meta device. Tied parameters stay tied."""
    made = {
        id(p): nn.Parameter(_fitting(source, p, names).to(p.dtype), p.requires_grad)
        for p, names in _aliases(model)
        if p.is_meta
    }
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in made:
                module._parameters[key] = made[id(parameter)]


def _fitting(source: Source, parameter: nn.Parameter, names: list[str]) -> Tensor:
    value = source(names)
    if value.shape != parameter.shape:
        raise UserError(
            f"the weights' '{names[0]}' is {list(value.shape)}, its config.json says"
            f" {list(parameter.shape)}"
        )
    return value


def save_weights(engine: ZO2, path: Path, steps: int, lora: bool) -> None:
    """All weights, or only the adapters under the names that PEFT loads. The file appears when it
    is whole and remembers `steps`.

    Raises UserError when a weight is not finite, or no space is left.
    """
    metadata = {"steps": str(steps)}
    if not lora:
        engine.save(path, metadata)
        return
    adapters = {
        _adapter_name(name): tensor.cpu().clone()
        for name, tensor in engine.finite_tensors()
        if "lora_" in name
    }
    with safetensors_writer(
        path, [Field(n, tuple(t.shape), t.dtype, True) for n, t in adapters.items()], metadata
    ) as writer:
        for tensor in adapters.values():
            writer.write(tensor)


def saved_steps(path: Path) -> int | None:
    """After how many steps `save_weights` wrote this file; None when there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["steps"])
