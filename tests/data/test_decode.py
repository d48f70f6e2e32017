"""phreg.data.decode: hostile files, and every kind of image."""

import io
import mmap
import os
import random
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise, pixels, plain
from PIL import Image

from phreg.data import decode as decoder
from phreg.data.decode import decode
from phreg.data.sources import Files
from phreg.errors import DataError


def test_an_image_lying_on_its_side_is_turned_upright_whatever_its_format():
    upright = noise((5, 3))
    turned = {1: upright, 2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    turned[3] = upright.transpose(Image.Transpose.ROTATE_180)
    turned[6] = upright.transpose(Image.Transpose.ROTATE_90)
    turned[8] = upright.transpose(Image.Transpose.ROTATE_270)
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("PNG", "TIFF"):
            assert (pixels(decode(encoded(stored, format, exif=exif))) == pixels(upright)).all()


def test_all_eight_orientations_agree_with_pils_own_transposition():
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(noise((5, 3)), exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert (pixels(decode(data)) == pixels(expected)).all()


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 1, 128, 255]]  # value / 257, rounded
    for format in ("PNG", "TIFF", "PPM"):
        image = decode(encoded(Image.fromarray(values), format))
        assert image.mode == "RGB"
        assert pixels(image)[..., 0].tolist() == expected
        assert (pixels(image)[..., 0] == pixels(image)[..., 2]).all()


