"""Pictures to arrays: every form of file, upright and of one size; and files made to break a decoder."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multihead.codec.image import MAX_PIXELS, ImageCodec, thumbnail
from multihead.data.images import from_uri, to_uri
from multihead.errors import UserError

Image = pytest.importorskip("PIL.Image")


def file_of(image: Any, form: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, form, **options)
        return file.getvalue()


def uri(raw: bytes) -> str:
    found, fault = to_uri(raw)
    assert not fault
    return found


def codec(size: int = 4, channels: int = 3, fit: Any = "stretch", white: int = 65535) -> ImageCodec:
    return ImageCodec(size, channels, fit, white, [0.0] * channels, [1.0] * channels)


def quarters(mode: str = "RGB") -> Any:
    """4 × 4: red, green / blue, white."""
    array = np.zeros((4, 4, 3), np.uint8)
    array[:2, :2, 0], array[:2, 2:, 1], array[2:, :2, 2], array[2:, 2:] = 255, 255, 255, 255
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_forms_without_loss_give_the_pixels_they_hold(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    found = codec().encode(uri(file_of(quarters(), form, **options)))
    assert np.array_equal(found, np.asarray(quarters()).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "L", "1", "LA"])
def test_every_mode_becomes_what_the_model_reads(mode: str) -> None:
    raw = file_of(quarters(mode), "TIFF" if mode == "CMYK" else "PNG")
    assert codec().encode(uri(raw)).shape == (3, 4, 4)
    grey = codec(channels=1).encode(uri(raw))
    assert grey.shape == (1, 4, 4) and grey.dtype == np.uint8
    expected = 0.299 * 255 if mode != "1" else grey[0, 0, 0]
    assert abs(int(grey[0, 0, 0]) - expected) <= 2 and grey[0, 3, 3] == 255


def test_what_is_transparent_shows_white() -> None:
    array = np.zeros((2, 2, 4), np.uint8)
    array[0, 0] = (200, 100, 50, 255)
    array[0, 1] = (0, 0, 0, 128)
    found = codec(2).encode(uri(file_of(Image.fromarray(array), "PNG")))
    assert found[:, 0, 0].tolist() == [200, 100, 50]
    assert found[:, 1, 1].tolist() == [255, 255, 255]
    assert abs(int(found[0, 0, 1]) - 127) <= 1
    palette = quarters("P")
    shown = codec().encode(uri(file_of(palette, "PNG", transparency=palette.getpixel((0, 0)))))
    assert shown[:, 0, 0].tolist() == [255, 255, 255] and shown[:, 2, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation: int) -> None:
    """The orientation says where the stored first row and column belong (Exif 2.32, tag 274)."""
    array = np.arange(64 * 32, dtype=np.uint8).reshape(32, 64) // 4 * 4
    stored = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.T, 6: np.rot90(array),
              7: array[::-1, ::-1].T, 8: np.rot90(array, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = file_of(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    found = ImageCodec(32, 1, "crop", 255, [0.0], [1.0]).encode(uri(raw))
    assert np.array_equal(found[0], array[:, 16:48])


def test_sixteen_bits_keep_their_whole_range() -> None:
    full = Image.fromarray(np.array([[0, 65535], [32768, 16384]], dtype=np.uint16))
    found = codec(2, 1).encode(uri(file_of(full, "PNG")))
    assert found[0].tolist() == [[0, 255], [128, 64]]
    twelve = [uri(file_of(Image.fromarray(np.array([[0, 4095], [2048, 9]], dtype=np.uint16)), "TIFF"))] * 2
    fitted = ImageCodec.fit(twelve)  # a camera's 12 bits stored in 16 are not almost black
    assert fitted.white == 4095 and fitted.encode(twelve[0])[0].tolist() == [[0, 255], [128, 1]]


def test_crop_pad_and_stretch() -> None:
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    given = uri(file_of(Image.fromarray(wide), "PNG"))
    assert (codec(8, 1, "crop").encode(given) == 200).all()
    padded = codec(8, 1, "pad").encode(given)[0]
    assert (padded[:2] == 255).all() and (padded[6:] == 255).all() and padded[4, 0] < 20 and padded[4, 4] > 180
    stretched = codec(8, 1, "stretch").encode(given)[0]
    assert stretched[4, 0] < 20 and stretched[4, 4] > 180 and stretched[0, 4] > 180


def test_made_smaller_without_aliasing() -> None:
    """A checkerboard of single pixels is grey from afar."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = codec(8, 1).encode(uri(file_of(Image.fromarray(board), "PNG")))
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_fit_learns_size_channels_mean_and_deviation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(256, size=(20, 20), dtype=np.uint8) for _ in range(9)]
    grey = [uri(file_of(Image.fromarray(a), "PNG")) for a in arrays]
    fitted = ImageCodec.fit([*grey, "data:image/png;base64,iVBORw0KGgo="], multiple=4)
    assert (fitted.size, fitted.channels) == (20, 1)
    values = np.stack(arrays) / 255
    assert fitted.mean == pytest.approx([values.mean()], abs=1e-6)
    assert fitted.std == pytest.approx([values.std()], abs=1e-6)
    coloured = ImageCodec.fit([*grey, uri(file_of(quarters(), "PNG"))], multiple=8)
    assert (coloured.size, coloured.channels) == (16, 3)
    fitted.save(tmp_path)
    again = ImageCodec.load(tmp_path)
    assert vars(again) == vars(fitted)
    assert np.array_equal(again.encode(grey[0])[0], arrays[0])


