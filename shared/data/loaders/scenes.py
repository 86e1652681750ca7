"""Frames and stereo pairs with true depth. Depth is along the optical axis; a pixel without it has
NaN, or 0 where values are raw.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.data.cache import path

Gray = NDArray[np.uint8]
Float = NDArray[np.float64]


class RenderedFrames(NamedTuple):
    """A rendered sequence with exact depth and ego-motion."""

    images: Gray  # [40, 480, 640]
    depth_m: NDArray[np.float32]  # [40, 480, 640]; NaN: nothing there
    camera_from_object: Float  # [40, 4, 4]; metres
    intrinsics: Float  # [3, 3]; pixels


def castle_simu() -> RenderedFrames:
    """40 rendered frames around a model castle; 23 % of the pixels show it and have depth."""
    folder = path("castle-simu")
    raw = np.stack([_depth_image(file) for file in sorted((folder / "Depth").glob("*.bin"))])
    depth = raw * np.float32(3.0518e-5)  # one unit in metres: 1 m / 2^15
    depth[raw == 0] = np.nan
    poses = np.stack([np.loadtxt(file) for file in sorted((folder / "CameraPose").glob("*.txt"))])
    return RenderedFrames(
        _images(folder / "Images"), depth, poses, _intrinsics(folder / "Config" / "chateau.xml")
    )


class SensorFrames(NamedTuple):
    """A sequence of a real depth camera. The depth image is not aligned with the grey one."""

    images: Gray  # [30, 480, 640]
    # [30, 480, 640]; unit not stated, so compare after scaling by the median; 0: not measured
    depth_raw: NDArray[np.uint16]
    intrinsics: Float  # [3, 3]; of the grey images, pixels
    depth_intrinsics: Float  # [3, 3]; of the depth images, pixels
    # [4, 4]; takes a point from the grey camera's frame into the depth camera's; metres
    depth_from_color: Float


def castel_real() -> SensorFrames:
    """30 frames of a model castle seen by a depth camera; 56 % of the pixels have depth."""
    folder = path("castel-real")
    depth = np.stack([_depth_image(file) for file in sorted((folder / "castel").glob("*.bin"))])
    return SensorFrames(
        _images(folder / "castel"),
        depth,
        _intrinsics(folder / "chateau.xml"),
        _intrinsics(folder / "chateau_depth.xml"),
        np.loadtxt(folder / "depth_M_color.txt"),
    )


def _images(folder: Path) -> Gray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.pgm"))])


def _depth_image(file: Path) -> NDArray[np.uint16]:
    height, width = np.fromfile(file, "<u4", 2)
    return np.fromfile(file, "<u2", offset=8).reshape(height, width)


def _intrinsics(file: Path) -> Float:
    """The 3x3 matrix of ViSP's camera element."""
    from xml.etree import ElementTree

    camera = ElementTree.parse(file).getroot().find("camera")
    assert camera is not None
    px, py, u0, v0 = (float(camera.findtext(tag, "")) for tag in ("px", "py", "u0", "v0"))
    return np.array([[px, 0, u0], [0, py, v0], [0, 0, 1]])


class Stereo(NamedTuple):
    """A rectified pair: the point at column x of the left image is at column x - disparity of the
    right one.
    """

    left: NDArray[np.uint8]  # [height, width, 3]; RGB
    right: NDArray[np.uint8]  # [height, width, 3]
    disparity_px: NDArray[np.float32]  # [height, width]; of the left image; NaN: not known


class StereoCalibration(NamedTuple):
    """Depth in millimetres is `focal_px * baseline_mm / (disparity_px + offset_px)`."""

    focal_px: float
    center_x_px: float  # of the left image
    center_y_px: float
    offset_px: float  # between the two centres
    baseline_mm: float


MOTORCYCLE_CALIBRATION = StereoCalibration(994.978, 311.193, 254.877, 31.086, 193.001)


def motorcycle() -> Stereo:
    """The Motorcycle pair of Middlebury 2014, [500, 741]; disparity 7.2 to 59.9 pixels. See
    `MOTORCYCLE_CALIBRATION`.
    """
    folder = path("motorcycle")
    disparity = np.load(folder / "motorcycle_disp.npz", allow_pickle=False)["arr_0"]
    return Stereo(
        _rgb(folder / "motorcycle_left.png"),
        _rgb(folder / "motorcycle_right.png"),
        _known(disparity, np.isfinite(disparity)),
    )


def aloe() -> Stereo:
    """The Aloe pair of Middlebury 2006, [1110, 1282]; disparity in whole pixels, up to 211; its
    calibration is not in the package.
    """
    from PIL import Image

    folder = path("aloe")
    disparity = np.asarray(Image.open(folder / "aloeGT.png"))
    return Stereo(
        _rgb(folder / "aloeL.jpg"), _rgb(folder / "aloeR.jpg"), _known(disparity, disparity > 0)
    )


def _rgb(file: Path) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB"))


def _known(disparity: NDArray, known: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(known, disparity, np.nan).astype(np.float32)
