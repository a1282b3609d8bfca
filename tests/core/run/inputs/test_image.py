"""Front-end parity with transformers' PIL processors, and every refusal."""

import io
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import PIL.Image
import pytest
from transformers import image_utils
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmedge.errors import CheckpointError, InputError
from vlmedge.export._checkpoint.preprocessor import front_end
from vlmedge.run.inputs import image_files
from vlmedge.run.inputs.image import preprocess
from vlmedge.run.inputs.image_files import SIZE_LIMIT_PIXELS, is_images, load_image

STATS = {"image_mean": image_utils.OPENAI_CLIP_MEAN, "image_std": image_utils.OPENAI_CLIP_STD}
CLIP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3}
CLIP |= STATS
BLIP = {"size": {"height": 96, "width": 80}, "resample": 3, "rescale_factor": 1 / 255} | STATS
# (width, height)
SIZES = [
    *[(640, 480), (480, 640), (224, 224), (225, 223), (223, 225), (1, 1), (1, 200), (200, 1)],
    *[(2, 3), (3, 2), (3, 3), (4, 4), (7, 1000), (999, 17), (101, 333), (337, 224), (224, 337)],
    *[(299, 301), (511, 513), (150, 149), (1023, 769), (31, 30), (450, 299)],
]


def noise(width, height, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width=40, height=30, mode="RGB"):
    if mode == "I;16":
        values = np.arange(width * height, dtype=np.uint16).reshape(height, width) * 50
        return PIL.Image.fromarray(values)
    if mode in ("L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"):
        base = PIL.Image.fromarray(noise(width, height)).convert("L" if mode == "LA" else "RGB")
        if mode == "LA":
            base.putalpha(PIL.Image.fromarray(noise(width, height, seed=1)[..., 0]))
            return base
        return base.convert(mode)
    return PIL.Image.fromarray(noise(width, height, len(mode)), mode=None)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def reference(processor, images):
    return processor(images=images, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_preprocess_equals_clip(width, height):
    image = PIL.Image.fromarray(noise(width, height))
    expected = reference(CLIPImageProcessorPil(), image)
    np.testing.assert_array_equal(preprocess([image], front_end(CLIP)), expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_preprocess_equals_blip(width, height):
    image = PIL.Image.fromarray(noise(width, height))
    processor = BlipImageProcessorPil(size=BLIP["size"])
    got = preprocess([image], front_end(BLIP))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, reference(processor, image))


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("edge", "crop"), [(32, (45, 20)), (33, (64, 64)), (21, (21, 77)), (7, (8, 9))]
)
def test_preprocess_pads_a_crop_that_is_larger(edge, crop, resample):
    size = {"height": crop[0], "width": crop[1]}
    changes = {"size": {"shortest_edge": edge}, "crop_size": size, "resample": resample}
    images = [PIL.Image.fromarray(noise(*shape)) for shape in [(50, 31), (20, 61), (9, 9)]]
    expected = reference(CLIPImageProcessorPil(**changes), images)
    np.testing.assert_array_equal(preprocess(images, front_end(CLIP | changes)), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 0.00784},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1.0]},
        {"size": 60, "crop_size": {"height": 50, "width": 40}},
        {"size": {"height": 60, "width": 70}, "crop_size": 50},
    ],
)
def test_front_end_reads_a_config(changes):
    image = picture(100, 75)
    expected = reference(CLIPImageProcessorPil(**changes), image)
    np.testing.assert_array_equal(preprocess([image], front_end(CLIP | changes)), expected)


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil(), BlipImageProcessorPil()])
def test_front_end_reads_what_transformers_writes(processor):
    front = front_end(processor.to_dict())
    image = picture(300, 200)
    np.testing.assert_array_equal(preprocess([image], front), reference(processor, image))


def test_front_end_takes_a_lone_size_without_crop_as_a_square():
    front = front_end(BLIP | {"size": 48})
    assert (front.resize, front.resize_size, front.crop_size) == ("exact", (48, 48), None)
    front = front_end(CLIP | {"size": 48, "default_to_square": True})
    assert (front.resize, front.resize_size) == ("exact", (48, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize False: it must be true, since a graph takes one size"),
        ({"do_pad": True}, "do_pad True: the steps that a bundle has are do_resize, "),
        ({"do_center_crop": False}, "size .*: a shortest_edge needs do_center_crop"),
        ({"size": None}, "size None: give height and width, or shortest_edge"),
        ({"size": {"longest_edge": 9}}, "size .*: give height and width, or shortest_edge"),
        ({"size": {"height": 0, "width": 3}}, "size .*: sides are whole pixels"),
        ({"size": {"shortest_edge": "9"}}, "size .*: sides are whole pixels"),
        ({"crop_size": None}, "crop_size None: give a side"),
        ({"crop_size": {"height": 4}}, "crop_size .*: give a side"),
        ({"resample": 4}, r"resample 4: choose from 0 \(nearest\), 1 \(lanczos\)"),
        ({"resample": [3]}, r"resample \[3\]: choose from"),
        ({"rescale_factor": 0}, "rescale_factor 0: give a number above 0"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\]: give three numbers"),
        ({"image_mean": "abc"}, "image_mean 'abc': give three numbers"),
        ({"image_std": [1, 0, 1]}, r"image_std \[1, 0, 1\]: give three numbers"),
    ],
)
def test_front_end_refuses_by_field(changes, message):
    with pytest.raises(CheckpointError, match=f"^preprocessor_config.json: {message}") as caught:
        front_end(CLIP | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["size", "crop_size", "resample", "image_mean", "image_std"])
