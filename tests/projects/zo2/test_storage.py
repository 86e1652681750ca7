"""Where blocks rest: layouts, casts, stochastic rounding, the safetensors file."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from projects.zo2.storage import (
    Codec,
    DiskStore,
    Field,
    Layout,
    RamStore,
    read_header,
    round_stochastically,
    safetensors_writer,
)
from shared.errors import UserError

CPU = torch.device("cpu")
FIELDS = [
    Field("frozen", (3, 5), torch.float32, False),
    Field("weight", (7, 3), torch.float32, True),
    Field("scalar", (), torch.float32, True),
    Field("empty", (0, 4), torch.float32, True),
    Field("count", (), torch.int64, True),
    Field("mask", (9,), torch.bool, False),
    Field("half", (5,), torch.bfloat16, True),
]


def _values(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f.name: (torch.randn(f.shape, generator=g) * 3).to(f.dtype) for f in FIELDS}


def test_a_layout_is_aligned_and_what_is_written_back_comes_first():
    layout = Layout(FIELDS)
    assert [f.name for f in layout.fields] == [
        "weight",
        "scalar",
        "empty",
        "count",
        "half",
        "frozen",
        "mask",
    ]
    assert layout.offsets == [0, 128, 192, 192, 256, 320, 384]
    assert (layout.writable_nbytes, layout.nbytes) == (320, 448)


def test_views_cover_their_bytes_and_nothing_else():
    layout = Layout(FIELDS)
    raw = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for f, view in zip(layout.fields, layout.views(raw), strict=True):
        assert (view.shape, view.dtype) == (f.shape, f.dtype)
        assert view.numel() == 0 or view.data_ptr() % 4 == 0
        view.copy_(_values()[f.name])
    for f, view in zip(layout.fields, layout.views(raw), strict=True):
        assert torch.equal(view, _values()[f.name])


@pytest.fixture(params=["ram", "disk", "disk without cache"])
def store(request, tmp_path):
    """A function (codecs, values of each block) -> a store that holds them."""
    made = []

    def make(codecs, blocks, bucket=True):
        if request.param == "ram":
            result = RamStore(codecs, pinned=False, bucket=bucket)
            for index, values in enumerate(blocks):
                result.fill(index, values)
        else:
            path = tmp_path / f"{len(made)}.safetensors"
            fields = [f for codec in codecs for f in codec.stored.fields]
            with safetensors_writer(path, fields) as writer:
                for codec, values in zip(codecs, blocks, strict=True):
                    for f in codec.stored.fields:
                        writer.write(values[f.name])
            result = DiskStore(path, codecs, CPU, drop_cache="without" in request.param)
        made.append(result)
        return result

    yield make
    for each in made:
        each.close()


def _blocks(count):
    return [
        [Field(f"{i}.{f.name}", f.shape, f.dtype, f.writable) for f in FIELDS] for i in range(count)
    ]


def _block_values(fields, seed):
    return {
        name: value
        for f, (_, value) in zip(fields, _values(seed).items(), strict=True)
        for name in [f.name]
    }


@pytest.mark.parametrize("bucket", [True, False])
def test_what_goes_down_comes_up(store, bucket):
    layouts = [Layout(fields) for fields in _blocks(3)]
    codecs = [Codec(layout, layout, False) for layout in layouts]
    contents = [_block_values(fields, i) for i, fields in enumerate(_blocks(3))]
    shelf = store(codecs, contents, bucket)
    device = torch.zeros(layouts[0].nbytes + 100, dtype=torch.uint8)
    for block in (1, 0, 2, 1):
        shelf.read(block, device)
        for f, view in zip(layouts[block].fields, layouts[block].views(device), strict=True):
            assert torch.equal(view, contents[block][f.name])
            view.copy_(view.logical_not() if f.dtype == torch.bool else view + 1)
        shelf.write(block, device)
        for f, view in zip(layouts[block].fields, layouts[block].views(device), strict=True):
            if f.writable:
                contents[block][f.name] = view.clone()  # what is frozen never travels back
    for block in range(3):
        shelf.read(block, device)
        assert all(
            torch.equal(v, contents[block][f.name])
            for f, v in zip(layouts[block].fields, layouts[block].views(device), strict=True)
        )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_low_bit_is_a_cast_and_integers_stay(store, dtype):
    fields = _blocks(1)[0]
    layout = Layout(fields)
    codec = Codec(layout, layout.stored_as(dtype), False)
    values = _block_values(fields, 3)
    shelf = store([codec], [values])
    device = torch.zeros(layout.nbytes, dtype=torch.uint8)
    shelf.read(0, device)
    for f, view in zip(layout.fields, layout.views(device), strict=True):
        wanted = (
            values[f.name].to(dtype).to(f.dtype) if f.dtype.is_floating_point else values[f.name]
        )
        assert torch.equal(view, wanted)


def test_bytes_are_counted(store):
    fields = _blocks(1)[0]
    layout = Layout(fields)
    shelf = store([Codec(layout, layout, False)], [_block_values(fields, 0)])
    device = torch.zeros(layout.nbytes, dtype=torch.uint8)
    up, down = shelf.read(0, device), shelf.write(0, device)
    if isinstance(shelf, RamStore):
        assert (up, down) == (layout.nbytes, layout.writable_nbytes)
    else:
        payload = 84 + 4 + 8 + 10
        assert (up, down) == (payload + 60 + 9, payload)


# ---- stochastic rounding -------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def _rounded(value, dtype, count=20_000, seed=0):
    target = torch.empty(count, dtype=dtype)
    round_stochastically(torch.full((count,), value), target, torch.Generator().manual_seed(seed))
    return target.double()


def _awkward(dtype):
    """Between two neighbours: ordinary, negative, near and at the edge of a binade from both sides,
    subnormal, near zero.
    """
    info = torch.finfo(dtype)
    eps, tiny = info.eps, info.smallest_normal
    values = [
        0.3,
        -0.7,
        1 + 0.3 * eps,
        1 - 0.1 * eps,
        1 - 0.4 * eps,
        -(2 - 0.2 * eps),
        2 + 0.9 * eps,
        0.02,
        -0.02,
    ]
    values += [tiny * (1 + 0.4 * eps), tiny * (1 - 0.3 * eps), tiny * 0.4 * eps, -tiny * 2.7 * eps]
    return [torch.tensor(v).item() for v in values]


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour(dtype):
    for value in _awkward(dtype):
        got = _rounded(value, dtype)
        distinct = got.unique()
        assert len(distinct) <= 2
        low, high = distinct.min().item(), distinct.max().item()
        assert low <= value <= high
        between = torch.tensor([(low + high) / 2], dtype=torch.float32).to(dtype).double().item()
        assert between in (low, high), "there is another number in between"
        error = (
            (high - low) * ((value - low) * (high - value) / (high - low) ** 2 / len(got)) ** 0.5
            if high > low
            else 0.0
        )
        assert abs(got.mean().item() - value) <= 4 * error


@pytest.mark.parametrize("dtype", LOW)
def test_what_can_be_held_is_held(dtype):
    every = torch.arange(2 ** (8 * dtype.itemsize) if dtype.itemsize == 1 else 2**16)
    kept = (
        every.to(torch.uint8).view(dtype)
        if dtype.itemsize == 1
        else every.to(torch.int32).to(torch.uint16).view(dtype)
    )
    kept = kept[kept.float().isfinite()]
    for seed in range(3):
        target = torch.empty_like(kept)
        round_stochastically(kept.float(), target, torch.Generator().manual_seed(seed))
        assert torch.equal(target.float(), kept.float())


@pytest.mark.parametrize("dtype", LOW)
def test_many_values_at_once_are_unbiased(dtype):
    g = torch.Generator().manual_seed(1)
    source = torch.randn(200_000, generator=g) * 0.02
    target = torch.empty(source.shape, dtype=dtype)
    round_stochastically(source, target, g)
    error = target.double() - source.double()
    assert abs(error.mean()) <= 4 * error.std() / len(source) ** 0.5
    assert abs((error * source.sign()).mean()) <= 4 * error.std() / len(source) ** 0.5
    assert (error * 1e3).abs().max() > 0


@pytest.mark.parametrize("dtype", LOW)
def test_too_large_saturates(dtype):
    largest = torch.finfo(dtype).max
    source = torch.tensor(
        [largest, -largest] + ([largest * 1.5, -largest * 4] if largest < 1e30 else [])
    )
    target = torch.empty(source.shape, dtype=dtype)
    round_stochastically(source, target, torch.Generator().manual_seed(0))
    assert target.float().tolist() == [largest * s for s in source.sign().tolist()]


def test_nan_stays_nan():
    target = torch.empty(1, dtype=torch.bfloat16)
    round_stochastically(torch.tensor([float("nan")]), target, torch.Generator().manual_seed(0))
    assert target.isnan().all()


def test_its_seed_decides():
    assert torch.equal(_rounded(0.3, torch.bfloat16, seed=1), _rounded(0.3, torch.bfloat16, seed=1))
    assert not torch.equal(
        _rounded(0.3, torch.bfloat16, seed=1), _rounded(0.3, torch.bfloat16, seed=2)
    )


# ---- the file ------------------------------------------------------------------------------------


def test_what_the_writer_writes_safetensors_reads(tmp_path):
    path = tmp_path / "w.safetensors"
    with safetensors_writer(path, FIELDS, {"note": "hello"}) as writer:
        for f in FIELDS:
            writer.write(_values()[f.name])
        assert not path.exists(), "the file appears when it is whole"
    loaded = load_file(path)
    assert loaded.keys() == _values().keys()
    assert all(
        torch.equal(loaded[n], v) and loaded[n].dtype == v.dtype for n, v in _values().items()
    )
    header, start = read_header(path)
    assert list(header) == [f.name for f in FIELDS]
    assert start % 8 == 0
    assert b'"note":"hello"' in path.read_bytes()[:start]


@pytest.mark.parametrize("how", ["exception", "too few"])
def test_a_file_that_is_not_finished_does_not_appear(how, tmp_path):
    path = tmp_path / "w.safetensors"

    def write():
        with safetensors_writer(path, FIELDS) as writer:
            writer.write(_values()["frozen"])
            if how == "exception":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if how == "exception" else AssertionError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_writer_is_read_and_written_in_place(tmp_path):
    """safetensors sorts its tensors by itself; blocks need not lie together."""
    path = tmp_path / "w.safetensors"
    layouts = [Layout(fields) for fields in _blocks(2)]
    contents = [_block_values(fields, i) for i, fields in enumerate(_blocks(2))]
    save_file(contents[0] | contents[1] | {"other": torch.arange(3)}, path)
    store = DiskStore(path, [Codec(layout, layout, False) for layout in layouts], CPU)
    device = torch.zeros(layouts[0].nbytes, dtype=torch.uint8)
    for block in (0, 1):
        store.read(block, device)
        views = layouts[block].views(device)
        assert all(
            torch.equal(v, contents[block][f.name])
            for f, v in zip(layouts[block].fields, views, strict=True)
        )
        views[0].mul_(2)
        store.write(block, device)
    store.write_tensor("other", torch.tensor([7, 8, 9]))
    store.sync()
    store.close()
    store.close()
    after = load_file(path)
    assert after["other"].tolist() == [7, 8, 9]
    for block in (0, 1):
        assert torch.equal(after[f"{block}.weight"], contents[block][f"{block}.weight"] * 2)
        assert torch.equal(after[f"{block}.frozen"], contents[block][f"{block}.frozen"])


def test_more_tensors_than_one_system_call_takes(tmp_path):
    fields = [Field(f"t{i}", (1 + i % 3,), torch.float32, True) for i in range(2500)]
    layout = Layout(fields)
    path = tmp_path / "w.safetensors"
    values = {f.name: torch.full(f.shape, float(i)) for i, f in enumerate(fields)}
    with safetensors_writer(path, fields) as writer:
        for f in fields:
            writer.write(values[f.name])
    store = DiskStore(path, [Codec(layout, layout, False)], CPU)
    device = torch.zeros(layout.nbytes, dtype=torch.uint8)
    store.read(0, device)
    assert all(
        torch.equal(v, values[f.name]) for f, v in zip(fields, layout.views(device), strict=True)
    )
    for view in layout.views(device):
        view.neg_()
    store.write(0, device)
    assert all(torch.equal(t, -values[n]) for n, t in load_file(path).items())
    store.close()


def test_transfers_go_on_where_the_system_stopped(tmp_path, monkeypatch):
    """preadv and pwritev may move less than they were asked to."""
    layout = Layout(FIELDS)
    path = tmp_path / "w.safetensors"
    save_file(_values(), path)
    store = DiskStore(path, [Codec(layout, layout, False)], CPU)

    def one_byte_less(call):
        def short(fd, views, offset):
            first = views[0][: max(1, len(views[0]) // 2)]
            return call(fd, [first], offset)

        return short

    monkeypatch.setattr(os, "preadv", one_byte_less(os.preadv))
    monkeypatch.setattr(os, "pwritev", one_byte_less(os.pwritev))
    device = torch.zeros(layout.nbytes, dtype=torch.uint8)
    store.read(0, device)
    assert all(
        torch.equal(v, _values()[f.name])
        for f, v in zip(layout.fields, layout.views(device), strict=True)
    )
    layout.views(device)[0].neg_()
    store.write(0, device)
    assert torch.equal(load_file(path)["weight"], -_values()["weight"])
    store.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"abc", "is not a safetensors file"),
        (b"PK\x03\x04 a zip file, say", "is not a safetensors file"),
        ((20).to_bytes(8, "little") + b'{"a": tru', "is not a safetensors file"),
        ((6).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc\xfb\xfa", "is not a safetensors file"),
        ((6).to_bytes(8, "little") + b"[1, 2]", "is not a safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "is not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content, message, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(path)


@pytest.mark.parametrize("change", [-1, -300, 1])
def test_a_file_of_the_wrong_length_is_refused(change, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0" * change)
    with pytest.raises(UserError, match="is truncated"):
        read_header(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Field("b", (2,), torch.float32, True), "holds no tensor 'b'"),
        (
            Field("a", (2, 1), torch.float32, True),
            r"'a' is F32 \[2\], the model wants F32 \[2, 1\]",
        ),
        (Field("a", (2,), torch.float16, True), r"'a' is F32 \[2\], the model wants F16 \[2\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(field, message, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    layout = Layout([field])
    with pytest.raises(UserError, match=message):
        DiskStore(path, [Codec(layout, layout, False)], CPU)


def test_a_file_cut_short_while_in_use_says_so(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(200)}, path)
    layout = Layout([Field("a", (200,), torch.float32, True)])
    store = DiskStore(path, [Codec(layout, layout, False)], CPU)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(OSError, match="it was truncated while in use"):
        store.read(0, torch.zeros(layout.nbytes, dtype=torch.uint8))
    store.close()


def test_the_header_is_json_with_offsets_without_gaps(tmp_path):
    path = tmp_path / "w.safetensors"
    with safetensors_writer(path, FIELDS) as writer:
        for f in FIELDS:
            writer.write(_values()[f.name])
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + end
