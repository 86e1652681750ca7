"""The tensors of a model folder under the names that its model knows them by.

The two differ where transformers 5 converts as it loads: it renames, and it fuses what lies in the
files apart (the experts of a mixture). Nothing here reads a weight unless it is asked for.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from shared.errors import UserError
from shared.models.folders import weight_files
from shared.models.guard import plain_errors, quantised


@dataclass(frozen=True)
class Stored:
    """How a tensor of a model lies in the files of its folder.

    Attributes:
        sources: (file, name in the file) of each tensor that it is made of; mostly there is one.
        make: from their values, in this order, the tensor.
    """

    sources: tuple[tuple[Path, str], ...]
    make: Callable[[list[Tensor]], Tensor]


def stored_tensors(model: Any, folder: Path) -> dict[str, Stored]:
    """How each tensor of `model` lies in `folder`, by the name that the model has for it.

    A tied tensor is there by one of its names at least. Only the heads of the files are read.

    Args:
        model: of the class and configuration that the folder is for, without adapters; its
            parameters may be on the meta device.

    Raises:
        UserError: the weights are not those of the model: a tensor that is missing, one that the
            model does not know, another shape, codes instead of numbers, a damaged file. Tied
            tensors that are stored once and buffers that the class makes itself are no misfit.
    """
    family = model.config.model_type
    heads: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for file in weight_files(folder):
        for name, head in _heads(file, family).items():
            heads[name], places[name] = head, file
    with plain_errors(folder, family):
        found = _converted(model, heads, places)
        _check_fit(model, heads, folder)
    numbers = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in sorted(numbers & found.keys()):
        for _, source in found[name].sources:
            dtype = heads[source].dtype
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise quantised(folder, family, f"'{source}' is of {dtype}".replace("torch.", ""))
    return found


def _heads(file: Path, family: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device."""
    from safetensors import SafetensorError, safe_open

    heads = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                head = opened.get_slice(name)
                shape = head.get_shape()
                no_rows = head[:0] if shape else head[...]
                heads[name] = torch.empty(shape, dtype=no_rows.dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} ({family}) cannot be loaded: it is truncated or damaged ({error})"
        ) from None
    return heads


def _converted(model: Any, heads: dict[str, Tensor], places: dict[str, Path]) -> dict[str, Stored]:
    """Each tensor of the model that transformers makes of those in the files, and how."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    plain: dict[str, Stored] = {}
    fused: dict[str, list[tuple[str, str]]] = {}  # target -> (pattern, name in the file)
    for source in sorted(heads, key=dot_natural_key):
        target, pattern = rename_source_key(
            source, renamings, converters, model.base_model_prefix, known
        )
        if target not in known and source in known:  # saved under the model's own names
            target, pattern = source, None
        if target not in known:
            continue  # `_check_fit` says whether that matters
        if pattern is None:
            plain[target] = Stored(((places[source], source),), _only)
        else:
            fused.setdefault(target, []).append((pattern, source))
    for target, parts in fused.items():
        convert = partial(_convert, model, by_pattern[parts[0][0]], target, parts)
        sources = tuple((places[source], source) for _, source in parts)
        try:
            made = convert([heads[source] for _, source in parts])
        except Exception as error:  # of torch, of the conversion: one of the tensors is missing
            raise UserError(
                f"{places[parts[0][1]].parent} ({model.config.model_type}): the weights from"
                f" '{parts[0][1]}' on do not make up '{target}':"
                f" {' '.join(str(error).split())[:150]}"
            ) from error
        for name in made:
            plain[name] = Stored(sources, partial(_one_of, convert, name))
    return plain


def _convert(
    model: Any, converter: Any, target: str, parts: list[tuple[str, str]], values: list[Tensor]
) -> dict[str, Any]:
    """What a converter of transformers makes of tensors of the files: {name in the model: it}."""
    own = copy.deepcopy(converter)  # it collects what it converts
    for (pattern, source), value in zip(parts, values, strict=True):
        own.add_tensor(target, source, pattern, value)
    made: dict[str, Any] = own.convert(target, model=model, config=model.config)
    return made


def _one_of(
    convert: Callable[[list[Tensor]], dict[str, Any]], name: str, values: list[Tensor]
) -> Tensor:
    made = convert(values)[name]
    tensor: Tensor = made[0] if isinstance(made, list) else made
    return tensor


def _only(values: list[Tensor]) -> Tensor:
    (value,) = values
    return value


def _check_fit(model: Any, heads: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError where transformers, having loaded the heads of the tensors, reports that
    they are not those of the model.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(heads),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # so that it reports them, where it would raise
            output_loading_info=True,
            trust_remote_code=False,
        )
    where = f"{folder} ({model.config.model_type})"
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{where} holds no weights for {_named(missing)}, which its config.json asks for"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise UserError(
            f"{where}: its weights' '{name}' is {list(stored)}, its config.json says {list(wanted)}"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{where} holds weights that {type(model).__name__} has no place for:"
            f" {_named(unexpected)}; its config.json is of another model"
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the table that transformers logs of what does not fit."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