def test_front_end_names_what_is_missing(field):
    config = {name: value for name, value in CLIP.items() if name != field}
    with pytest.raises(CheckpointError, match=f": {field} is missing: "):
        front_end(config)


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "1", "P", "I;16", "CMYK", "YCbCr", "HSV"]
)
def test_load_image_converts_each_mode_like_transformers(mode):
    image = picture(mode=mode)
    assert image.mode == mode
    got = load_image(image)
    assert got.mode == "RGB"
    np.testing.assert_array_equal(got, image_utils.load_image(image))


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "a.png", {}),
        ("RGB", "a.jpg", {}),
        ("RGB", "a.png", {"transparency": (1, 2, 3)}),
        ("RGBA", "a.png", {}),
        ("RGBA", "a.webp", {}),
        ("L", "a.png", {"transparency": 7}),
        ("L", "a.jpg", {}),
        ("LA", "a.png", {}),
        ("1", "a.png", {}),
        ("P", "a.gif", {"transparency": 3}),
        ("P", "a.png", {"transparency": 3}),
        ("I;16", "a.png", {}),
        ("CMYK", "a.jpg", {}),
        ("CMYK", "a.tiff", {}),
    ],
)
def test_load_image_reads_each_file_like_transformers(tmp_path, mode, name, options):
    path = saved(tmp_path / name, picture(mode=mode), **options)
    with PIL.Image.open(path) as image:  # by path the reference leaves a GIF open
        expected = image_utils.load_image(image)
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(load_image(source), expected)


