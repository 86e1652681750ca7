"""A network of the user's or of a library as IDP takes it: images from 0 to 1 to a spatial map."""

import torch
from torch import Tensor

from shared.errors import UserError
from shared.vision.backbones import Backbone, backbone

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE0 = ((127 / 255,) * 3, (128 / 255,) * 3)


class Normalised(Backbone):
    """A backbone behind the normalisation that it was trained with."""

    mean: Tensor
    spread: Tensor

    def __init__(self, body: Backbone, mean: tuple[float, ...], spread: tuple[float, ...]):
        super().__init__()
        self.body, self.width = body, body.width
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("spread", torch.tensor(spread).view(-1, 1, 1))

    @classmethod
    def named(cls, name: str, size: int) -> "Normalised":
        """A backbone of `shared.vision.backbones`, for RGB images, with the normalisation of its
        training (ImageNet's, where it is not known).

        Raises:
            UserError: there is no such backbone, or it gives no spatial map.
        """
        body = backbone(name, (3, size, size), seed=0)
        made = cls(body, *(LITE0 if name == "efficientnet-lite0" else IMAGENET)).eval()
        with torch.no_grad():
            made.spatial_map(torch.zeros(1, 3, size, size))
        return made

    def spatial_map(self, images: Tensor) -> Tensor:
        found = self.body.spatial_map((images - self.mean) / self.spread)
        if found.dim() != 4:
            raise UserError(f"{type(self.body).__name__} gives no spatial map [n, d, h, w]")
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.spatial_map(images).mean((-2, -1))
