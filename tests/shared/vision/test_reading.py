"""Image files of every mode hold the values that one sees in them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from shared.errors import UserError
from shared.vision.reading import on_white, read_image, square, to_picture, to_pixels

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY // 2], -1)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_stays_grey_and_colour_has_three_channels(tmp_path):
    grey = read_image(saved(tmp_path, Image.fromarray(GREY)))
    colour = read_image(saved(tmp_path, Image.fromarray(COLOUR)))
    assert grey.dtype == colour.dtype == torch.uint8
    assert np.array_equal(grey.numpy(), GREY[None])
    assert np.array_equal(colour.numpy(), COLOUR.transpose(2, 0, 1))


def test_a_mode_that_is_asked_for_is_given(tmp_path):
    grey, colour = (
        saved(tmp_path, Image.fromarray(array), f"{array.ndim}.png") for array in (GREY, COLOUR)
    )
    assert np.array_equal(read_image(grey, "RGB").numpy(), np.stack([GREY] * 3))
    assert read_image(colour, "L").shape == (1, 2, 3)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path, name):
    values = np.array([[0, 256, 32768], [1, 40000, 65535]], np.uint16)
    found = read_image(saved(tmp_path, Image.fromarray(values), name))
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(values[None] / 65535, abs=1e-7)
    assert read_image(tmp_path / name, "RGB").shape == (3, 2, 3)
    assert float(read_image(tmp_path / name, size=4).max()) <= 1


def test_thirty_two_bits_have_no_known_range(tmp_path):
    for values in (np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)):
        file = saved(tmp_path, Image.fromarray(values), "deep.tif")
        with pytest.raises(UserError, match=r"deep\.tif.*scale them to 0\.\.65535"):
            read_image(file)


def test_one_bit_is_black_and_white(tmp_path):
    file = saved(tmp_path, Image.fromarray(GREY > 128))
    assert Image.open(file).mode == "1"
    assert np.array_equal(read_image(file)[0].numpy(), 255 * (GREY > 128))


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = read_image(saved(tmp_path, image))
    assert found[:, 0].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    clear = read_image(saved(tmp_path, image, transparency=1))
    assert clear[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    found = read_image(saved(tmp_path, Image.fromarray(rgba)))
    assert found[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]
    grey = np.array([[[7, 255], [7, 0], [0, 51]]], np.uint8)
    found = read_image(saved(tmp_path, Image.fromarray(grey, "LA")))
    assert found.tolist() == [[[7, 255, 204]]]


@pytest.mark.parametrize(("array", "key"), [(GREY, 51), (COLOUR, (51, 204, 25))])
def test_a_transparent_colour_lies_on_white(tmp_path, array, key):
    found = read_image(saved(tmp_path, Image.fromarray(array), transparency=key))
    assert (found[:, 0, 1] == 255).all()
    assert np.array_equal(found[:, 1].numpy(), np.atleast_3d(array)[1].T)


def test_cmyk_is_seen_in_its_colours(tmp_path):
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, :8, 0], inks[:, 8:16, 1] = 255, 255  # cyan, magenta, white
    for name in ("inks.tif", "inks.jpg"):
        found = read_image(saved(tmp_path, Image.fromarray(inks, "CMYK"), name)).int()
        wanted = [[0, 255, 255], [255, 0, 255], [255, 255, 255]]
        assert (found[:, 4, 4::8].T - torch.tensor(wanted)).abs().max() <= 4


def test_the_camera_was_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = read_image(saved(tmp_path, Image.fromarray(GREY), exif=exif))
    assert np.array_equal(found[0].numpy(), np.rot90(GREY, -1))


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (60, 200)]
    for name in ("film.gif", "film.tif"):
        file = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert (read_image(file, "L") == 60).all()


def test_damage_is_told_in_one_line_with_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.bmp"):
        whole = saved(tmp_path, Image.fromarray(noise), name).read_bytes()
        for length in (0, 10, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(UserError, match=f"{name} is no image that can be read") as error:
                read_image(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "absent.png")


def test_bits_that_changed_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = bytearray(saved(tmp_path, Image.fromarray(noise)).read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "image.png").write_bytes(whole)
    with pytest.raises(UserError, match="is no image that can be read"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("shape", [(8, 8), (23, 9), (10, 31)])
def test_the_middle_square_is_torchvisions(tmp_path, shape):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    )
    steps = transforms.Compose(
        [
            transforms.Resize(8, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(8),
            transforms.PILToTensor(),
        ]
    )
    assert torch.equal(to_pixels(square(picture, 8)), steps(picture))
    assert torch.equal(read_image(saved(tmp_path, picture), size=8), steps(picture))


def test_pixels_are_pictures_and_back():
    for array in (GREY, COLOUR, (GREY / 255).astype(np.float32)):
        picture = Image.fromarray(array)
        assert np.array_equal(np.asarray(to_picture(to_pixels(picture))), array)


def test_half_transparent_is_half_white():
    assert on_white(np.array([0, 100, 255, 128], np.uint8)).tolist() == [127, 177, 255]