def test_load_image_reads_a_palette_with_alpha_without_a_warning(tmp_path):
    path = saved(tmp_path / "a.png", picture(mode="P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference's own
        expected = image_utils.load_image(str(path))
    np.testing.assert_array_equal(load_image(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_load_image_turns_by_exif(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.jpg", picture(), exif=exif)
    expected = image_utils.load_image(str(path))
    assert expected.size == ((30, 40) if orientation > 4 else (40, 30))
    np.testing.assert_array_equal(load_image(path), expected)
    with PIL.Image.open(path) as image:
        np.testing.assert_array_equal(load_image(image), expected)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_load_image_takes_an_array(channels):
    array = noise(9, 5, channels or 1)
    got = np.asarray(load_image(array[..., 0] if channels is None else array))
    expected = array[..., :3] if (channels or 1) >= 3 else np.repeat(array, 3, axis=2)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(load_image(array[::-1, ::2]), expected[::-1, ::2])


def test_load_image_keeps_an_rgb_image():
    image = picture()
    assert load_image(image) is image


def test_load_image_works_in_threads_and_leaves_the_filters_alone(tmp_path):
    path = saved(tmp_path / "a.png", picture())
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = {image.size for image in pool.map(load_image, [path] * 64)}
    assert sizes == {(40, 30)}
    assert list(warnings.filters) == before


def test_is_images_tells_several_from_one():
    assert is_images([picture()])
    assert is_images(())
    assert not any(map(is_images, ["a.png", b"", picture(), noise(2, 2)]))


def refuse(source, message):
    with pytest.raises(InputError, match=message) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


def test_load_image_refuses_a_missing_file(tmp_path):
    refuse(tmp_path / "no.png", r"^no file .*no.png: give the path of an image file$")


def test_load_image_refuses_an_empty_path():
    refuse("", r"^empty path: give the path of an image file$")


def test_load_image_refuses_a_path_below_a_file(tmp_path):
    path = saved(tmp_path / "a.png", picture())
    refuse(path / "b.png", r"^(no file|file) .*b.png")


def test_load_image_refuses_a_folder(tmp_path):
    refuse(tmp_path, r"^.* is a folder: give the path of one image file$")


def test_load_image_refuses_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "pipe is no regular file: give the path of an image file$")


def test_load_image_refuses_an_address():
    refuse("https://a.org/b.png", r"^https://a.org/b.png is a web address: download the image")
    refuse(
        "data:image/png;base64," + "A" * 5000, r"^'data:image.{1,200} is a web address: download"
    )


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "two\nlines"])
def test_load_image_refuses_an_impossible_path(path):
    refuse(path, r"^(no )?file ['\w]")


def test_load_image_refuses_a_file_without_permission(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", picture())

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_files.Path, "open", deny)
    refuse(path, r"^file .*a.png cannot be read: you have no read permission$")


def test_load_image_refuses_a_text_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("not an image")
    refuse(path, r"^image .*a.png is in a format that Pillow cannot read: give JPEG, PNG")


def test_load_image_refuses_an_empty_file(tmp_path):
    path = tmp_path / "a.png"
    path.touch()
    refuse(path, r"^image .*a.png is in a format that Pillow cannot read: give JPEG, PNG")


def test_load_image_refuses_no_bytes():
    refuse(b"", r"^image of 0 bytes: give the whole file's bytes$")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff"])
def test_load_image_refuses_a_truncated_file(tmp_path, name):
    data = saved(tmp_path / name, picture(200, 200)).read_bytes()
    for part in (0.1, 0.5, 0.9):
        refuse(
            data[: int(len(data) * part)],
            r"^image of \d+ bytes is (damaged|in a format that Pillow cannot read)",
        )


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.tiff"])
def test_load_image_survives_flipped_bytes(tmp_path, name):
    data = saved(tmp_path / name, picture(20, 20)).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 5):
            broken[at] = int(rng.integers(256))
        try:
            assert load_image(bytes(broken)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


def test_load_image_refuses_an_image_whose_file_is_closed(tmp_path):
    image = PIL.Image.open(saved(tmp_path / "a.png", picture()))
    image.close()
    refuse(image, r"^PIL image is damaged or cut short")


def test_load_image_refuses_no_pixels():
    refuse(PIL.Image.new("RGB", (0, 5)), r"^PIL image has 0 x 5 pixels: it needs at least 1 x 1$")
    refuse(np.zeros((5, 0, 3), np.uint8), r"^image array has 0 x 5 pixels: it needs")


def bomb(width, height):
    """A PNG that says it has this many pixels."""
    stream = io.BytesIO()
    PIL.Image.new("1", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_load_image_refuses_a_decompression_bomb():
    refuse(bomb(20000, 20000), rf"has too many pixels: at most {SIZE_LIMIT_PIXELS} are allowed$")


def test_load_image_refuses_a_bomb_where_pil_would_not(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    refuse(bomb(20000, 20000), rf"has 20000 x 20000 pixels: at most {SIZE_LIMIT_PIXELS} are")


def test_load_image_passes_on_no_bomb_warning():
    refuse(bomb(10000, 10000), r"is damaged or cut short")  # over PIL's warning limit


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_load_image_refuses_an_array_dtype(dtype):
    name = np.dtype(dtype).name
    refuse(np.zeros((4, 4, 3), dtype), rf"^image array of {name}: give uint8, 0..255$")


@pytest.mark.parametrize("shape", [(3, 8, 9), (4,), (2, 4, 4, 3), (4, 4, 2), ()])
def test_load_image_refuses_an_array_shape(shape):
    refuse(np.zeros(shape, np.uint8), r"^image array of shape \[.*\]: give \[height, width\] or")


@pytest.mark.parametrize("source", [None, 7, [b""], io.BytesIO()])
def test_load_image_refuses_another_type(source):
    refuse(source, r"^image of type \w+: give a path, bytes, a PIL image or a uint8 array$")


def test_load_image_refuses_a_mode_that_pil_cannot_convert():
    refuse(PIL.Image.new("La", (4, 4)), r"^PIL image has mode La: convert it to RGB first$")


def test_preprocess_refuses_no_images():
    with pytest.raises(InputError, match=r"^no images: give at least one$"):
        preprocess([], front_end(CLIP))


def test_preprocess_refuses_another_mode():
    with pytest.raises(InputError, match=r"^image of mode L: open it with load_image"):
        preprocess([picture(mode="L")], front_end(CLIP))


def test_preprocess_refuses_long_sides():
    image = PIL.Image.new("RGB", (30000, 10))
    message = "^image of 30000 x 10 pixels: the longer side may be at most 200 times the shorter$"
    with pytest.raises(InputError, match=message):
        preprocess([image], front_end(CLIP))
    assert preprocess([image], front_end(BLIP)).shape == (1, 3, 96, 80)


def test_preprocess_refuses_a_batch_of_two_shapes():
    front = msgspec.structs.replace(front_end(CLIP), crop_size=None)
    images = [PIL.Image.new("RGB", (20, 20)), PIL.Image.new("RGB", (20, 40))]
    with pytest.raises(InputError, match=r"^images of 224 x 224 and 224 x 448 pixels after"):
        preprocess(images, front)