def deep_png(values):
    """Writes a PNG of 16 bits a channel in colour, which PIL reads but does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def dim_told(monkeypatch):
    """As at the start of a run, which has told nothing yet."""
    monkeypatch.setattr(decoder, "_dim_told", mmap.mmap(-1, 1))


TWELVE_BITS = np.linspace(7, 4095, 12, dtype=np.uint16).reshape(3, 4)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (encoded(Image.fromarray(TWELVE_BITS), "PNG"), "7 to 4095"),
        (encoded(Image.fromarray(TWELVE_BITS), "TIFF"), "7 to 4095"),
        (encoded(Image.fromarray(4 * TWELVE_BITS), "PNG"), "28 to 16380"),
        # PIL keeps the upper byte of colours: 0 of 7, and 15, which stands for 3840 to 4095.
        (deep_png(TWELVE_BITS[..., None].repeat(3, -1)), "0 to 4095"),
    ],
    ids=["png", "tiff", "14 bits", "colour"],
)
def test_12_or_14_bits_in_a_16_bit_picture_are_warned_of_with_their_range(dim_told, caplog, data, found):
    decode(data, "scan.png")
    assert len(caplog.records) == 1
    assert f"scan.png holds 16-bit values from {found} of 65535" in caplog.text


def test_dark_16_bit_pictures_are_warned_of_once_a_run_and_their_values_are_kept(dim_told, caplog):
    for _ in range(3):
        image = decode(encoded(Image.fromarray(TWELVE_BITS), "PNG"))
        assert (pixels(image)[..., 0] == np.rint(TWELVE_BITS / 257)).all()
    assert len(caplog.records) == 1


def test_pictures_that_use_their_16_bits_and_dark_ones_of_8_are_not_warned_of(dim_told, caplog):
    decode(encoded(Image.fromarray(16 * TWELVE_BITS), "PNG"))
    decode(deep_png((16 * TWELVE_BITS)[..., None].repeat(3, -1)))
    transparent = np.zeros((3, 4, 4), dtype=np.uint16)
    transparent[..., :3] = (16 * TWELVE_BITS)[..., None]
    decode(deep_png(transparent))
    decode(encoded(plain((3, 2, 1))))
    decode(encoded(plain(5, mode="L")))
    assert not caplog.records


def test_readers_in_other_processes_warn_of_dark_16_bit_pictures_once_together(tmp_path):
    Image.fromarray(TWELVE_BITS).save(tmp_path / "scan.png")
    program = (
        "import multiprocessing, sys; from pathlib import Path; from phreg.data.decode import decode\n"
        "fork = multiprocessing.get_context('fork')\n"
        "for _ in range(3):\n"
        "    reader = fork.Process(target=decode, args=(Path(sys.argv[1]),))\n"
        "    reader.start(); reader.join()\n"
    )
    command = [sys.executable, "-c", program, os.fspath(tmp_path / "scan.png")]
    logged = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert logged.count("holds 16-bit values") == 1


@pytest.mark.parametrize(("dtype", "value"), [(np.float32, 0.5), (np.int32, 70000), (np.int32, -1)])
def test_values_of_unknown_range_are_refused(dtype, value):
    image = Image.fromarray(np.full((3, 3), value, dtype=dtype))
    with pytest.raises(DataError, match=r"its values, .* do not say what is white"):
        decode(encoded(image, "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    half = Image.new(mode, (2, 2), (0,) * (len(mode) - 1) + (128,))
    half.putpixel((0, 0), (0,) * (len(mode) - 1) + (0,))
    image = decode(encoded(half))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (127, 127, 127)  # 255 * (1 - 128 / 255)


def test_a_transparent_palette_entry_becomes_white_and_others_keep_their_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for data in (encoded(image, transparency=0), encoded(image, transparency=b"\0\xff")):
        assert pixels(decode(data)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode):
    grey = plain((128, 128, 128)).convert(mode)
    image = decode(encoded(grey, "TIFF"))
    assert image.mode == "RGB"
    assert (pixels(image) == pixels(grey.convert("RGB"))).all()


def test_cmyk_jpegs_keep_their_colours():
    red = plain((230, 20, 20), (16, 16)).convert("CMYK")
    assert np.abs(pixels(decode(encoded(red, "JPEG"))).astype(int) - (230, 20, 20)).max() <= 8  # JPEG loss


def test_an_animation_gives_its_first_frame():
    frames = [plain((255, 0, 0)), plain((0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


GREY_16 = Image.fromarray(np.full((100, 100), 40_000, dtype=np.uint16))
PROGRESSIVE = {"progressive": True}
DECODED_WHOLE = [
    # Image, format, options, and the bytes that its decoder holds for each pixel.
    (plain(size=(100, 100)), "PNG", {}, 4),
    (plain((10, 200, 30, 40), (100, 100), "RGBA"), "PNG", {}, 4),
    (plain(9, (100, 100), "L"), "PNG", {}, 1),
    (GREY_16, "PNG", {}, 2),
    (plain(1, (100, 100), "1"), "PNG", {}, 1),
    (plain(3, (100, 100), "P"), "GIF", {}, 1),
    (plain(size=(100, 100)), "BMP", {}, 4),
    (plain(size=(100, 100)), "PPM", {}, 4),
    (plain(size=(100, 100)), "TIFF", {}, 4),
    (plain(size=(100, 100)), "TIFF", {"compression": "tiff_lzw"}, 12),
    (GREY_16, "TIFF", {"compression": "tiff_deflate"}, 6),
    (plain(size=(100, 100)), "WEBP", {}, 16),
    (plain(size=(100, 100)), "AVIF", {}, 16),
    (plain(size=(100, 100)), "JPEG", PROGRESSIVE, 6),
    (plain(9, (100, 100), "L"), "JPEG", PROGRESSIVE, 2),
    (plain((9, 9, 9, 9), (100, 100), "CMYK"), "JPEG", PROGRESSIVE, 8),
]


@pytest.mark.parametrize(("image", "format", "options", "bytes_a_pixel"), DECODED_WHOLE)
def test_an_image_too_large_for_the_memory_is_refused_before_it_is_decoded(
    monkeypatch, image, format, options, bytes_a_pixel
):
    data = encoded(image, format, **options)
    # 24 bytes for each pixel of the limit are allowed; an eighth is 13x13 pixels, of 12 bytes.
    needed = (bytes_a_pixel * 100 * 100 + 12 * 13 * 13) / 24
    assert decode(data, max_megapixels=(needed + 0.1) / 1e6).size == (13, 13)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    message = (
        rf"^cannot read it: it has 0\.01 megapixels \(100x100\) as {format}, .* memory .*; make it smaller"
    )
    with pytest.raises(DataError, match=message):
        decode(data, "it", max_megapixels=(needed - 0.1) / 1e6)


def with_width_and_height(png, width, height):
    """Changes what a PNG's header says of its size, and makes its checksum right."""
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_a_small_file_of_a_huge_image_is_refused_by_its_header():
    with pytest.raises(
        DataError, match=r"3600 megapixels \(60000x60000\) .* than 2\.14 GB, .* 89 megapixels"
    ):
        decode(with_width_and_height(encoded(plain()), 60_000, 60_000))


