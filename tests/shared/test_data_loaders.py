"""Each entry of the catalogue, loaded once and held against what is known of it. Needs the entry in
the cache; never fetches.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from shared import data
from shared.data import cache, catalogue, loaders
from shared.errors import UserError

CHECKS: dict[str, Callable[[], None]] = {}


def known(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register the facts of an entry."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = check
        return check

    return register


@pytest.mark.data
@pytest.mark.parametrize("name", list(catalogue.catalogue()))
def test_entry_is_what_is_known_of_it(name: str) -> None:
    if not cache.is_complete(name):
        pytest.skip(f"{name} is not in the cache: `repro data fetch {name}`")
    CHECKS[name]()


def test_every_entry_has_a_check() -> None:
    assert set(CHECKS) == set(catalogue.catalogue())


def test_every_loader_names_the_command_when_the_data_is_missing(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    arguments = {"font_glyphs": ["A"]}
    for name in loaders.__all__:
        loader = getattr(loaders, name)
        if name.islower():
            with pytest.raises(UserError, match="repro data fetch"):
                loader(*arguments.get(name, []))


@known("smollm2-135m")
def _() -> None:
    gguf = data.path("smollm2-135m") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert gguf.stat().st_size == 98_362_432
    with gguf.open("rb") as stream:
        assert stream.read(4) == b"GGUF"


@known("minilm-l6")
def _() -> None:
    from safetensors import safe_open

    with safe_open(data.path("minilm-l6") / "model.safetensors", "numpy") as weights:
        sizes = {name: int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys()}  # noqa: SIM118
    assert sum(size for name, size in sizes.items() if "position_ids" not in name) == 22_713_216


@known("efficientnet-lite0")
def _() -> None:
    import torch

    state = torch.load(
        data.path("efficientnet-lite0") / "efficientnet-lite0-57934424.pth", weights_only=True
    )
    assert len(state) == 296
    assert [tuple(tensor.shape) for tensor in state.values() if 1000 in tensor.shape] == [
        (1000, 1280),
        (1000,),
    ]


@known("mezo-pypi")
def _() -> None:
    assert {file.name for file in (data.path("mezo-pypi") / "mezo").iterdir()} == {
        "__init__.py",
        "distributed.py",
        "mezo.py",
    }


@known("torch-explain")
def _() -> None:
    text = (data.path("torch-explain") / "torch_explain" / "nn" / "concepts.py").read_text()
    assert "class ConceptEmbedding(torch.nn.Module)" in text


@known("tok-gpt2")
def _() -> None:
    import json

    assert len(json.loads((data.path("tok-gpt2") / "encoder.json").read_text())) == 50_257
    assert len((data.path("tok-gpt2") / "vocab.bpe").read_text().splitlines()) == 50_001


@known("wiki100")
def _() -> None:
    articles = loaders.wiki100()
    assert len(articles) == 101
    assert sum(map(len, articles.values())) == 4_753_272
    assert (
        "a Latin name used to refer to the inhabitants of then-known northern Africa"
        in articles["Africa"]
    )


@known("fine-food")
def _() -> None:
    train, test = loaders.fine_food_reviews()
    assert (train.shape, test.shape) == ((4000, 2), (1000, 2))
    assert (train["label"].mean(), test["label"].mean()) == (0.65, 0.658)
    assert train["text"].str.len().min() > 10


def check_labelled(
    images: loaders.Labelled, shape: tuple[int, ...], train: int, first: list[int]
) -> None:
    assert images.train_images.shape == (train, *shape)
    assert images.test_images.shape == (10_000, *shape)
    assert images.train_images.dtype == images.test_images.dtype == np.uint8
    assert images.train_labels[: len(first)].tolist() == first


@known("mnist")
def _() -> None:
    images = loaders.mnist()
    check_labelled(images, (28, 28), 60_000, [5, 0, 4, 1, 9])
    assert np.bincount(images.train_labels).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    # the usual normalisation constants
    assert images.train_images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert images.train_images.std() / 255 == pytest.approx(0.3081, abs=1e-4)


@known("fashion-mnist")
def _() -> None:
    images = loaders.fashion_mnist()
    check_labelled(images, (28, 28), 60_000, [9, 0, 0, 3, 0])
    assert set(np.bincount(images.train_labels)) == {6000}
    assert images.train_images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)


@known("cifar10")
def _() -> None:
    images = loaders.cifar10()
    check_labelled(images, (32, 32, 3), 50_000, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3])
    assert set(np.bincount(images.train_labels)) == {5000}
    assert set(np.bincount(images.test_labels)) == {1000}
    means = images.train_images.mean(axis=(0, 1, 2)) / 255
    # red, green, blue, in that order
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-4)


@known("digits")
def _() -> None:
    from sklearn.datasets import load_digits

    images, labels = loaders.digits()
    peer = load_digits()
    np.testing.assert_array_equal(images, peer.images)
    np.testing.assert_array_equal(labels, peer.target)


@known("quickdraw")
def _() -> None:
    drawings, names = loaders.quickdraw()
    assert drawings.shape == (345, 100, 28, 28)
    assert (drawings.min(), drawings.max()) == (0, 1)
    some, picked = loaders.quickdraw(["pizza", "cat"])
    assert picked == ["pizza", "cat"]
    np.testing.assert_array_equal(some[0], drawings[names.index("pizza")])
    with pytest.raises(UserError, match="'piza'"):
        loaders.quickdraw(["piza"])


def check_emoji(vendor: str) -> None:
    images, names = loaders.emoji(vendor)
    assert images.shape == (1911, 64, 64, 4)
    assert (names["category"].nunique(), names["subcategory"].nunique()) == (10, 99)
    tomato = images[names.index[names["short_name"] == "tomato"][0]].astype(float)
    red, green, blue = (tomato[..., channel][tomato[..., 3] > 0].mean() for channel in range(3))
    assert red > 2 * green > 0
    assert red > 2 * blue > 0


@known("emoji")
def _() -> None:
    check_emoji("google")


@known("emoji-twitter")
def _() -> None:
    check_emoji("twitter")


@known("fonts")
def _() -> None:
    # Latin A, Cyrillic A, Cyrillic Zhe, a space, 8
    images, present, names = loaders.font_glyphs("A\u0410\u0416 8", size=28)
    assert images.shape == (250, 5, 28, 28)
    assert len(set(names)) == 250
    assert present.sum(axis=0).tolist() == [250, 170, 170, 0, 250]
    np.testing.assert_array_equal(images.any(axis=(2, 3)), present)
    sans = images[names.index("truetype/dejavu/DejaVuSans")]
    np.testing.assert_array_equal(sans[0], sans[1])
    ink = np.argwhere(sans[0])
    np.testing.assert_allclose((ink.min(axis=0) + ink.max(axis=0)) / 2, 13.5, atol=1)  # centred


@known("photos")
def _() -> None:
    photos = loaders.photos()
    assert len(photos) == 11
    assert photos["retina"].shape == (1411, 1411, 3)
    assert photos["brick"].shape == (512, 512)


def warped_error(frames: loaders.RenderedFrames, a: int, b: int) -> float:
    """Mean difference, in [0, 1], between frame a and what frame b shows at the same points of the
    object.
    """
    focal, center_x, center_y = (
        frames.intrinsics[0, 0],
        frames.intrinsics[0, 2],
        frames.intrinsics[1, 2],
    )
    row, column = np.nonzero(np.isfinite(frames.depth_m[a]))
    z = frames.depth_m[a][row, column]
    points = np.stack(
        [(column - center_x) / focal * z, (row - center_y) / focal * z, z, np.ones_like(z)]
    )
    x, y, z, _ = frames.camera_from_object[b] @ np.linalg.inv(frames.camera_from_object[a]) @ points
    column_b, row_b = (
        np.rint(axis / z * focal + center).astype(int)
        for axis, center in ((x, center_x), (y, center_y))
    )
    inside = (column_b >= 0) & (column_b < 640) & (row_b >= 0) & (row_b < 480)
    seen = frames.images[b][row_b[inside], column_b[inside]].astype(float)
    return float(np.abs(frames.images[a][row, column][inside] - seen).mean() / 255)


@known("castle-simu")
def _() -> None:
    frames = loaders.castle_simu()
    assert frames.images.shape == frames.depth_m.shape == (40, 480, 640)
    assert frames.intrinsics.tolist() == [[700, 0, 320], [0, 700, 240], [0, 0, 1]]
    assert warped_error(frames, 0, 5) < 0.01  # unwarped: 0.094
    still = frames._replace(camera_from_object=np.broadcast_to(np.eye(4), (40, 4, 4)))
    assert warped_error(still, 0, 5) > 0.05


@known("castel-real")
def _() -> None:
    frames = loaders.castel_real()
    assert frames.images.shape == frames.depth_raw.shape == (30, 480, 640)
    assert frames.depth_raw[frames.depth_raw > 0].min() >= 1000
    assert 0.5 < (frames.depth_raw > 0).mean() < 0.6
    assert frames.intrinsics[0, 0] == pytest.approx(615.167, abs=1e-3)
    assert np.linalg.det(frames.depth_from_color) == pytest.approx(1, abs=1e-5)


def stereo_error(pair: loaders.Stereo, scale: float) -> float:
    """Mean grey difference between left pixels and right ones at `scale` times the disparity."""
    row, column = np.nonzero(np.isfinite(pair.disparity_px))
    there = np.rint(column - scale * pair.disparity_px[row, column]).astype(int)
    left, right = pair.left.mean(axis=2), pair.right.mean(axis=2)
    return float(np.abs(left[row, column] - right[row, there.clip(0)])[there >= 0].mean())


@known("motorcycle")
def _() -> None:
    pair = loaders.motorcycle()
    assert pair.left.shape == pair.right.shape == (500, 741, 3)
    assert (np.nanmin(pair.disparity_px), np.nanmax(pair.disparity_px)) == pytest.approx(
        (7.19, 59.91), abs=0.01
    )
    assert stereo_error(pair, 1) < 0.4 * min(stereo_error(pair, 0), stereo_error(pair, 2))


@known("aloe")
def _() -> None:
    pair = loaders.aloe()
    assert pair.left.shape == pair.right.shape == (1110, 1282, 3)
    assert stereo_error(pair, 1) < 0.4 * min(stereo_error(pair, 0.5), stereo_error(pair, 2))


def check_wordnet(release: str, sizes: dict[str, int]) -> None:
    ids: set[str] = set()
    for part, size in sizes.items():
        synsets, _ = loaders.wordnet(part, release)
        assert len(synsets) == synsets["id"].nunique() == size
        assert synsets["gloss"].str.len().min() > 0
        ids |= set(synsets["id"])
    for part in sizes:
        assert set(loaders.wordnet(part, release)[1]["target"]) <= ids


@known("wordnet")
def _() -> None:
    check_wordnet("3.0", {"noun": 82_115, "verb": 13_767, "adj": 18_156, "adv": 3_621})
    nouns, pointers = loaders.wordnet()
    assert nouns["file"].nunique() == 26
    words = nouns.set_index("id")["words"]
    (dog,) = words[[any(word == "domestic_dog" for word in group) for group in words]].index
    assert nouns.set_index("id").loc[dog, "file"] == "noun.animal"
    hypernyms = pointers[(pointers["source"] == dog) & (pointers["symbol"] == "@")]["target"]
    assert sorted(words[target][0] for target in hypernyms) == ["canine", "domestic_animal"]


@known("wordnet31")
def _() -> None:
    check_wordnet("3.1", {"noun": 82_192, "verb": 13_789, "adj": 18_185, "adv": 3_625})


@known("debian-packages")
def _() -> None:
    packages, relations = loaders.debian_packages()
    assert len(packages) == packages["package"].nunique() > 50_000
    described = packages.set_index("package")
    assert described.loc["bash", ["source", "section"]].tolist() == ["bash", "shells"]
    assert described.loc["bash", "description"].startswith("Bash is an sh-compatible")
    assert (packages["description"] == "").mean() < 0.01
    bash = relations[relations["package"] == "bash"]
    assert "bash-completion" in set(bash.loc[bash["relation"] == "Recommends", "other"])
    assert not relations["other"].str.contains(r"[ (:]").any()


@known("cora")
def _() -> None:
    graph = loaders.cora()
    assert (graph.features.shape, graph.edges.shape) == ((2708, 1433), (5429, 2))
    assert np.bincount(graph.labels).tolist() == [818, 180, 217, 426, 351, 418, 298]
    # homophily
    assert (
        graph.labels[graph.edges[:, 0]] == graph.labels[graph.edges[:, 1]]
    ).mean() == pytest.approx(0.81, abs=0.01)


@known("letter")
def _() -> None:
    features, labels = loaders.letter()
    assert features.shape == (20_000, 16)
    assert (features.min(), features.max()) == (0, 15)
    assert pd.Series(labels).value_counts().agg(["min", "max", "size"]).tolist() == [734, 813, 26]
