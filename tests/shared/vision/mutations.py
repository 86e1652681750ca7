"""Mutations of shared/vision, each of which must turn the tests red.

    python tests/shared/vision/mutations.py          # all; some minutes on two cores
    python tests/shared/vision/mutations.py EXIF     # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

READING, IMAGES, PROJECTION, BACKBONES, TRAINING, EPISODES = (
    f"shared/vision/{name}.py"
    for name in ("reading", "images", "projection", "backbones", "training", "episodes")
)

MUTATIONS = [
    Mutation(
        READING,
        "(values / 65535)",
        "(values / 255)",
        "16 bits are cut at 8",
        ("reading",),
    ),
    Mutation(
        READING,
        'if image.mode in _ALPHA or "transparency" in image.info:',
        "if image.mode in _ALPHA:",
        "a transparent colour is ignored",
        ("reading",),
    ),
    Mutation(
        READING,
        'if image.mode in _ALPHA or "transparency" in image.info:',
        'if "transparency" in image.info:',
        "alpha is ignored",
        ("reading",),
    ),
    Mutation(
        READING,
        "+ 255 * (1 - alpha)",
        "+ 0 * (1 - alpha)",
        "transparency lies on black",
        ("reading",),
    ),
    Mutation(
        READING,
        "image = ImageOps.exif_transpose(opened)",
        "image = opened.copy()",
        "EXIF is ignored",
        ("reading",),
    ),
    Mutation(
        READING,
        "top = (width - size) // 2, (height - size) // 2",
        "top = 0, 0",
        "the corner is taken for the middle",
        ("reading",),
    ),
    Mutation(
        IMAGES,
        "order[: sum(sizes)].split(sizes))",
        "[order[:size] for size in sizes])",
        "parts of a split overlap",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "ids=None if self.ids is None else tuple(self.ids[row] for row in chosen)",
        "ids=self.ids",
        "ids stay where they were",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "concepts=None if self.concepts is None else self.concepts[rows]",
        "concepts=None if self.concepts is None else self.concepts[: len(self.pixels[rows])]",
        "concepts stay where they were",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "generator=generator(seed, key))[:n]",
        "generator=generator(0, key))[:n]",
        "the seed of a set is ignored",
        ("images",),
    ),
    Mutation(
        IMAGES,
        'draw = None if seed is None else np.random.default_rng(step_seed(seed, "pictures"))',
        "draw = None",
        "the seed of a class's images is ignored",
        ("images",),
    ),
    Mutation(
        IMAGES,
        '"test": _of_arrays(found.test_images, found.test_labels,',
        '"test": _of_arrays(found.train_images, found.train_labels,',
        "the test part is the training part",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "labels=labels[kept], classes=tuple(names)",
        "classes=tuple(names)",
        "some classes keep their old numbers",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "(values / 16)",
        "(values / 255)",
        "digits do not fill their range",
        ("images",),
    ),
    Mutation(
        IMAGES,
        "known.index(name), file)",
        "names.index(name), file)",
        "a folder's labels are not those of the training data",
        ("images",),
    ),
    Mutation(
        PROJECTION,
        "        return (x - self.mean) @ self.components",
        "        return x @ self.components",
        "other rows are not centred",
        ("projection",),
    ),
    Mutation(
        PROJECTION,
        "basis = basis * library.sign(basis[places, library.arange(kept)])",
        "pass",
        "a component has the solver's sign",
        ("projection",),
    ),
    Mutation(
        PROJECTION,
        "library.flip(vectors, (1,))[:, :kept]",
        "vectors[:, :kept]",
        "the least variance comes first",
        ("projection",),
    ),
    Mutation(
        BACKBONES,
        "        return found.movedim(-1, 1) if channels_last else found",
        "        return found.movedim(-1, 1) if channels_last else found.transpose(2, 3)",
        "a map of timm is transposed",
        ("backbones",),
    ),
    Mutation(
        BACKBONES,
        "        for layer in layers:\n            images = layer(images)\n        return images",
        "        for layer in layers:\n            images = layer(images)\n"
        "        return images.transpose(2, 3)",
        "a map is transposed",
        ("backbones",),
    ),
    Mutation(
        BACKBONES,
        "            torch.manual_seed(seed)\n        return _named",
        "            torch.manual_seed(0)\n        return _named",
        "the seed of the weights is ignored",
        ("backbones",),
    ),
    Mutation(
        BACKBONES,
        "    if not timm.is_model(plain):",
        '    if not timm.is_model(plain) and ":" not in plain:',
        "an id of the hub passes",
        ("backbones",),
    ),
    Mutation(
        TRAINING,
        'generator=generator(seed, "batches", epoch)',
        'generator=generator(seed, "batches")',
        "every epoch has one order",
        ("training",),
    ),
    Mutation(
        TRAINING,
        "            steps.zero_grad()\n",
        "",
        "gradients of all batches add up",
        ("training",),
    ),
    Mutation(
        TRAINING,
        "* len(rows)\n",
        "* batch\n",
        "a large last batch counts as the others",
        ("training",),
    ),
    Mutation(
        EPISODES,
        "order[end - size : end]",
        "order[:size]",
        "splits share classes",
        ("episodes",),
    ),
    Mutation(
        EPISODES,
        "query.append(rows[:, shots:].reshape(-1))",
        "query.append(rows[:, -queries - 1 : -1].reshape(-1))",
        "a query is in the support",
        ("episodes",),
    ),
    Mutation(
        EPISODES,
        'step_seed(seed, "task", number)',
        'step_seed(seed, "task")',
        "all episodes are one",
        ("episodes",),
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "vision", sys.argv[1:], under="shared"))