def test_a_codec_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}", '{"size": 8, "channels": 2, "fit": "crop", "white": 255, "mean": [0, 0], "std": [1, 1]}'):
        (tmp_path / "image.json").write_text(text)
        with pytest.raises(UserError, match=r"prepare the run again|请重新准备"):
            ImageCodec.load(tmp_path)


# -- hostile files -----------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_before_one_is_decoded() -> None:
    side = 50_000
    assert side * side > MAX_PIXELS
    bomb = uri(png(side, side, bytes(6251 * 1000)))
    tracemalloc.start()
    with pytest.raises(UserError, match="50,000 × 50,000"):
        codec().encode(bomb)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_truncated_picture_is_one_message(form: str) -> None:
    rng = np.random.default_rng(0)
    raw = file_of(Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)), form)
    for cut in (40, len(raw) // 2, len(raw) - 30):
        try:
            codec().encode(uri(raw[:cut]))
        except UserError as error:
            assert len(error.problems) == 1 and "Traceback" not in str(error)
        else:
            assert form in ("GIF", "TIFF", "WEBP") and cut > 1000, f"{form} of {cut} bytes was taken for whole"


def test_bytes_made_to_break_a_decoder_never_do_more_than_raise_one_message() -> None:
    rng = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        raw = bytearray(file_of(quarters().resize((16, 16)), form))
        for _ in range(60):
            broken = bytearray(raw)
            for at in rng.integers(12, len(raw), size=4):
                broken[at] = rng.integers(256)
            found, fault = to_uri(bytes(broken))
            if not fault:
                try:
                    assert codec().encode(found).shape == (3, 4, 4)
                except UserError as error:
                    assert len(error.problems) == 1


def test_only_the_first_frame_of_many_is_decoded() -> None:
    frames = [Image.new("L", (8, 8), 10 * i) for i in range(20)]
    raw = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert codec(8, 1).encode(uri(raw)).max() <= 1


@pytest.mark.parametrize(("raw", "said"), [
    (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    (b"\x00\x00\x00\x18ftypheic\x00\x00", "HEIC"),
    (b"%PDF-1.7", "PDF"),
    (b"", "0"),
    (b"hello", "JPEG, PNG"),
])  # fmt: skip
def test_what_is_no_picture_is_called_by_its_name(raw: bytes, said: str) -> None:
    found, fault = to_uri(raw)
    assert not found and said in fault


def test_data_uris_are_checked() -> None:
    good = uri(file_of(quarters(), "PNG"))
    assert from_uri(good).startswith(b"\x89PNG")
    for bad in ("data:image/png;base64,%%%", "data:image/png,abc", "cat.jpg", "data:image/png;base64,aGVsbG8=",
                good[:-5] + "*", "data:text/html;base64,PGI+"):  # fmt: skip
        with pytest.raises(UserError):
            from_uri(bad)


def test_thumbnails_are_small_png_and_empty_for_what_is_broken() -> None:
    large = uri(file_of(quarters().resize((900, 300)), "JPEG"))
    small = Image.open(io.BytesIO(from_uri(thumbnail(large, 60))))
    assert small.format == "PNG" and small.size == (60, 20)
    assert thumbnail("data:image/png;base64,iVBORw0KGgo=") == ""