PEAKS = """
import multiprocessing, sys
from pathlib import Path
from phreg.data.decode import decode

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

def peak(path, limit, answer):
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory("VmRSS")
    size = decode(Path(path), max_megapixels=limit).size
    answer.put(f"{(memory('VmHWM') - before) / limit / 1e6} {size[0]}")

fork = multiprocessing.get_context("fork")
answer = fork.Queue()
decode(Path(sys.argv[2]), max_megapixels=float(sys.argv[1]))  # what is loaded once is no image's memory
for path in sys.argv[2:]:
    reader = fork.Process(target=peak, args=(path, float(sys.argv[1]), answer))
    reader.start()
    print(answer.get())
    reader.join()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_reading_takes_24_bytes_a_pixel_of_the_limit_at_most(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    one_strip = {"compression": "tiff_lzw", "tiffinfo": {278: 10_000, 274: 6}}
    exact = {"lossless": True, "quality": 0, "method": 0, "exif": turned}
    # As large as may be: whole, at a half, of which 12 bytes are held for each pixel, and at an eighth.
    cases = [
        ("PNG", "RGB", {"exif": turned, "compress_level": 1}, 4),
        ("PNG", "L", {"exif": turned, "compress_level": 1}, 1),
        ("TIFF", "RGBA", one_strip, 12),
        ("WEBP", "RGBA", exact, 16),
        ("JPEG", "RGB", {"progressive": True, "subsampling": "4:4:4", "exif": turned}, 6),
    ]
    limit, paths, expected = 1e6, [], []
    for format, mode, options, bytes_a_pixel in cases:
        for factor in (1, 2, 8):
            most = limit if factor == 1 else 24 * limit / (bytes_a_pixel + 12 / factor**2)
            most = min(most, factor**2 * limit)
            side = int(most**0.5) // 8 * 8
            paths.append(tmp_path / f"{len(paths)}")
            colour = Image.new(mode, (side, side), (200, 90, 10, 50)[: len(mode)] if mode != "L" else 90)
            colour.save(paths[-1], format, **options)
            expected.append(side // factor)
    command = [sys.executable, "-c", PEAKS, str(limit / 1e6), *map(str, paths)]
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # memory is given back as soon as it is free
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=at_once).stdout
    peaks, sides = zip(*(map(float, line.split()) for line in told.splitlines()), strict=True)
    assert list(sides) == expected
    assert max(peaks) < 26, peaks  # 2 MB are for the decoder's tables, and a band that is converted
    assert max(peaks) > 20, peaks


@pytest.mark.parametrize("pils", [None, 1])
def test_pils_own_limit_of_pixels_is_not_heeded(monkeypatch, pils):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pils)
    assert decode(encoded(plain())).size == (6, 4)
    with pytest.raises(DataError, match="megapixels"):
        decode(encoded(plain()), max_megapixels=4e-6)


def smooth(width, height):
    """An image that hardly changes from one pixel to the next, but is another at each corner."""
    corners = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (200, 200, 10)]], dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize(
    ("format", "orientation"),
    [("JPEG", 1), ("JPEG", 6), ("MPO", 1), ("MPO", 6), ("JPEG2000", 1)],  # the last has no EXIF of PIL's
)
@pytest.mark.parametrize(
    ("pixels_allowed", "size"),
    [(160 * 120, (160, 120)), (160 * 120 - 1, (80, 60)), (80 * 60, (80, 60)), (80 * 60 - 1, (40, 30))],
)
def test_a_large_image_is_read_at_the_largest_size_that_fits(format, orientation, pixels_allowed, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(160, 120), format, **({} if format == "JPEG2000" else {"exif": exif}))
    whole, read = decode(data), decode(data, max_megapixels=pixels_allowed / 1e6)
    assert read.size == (size if orientation == 1 else size[::-1])
    # A shift by a pixel would change the mean by 2 at 80 pixels and 4 at 40; compression makes less than 1.
    # JPEG 2000 keeps every other sample, not the mean of two: up to half a pixel of the small image aside.
    expected = pixels(whole.resize(read.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels(read) - expected).mean() < (2.5 if format == "JPEG2000" else 1)


def test_sides_that_cannot_be_halved_are_rounded_up_and_still_fit():
    data = encoded(smooth(163, 121), "JPEG")
    assert decode(data, max_megapixels=82 * 61 / 1e6).size == (82, 61)
    assert decode(data, max_megapixels=(82 * 61 - 1) / 1e6).size == (41, 31)


def test_an_eighth_is_the_smallest_size():
    data = encoded(smooth(160, 80), "JPEG")
    assert decode(data, max_megapixels=200e-6).size == (20, 10)
    with pytest.raises(DataError, match=r"0\.0128 megapixels \(160x80\) as JPEG"):
        decode(data, max_megapixels=199e-6)


def box_means(values, factor):
    """Averages squares of `factor` pixels a side, cut off at the right and at the bottom."""
    rows, cols = (range(0, side, factor) for side in values.shape[:2])
    return np.array([[values[y : y + factor, x : x + factor].mean((0, 1)) for x in cols] for y in rows])


def with_alpha(image):
    return Image.merge("RGBA", (*image.split(), noise(image.size, seed=1).getchannel(0)))


CHEQUERED = noise((83, 61))
GREY = CHEQUERED.getchannel(0)
SIXTEEN_BITS = Image.fromarray(257 * pixels(GREY).astype(np.uint16))
TURNED = Image.Exif()
TURNED[0x0112] = 6
LARGE = [
    ("PNG", CHEQUERED, {"exif": TURNED}),
    ("PNG", with_alpha(CHEQUERED), {}),
    ("PNG", with_alpha(CHEQUERED).convert("LA"), {}),
    ("PNG", CHEQUERED.quantize(50), {"transparency": 7}),
    ("PNG", CHEQUERED, {"transparency": CHEQUERED.getpixel((5, 5))}),
    ("PNG", GREY, {}),
    ("PNG", GREY.convert("1"), {}),
    ("PNG", SIXTEEN_BITS, {}),
    ("GIF", CHEQUERED.quantize(50), {}),
    ("BMP", CHEQUERED, {}),
    ("PPM", CHEQUERED, {}),
    ("TIFF", CHEQUERED, {"tiffinfo": {274: 6}}),
    ("TIFF", CHEQUERED, {"compression": "tiff_lzw"}),
    ("TIFF", CHEQUERED.convert("CMYK"), {}),
    ("TIFF", SIXTEEN_BITS.convert("I;16B"), {}),
    ("WEBP", CHEQUERED, {"lossless": True}),
    ("WEBP", with_alpha(CHEQUERED), {"lossless": True, "exif": TURNED}),
    ("AVIF", CHEQUERED, {}),
]


@pytest.mark.parametrize(("format", "image", "options"), LARGE)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_each_pixel_of_a_reduced_image_is_the_mean_of_a_square(monkeypatch, format, image, options, factor):
    monkeypatch.setattr(decoder, "BYTES_PER_PIXEL", 10_000)  # so that the number of pixels decides
    data = encoded(image, format, **options)
    whole = pixels(decode(data))
    # What EXIF turns is reduced as it is stored, so that squares are cut off where the stored image ends.
    turned = 1 if options.get("exif") else 0
    expected = np.rot90(box_means(np.rot90(whole, turned), factor), -turned)
    fits = expected.shape[0] * expected.shape[1] / 1e6
    for band in (1, 1000, 10**6):  # pixels that are converted at a time
        monkeypatch.setattr(decoder, "BAND", band)
        read = pixels(decode(data, max_megapixels=fits))
        assert read.shape == expected.shape
        assert np.abs(read - expected).max() < 0.67  # PIL rounds means of few pixels by up to two thirds


@pytest.mark.parametrize(("format", "image", "options"), LARGE)
def test_a_truncated_large_image_is_an_error(format, image, options):
    data = encoded(image, format, **options)
    limit = 42 * 31 * 4 / 1e6
    with pytest.raises(DataError):
        decode(data[: len(data) // 2], max_megapixels=limit)


def test_the_range_of_16_bit_values_is_that_of_the_whole_image(monkeypatch, dim_told, caplog):
    monkeypatch.setattr(decoder, "BAND", 8)  # two rows
    values = np.arange(24).reshape(6, 4)
    bright_below = np.where(values < 16, values, 20_000).astype(np.uint16)
    decode(encoded(Image.fromarray(bright_below), "PNG"))
    assert not caplog.records
    too_bright_below = np.where(values < 16, values, 70_000).astype(np.int32)
    with pytest.raises(DataError, match="its values, 0 to 70000, do not say what is white"):
        decode(encoded(Image.fromarray(too_bright_below), "TIFF"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_with_a_mask_is_read_at_full_size_or_not_at_all(tmp_path, suffix):
    smooth(160, 80).save(tmp_path / f"a.{suffix}")
    files = Files((str(tmp_path / f"a.{suffix}"),), whole=True)
    assert files.read(0).size == (160, 80)
    with pytest.raises(DataError, match=r"0\.01 are read at most where a mask.*; make both smaller"):
        replace(files, max_megapixels=0.01).read(0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>404 Not Found</html>", r"no image of a known format.*b'<html>404"),
        (encoded(noise())[:200], "(?i)truncated|broken"),
        (encoded(noise(), "JPEG")[:-200], "image file is truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        decode(path)
    assert "holiday.jpg" in str(caught.value)


def test_an_image_without_pixels_is_refused():
    header = bytearray(encoded(plain(), "BMP"))
    header[18:22] = bytes(4)  # the width
    with pytest.raises(DataError, match="cannot read zero"):
        decode(bytes(header), "zero")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a regular file"):
        decode(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="No such file"):
        decode(tmp_path / "dangling.jpg")


def test_random_damage_ends_in_an_rgb_image_or_a_data_error():
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [
        encoded(noise(), "JPEG", exif=exif),
        encoded(noise(), "PNG"),
        encoded(noise(), "WEBP", exif=exif),
    ]
    whole += [encoded(noise().convert("P"), "GIF"), encoded(noise(), "BMP"), encoded(noise(), "PPM")]
    refused = 0
    for _ in range(600):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 4, 30])):
            data[rng.randrange(min(len(data), rng.choice([40, 400, 4000])))] = rng.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 100  # else the damage was too small to say anything


def test_decoding_changes_no_setting_of_pil():
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    decode(encoded(plain()))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
