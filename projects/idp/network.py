"""The source network: a residual body with a spatial map, and the classifier of dense prototypes
that it is trained with.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from projects.idp.ridge import min_max, ridge_logits
from shared.errors import UserError
from shared.vision.backbones import Backbone, ResidualBlock


class ResidualNet(Backbone):
    """A strided stem, then residual blocks, each of which halves the map.

    The paper's ResNet-10 has a stem of 64 filters of 7 x 7 and the widths 64, 128, 256, 512: 160
    pixels become a map of 5 x 5. The small one of scale cpu: 28 pixels, two blocks, 3 x 3.

    Args:
        stem: filters of the first layer, whose stride is 2.
        kernel: its edge, an odd number.
        widths: of the blocks.
        mean, spread: of pixels from 0 to 1, which images are normalised by, in training and tests.
    """

    def __init__(
        self,
        channels: int,
        stem: int,
        kernel: int,
        widths: Sequence[int],
        mean: Sequence[float] = (0.5,),
        spread: Sequence[float] = (0.5,),
    ):
        super().__init__()
        self.width = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, stem, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(stem),
            nn.LeakyReLU(0.1),
        )
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise([stem, *widths])))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("spread", torch.tensor(spread).view(-1, 1, 1))

    mean: Tensor
    spread: Tensor

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> "ResidualNet":
        """The network whose state dict this is, in eval mode; its sizes are those of the weights.

        Raises:
            UserError: it is of another network.
        """
        try:
            stem, channels, kernel, _ = weights["stem.0.weight"].shape
            blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
            widths = [len(weights[f"blocks.{n}.shortcut.1.weight"]) for n in range(len(blocks))]
            mean, spread = (weights[name].flatten().tolist() for name in ("mean", "spread"))
            made = cls(channels, stem, kernel, widths, mean, spread)
            made.load_state_dict(dict(weights))
        except (KeyError, ValueError, RuntimeError):
            raise UserError("the weights are not those of a source network of IDP") from None
        return made.eval()

    def spatial_map(self, images: Tensor) -> Tensor:
        """images [n, channels, h, w] from 0 to 1 -> [n, width, h', w']."""
        return self.blocks(self.stem((images - self.mean) / self.spread))

    def forward(self, images: Tensor) -> Tensor:
        return self.spatial_map(images).mean((-2, -1))


class DensePrototypes(nn.Module):
    """Stage 1's classifier: each class has n learnable rows, and a class's logit says how well an
    image's cells are reconstructed from them.

    Logits are min-max scaled per image and multiplied by a learnable scalar.
    """

    def __init__(self, classes: int, rows: int, width: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(classes, rows, width))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, cells: Tensor) -> Tensor:
        """cells [n, r, d] -> logits [n, classes]."""
        return self.scale * min_max(ridge_logits(cells, self.rows))
