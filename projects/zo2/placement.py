"""Where the tensors of a model lie: the blocks on a host tier and, one visit at a time, in a slot
of the device; all others on the device.

It moves tensors and never computes with them. While a block is away its tensors are placeholders
(NaN, one element of memory), so that nobody computes with them unnoticed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from projects.zo2.lanes import Pager
from projects.zo2.options import Options
from projects.zo2.storage import (
    ALIGNMENT,
    Codec,
    DiskStore,
    Field,
    Layout,
    RamStore,
    SafetensorsReader,
    safetensors_writer,
)
from projects.zo2.units import Partition, Unit, find_blocks, partition
from shared.errors import UserError


class Placement:
    """The model, taken apart and put in its places.

    Args:
        rounding_seed: of the number of a block, with what seed it is to be rounded now.

    Attributes:
        device: where it computes.
        home: where `bring_home` brings the model back to.
        parts: its units.
        pager: what moves blocks; None where no block leaves the device.

    Raises UserError for a model that it cannot take apart, or whose weights it cannot find.
    """

    def __init__(self, model: nn.Module, options: Options, rounding_seed: Callable[[int], int]):
        first = next(model.parameters(), None)
        if first is None or not any(p.requires_grad for p in model.parameters()):
            raise UserError("the model has no trainable parameter")
        self.model, self._rounding_seed = model, rounding_seed
        self.home = torch.device("cpu") if first.is_meta else first.device
        chosen = self.home if options.device is None else torch.device(options.device)
        self.device = _indexed(chosen)
        in_place = False
        if any(p.is_meta for p in model.parameters()):
            if not isinstance(options.storage, Path):
                raise UserError(
                    "the model is on the meta device: name the file with its weights by"
                    " storage=Path(...)"
                )
            _adopt(model, find_blocks(model, options.blocks), options.storage, self.device)
            in_place = True
        self.parts: Partition = partition(model, options.blocks, options.shared)
        self._tensors = [_block_tensors(unit) for unit in self.parts.blocks]
        self.layouts = [
            Layout(
                [Field(n, tuple(t.shape), t.dtype, _writable(t)) for n, t in tensors.items()],
                ALIGNMENT[self.device.type],
            )
            for tensors in self._tensors
        ]
        self._stochastic = options.rounding == "stochastic"
        self.pager: Pager | None = None
        if options.storage is None:
            model.to(self.device)
        else:
            store = self._make_store(options, in_place)
            try:
                self.pager = Pager(
                    store,
                    len(self.layouts),
                    max(layout.nbytes for layout in self.layouts),
                    self.device,
                    options.slots,
                    options.overlap,
                    options.reuse,
                    options.trace,
                )
                self._place_resident()
            except BaseException:  # too little memory on the device
                # what was on the meta device has no memory to go back to
                self._take_back(store, () if in_place else range(len(self.layouts)))
                if isinstance(options.storage, Path) and not in_place:
                    options.storage.unlink()
                raise

    # ---- a visit ---------------------------------------------------------------------------------

    def bind(self, unit: Unit) -> None:
        """Bring a block to the device: its tensors become views into the slot."""
        if self.pager is None:
            return
        assert unit.block is not None
        layout = self.layouts[unit.block]
        slot = self.pager.acquire(unit.block)
        views = dict(zip((f.name for f in layout.fields), layout.views(slot), strict=True))
        for name, tensor in self._tensors[unit.block].items():
            tensor.data = views[name]

    def unbind(self, unit: Unit, write: bool) -> None:
        """Let a block go; with `write` what it holds goes back to the host tier."""
        if self.pager is None:
            return
        assert unit.block is not None
        generator = None
        if self._stochastic and write:
            generator = torch.Generator(self.device).manual_seed(self._rounding_seed(unit.block))
        self._make_away(unit.block)
        self.pager.release(unit.block, write, generator)

    @contextmanager
    def at_home(self, unit: Unit, write: bool) -> Iterator[None]:
        """Inside, the unit's tensors hold their values."""
        if unit.block is None:
            yield
            return
        self.bind(unit)
        try:
            yield
        finally:
            self.unbind(unit, write)

    def changes_something(self, unit: Unit) -> bool:
        """Whether a visit can change any tensor of a block: one that is frozen need not go back."""
        assert unit.block is not None
        return self.layouts[unit.block].writable_nbytes > 0

    # ---- the whole model -------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter and saved buffer, tied ones once; a value is valid
        until the next is asked for.
        """
        for name, tensor in self.resident().items():
            yield name, tensor.data
        for index, unit in enumerate(self.parts.blocks):
            with self.at_home(unit, write=False):
                for name, tensor in self._tensors[index].items():
                    yield name, tensor.data

    def fields(self) -> list[Field]:
        """What `tensors` yields, without fetching it."""
        blocks = (item for tensors in self._tensors for item in tensors.items())
        return [
            Field(n, tuple(t.shape), t.dtype, True) for n, t in (*self.resident().items(), *blocks)
        ]

    def resident(self) -> dict[str, Tensor]:
        """Every saved tensor outside the blocks, tied ones once."""
        away = {name for tensors in self._tensors for name in tensors}
        distinct = {
            id(t): (n, t)
            for n, t in reversed(self.model.state_dict(keep_vars=True).items())
            if n not in away
        }
        return dict(reversed(distinct.values()))

    def fill(self, file: SafetensorsReader) -> None:
        """Every tensor takes its value from `file`."""
        for index, unit in enumerate(self.parts.blocks):
            with self.at_home(unit, write=True):
                for name, tensor in self._tensors[index].items():
                    tensor.data.copy_(file.read(name))
        for name, tensor in self.resident().items():
            tensor.data.copy_(file.read(name))

    def write_resident(self) -> None:
        """Write what lies outside the blocks into the file of the host tier."""
        assert self.pager is not None
        assert isinstance(self.pager.store, DiskStore)
        self.pager.settle()
        for name, tensor in self.resident().items():
            self.pager.store.write_tensor(name, tensor.data)
        self.pager.store.sync()

    def bring_home(self, close: Callable[[], None]) -> None:
        """Everything back to where the model was before; `close` is called when no block is needed
        from the host tier any more.
        """
        for index, unit in enumerate(self.parts.blocks if self.pager else ()):
            with self.at_home(unit, write=False):
                homes = {
                    name: tensor.data.to(self.home, copy=True)
                    for name, tensor in self._tensors[index].items()
                }
            for name, tensor in self._tensors[index].items():
                tensor.data = homes[name]
        close()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.to(self.home)

    def abandon(self) -> None:
        """Give up all that is on its way; every block is away."""
        if self.pager is not None:
            self.pager.abandon()
            for block in range(len(self._tensors)):
                self._make_away(block)

    # ---- making it so ----------------------------------------------------------------------------

    def _make_away(self, block: int) -> None:
        for tensor in self._tensors[block].values():
            tensor.data = _placeholder(tensor, self.device)

    def _make_store(self, options: Options, in_place: bool) -> RamStore | DiskStore:
        codecs = [
            Codec(layout, layout.stored_as(options.storage_dtype), self._stochastic)
            for layout in self.layouts
        ]
        if options.storage == "ram":
            store = RamStore(codecs, pinned=self.device.type == "cuda", bucket=options.bucket)
            for index, tensors in enumerate(self._tensors):
                try:
                    store.fill(index, {name: t.data for name, t in tensors.items()})
                except BaseException:  # memory that cannot be had, or page-locked
                    self._take_back(store, range(index))
                    raise
                self._make_away(index)
            return store
        assert isinstance(options.storage, Path)
        path = options.storage
        if not in_place:
            if path.exists():
                raise UserError(
                    f"{path} exists: name a new file, or build the model on the meta device to"
                    " train this one in place"
                )
            resident = self.resident()
            fields = [Field(n, tuple(t.shape), t.dtype, True) for n, t in resident.items()]
            with safetensors_writer(
                path, fields + [f for c in codecs for f in c.stored.fields]
            ) as writer:
                for tensor in resident.values():
                    writer.write(tensor.data)
                for tensors, codec in zip(self._tensors, codecs, strict=True):
                    for f in codec.stored.fields:
                        writer.write(tensors[f.name].data)
        disk = DiskStore(path, codecs, self.device, options.drop_cache)
        for index in range(len(self._tensors)):
            self._make_away(index)
        return disk

    def _take_back(self, store: RamStore | DiskStore, blocks: Iterable[int]) -> None:
        """The user's model as it was, where it cannot be taken in whole (in a narrower
        `storage_dtype`, rounded to it).
        """
        for block in blocks:
            layout = self.layouts[block]
            room = torch.empty(layout.nbytes, dtype=torch.uint8)
            store.read(block, room)
            views = dict(zip((f.name for f in layout.fields), layout.views(room), strict=True))
            for name, tensor in self._tensors[block].items():
                tensor.data = views[name].to(self.home)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.to(self.home)
        store.close()

    def _place_resident(self) -> None:
        """Everything that does not travel goes to the device."""
        travels = {id(tensor) for tensors in self._tensors for tensor in tensors.values()}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in travels:
                tensor.data = tensor.data.to(self.device)


def _block_tensors(unit: Unit) -> dict[str, Tensor]:
    """Every tensor that travels with a block: what its state dict holds, tied tensors once. Other
    buffers stay on the device.
    """
    saved = unit.module.state_dict(prefix=f"{unit.name}.")
    named = (
        *unit.module.named_parameters(prefix=unit.name),
        *unit.module.named_buffers(prefix=unit.name),
    )
    return {name: tensor for name, tensor in named if name in saved}


def _writable(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) or tensor.requires_grad


def _adopt(
    model: nn.Module, blocks: dict[str, nn.Module], path: Path, device: torch.device
) -> None:
    """Take a model on the meta device off it: what lies outside the blocks gets its values from
    `path`, the blocks get placeholders.

    The Parameters are made anew, because torch does not let `.data` leave the meta device; tied
    ones stay tied.
    """
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    made: dict[int, nn.Parameter] = {}
    file = SafetensorsReader(path)
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                if id(module) in inside:
                    value = _placeholder(parameter, device)
                elif name in file:
                    value = file.read(name).to(device, parameter.dtype)
                else:
                    raise UserError(
                        f"{path} holds no tensor '{name}'; it is not a checkpoint of this model"
                    )
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]


def _placeholder(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same shape and dtype that takes one element of memory; NaN, so that nobody
    computes with it unnoticed.
    """
    fill = float("nan") if tensor.dtype.is_floating_point else 0
    return torch.full((), fill, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _indexed(device: torch.device) -> torch.device:
    """The same device with its number, which some of torch's functions want."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and device.index is None
        else device
    )
