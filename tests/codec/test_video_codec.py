"""Clips → frames: which frame is in force when, in every form; what cannot be decoded is refused with one message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multihead.codec import video as codec
from multihead.codec.image import ImageCodec
from multihead.codec.video import ClipCodec, sampled, small_clip, strip
from multihead.data.video import MAX_FRAMES, ClipFile, read_clip, to_uri
from multihead.errors import UserError
from tests import clips

pytest.importorskip("av")
pytest.importorskip("PIL.Image")


def uri(raw: bytes) -> str:
    made, fault = to_uri(raw)
    assert not fault, fault
    return made


def greys(raw: bytes, count: int) -> list[int]:
    """The mean value of each sampled frame."""
    return [round(float(np.asarray(image).mean())) for image in sampled(uri(raw), count)]


@pytest.mark.parametrize("form", ["mp4", "webm", "avi", "gif"])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_frames_are_those_at_the_middles_of_equal_parts(form: str, count: int) -> None:
    raw = clips.clip(clips.ramp(10), form)
    middles = [int((i + 0.5) * 10 / count) for i in range(count)]
    assert np.abs(np.subtract(greys(raw, count), [255 * m / 9 for m in middles])).max() <= 4


def test_frames_are_chosen_by_time_where_the_rate_varies() -> None:
    """Five frames, the fourth of which stays for most of the time."""
    shown = [0, 64, 128, 191, 255]
    for form in ("mp4", "webm"):
        raw = clips.clip(clips.ramp(5), form, times=[0, 100, 200, 300, 1900])
        for count in (4, 10, 21):
            found = greys(raw, count)
            length = 2000 if form == "webm" else 1900
            assert sum(abs(v - shown[3]) <= 4 for v in found) >= 0.75 * count, length
            assert all(min(abs(v - s) for s in shown) <= 4 for v in found) and found == sorted(found)


def test_what_is_skipped_is_not_missed() -> None:
    """Long clips are decoded from key frames on: the same frames as when all of it is."""
    raw = clips.clip(clips.ramp(60), options={"g": "7", "bf": "3"})
    found = greys(raw, 5)
    assert np.abs(np.subtract(found, [255 * int((i + 0.5) * 12) / 59 for i in range(5)])).max() <= 4
    assert greys(raw, 60) == sorted(greys(raw, 60))


def test_odd_sizes_sound_turned_and_grey() -> None:
    assert sampled(uri(clips.clip(clips.ramp(3, 17, 33), "webm")), 1)[0].size == (33, 17)
    assert sampled(uri(clips.clip(clips.ramp(3, 17, 33), pixels="yuv444p")), 1)[0].size == (33, 17)
    assert greys(clips.clip(clips.ramp(3), sound=True), 3) == greys(clips.clip(clips.ramp(3)), 3)
    half = np.zeros((32, 64, 3), np.uint8)
    half[:16] = 255  # the upper half is white
    plain = np.asarray(sampled(uri(clips.clip([half] * 3)), 1)[0])
    turned = np.asarray(sampled(uri(clips.clip([half] * 3, turned=90)), 1)[0])
    assert plain.shape == (32, 64) and turned.shape == (64, 32)
    assert np.abs(np.rot90(plain).astype(int) - turned).max() < 8  # counter-clockwise, as the matrix is defined
    red = np.zeros((32, 64, 3), np.uint8)
    red[..., 0] = 255
    assert sampled(uri(clips.clip([red] * 2)), 1)[0].mode == "RGB"
    assert sampled(uri(clips.clip([red] * 2)), 1, side=8)[0].size == (32, 16)  # reduced while it is converted


@pytest.mark.parametrize("form", ["mp4", "webm", "avi", "gif"])
def test_what_is_cut_short_is_refused(form: str) -> None:
    container = {"movflags": "faststart"} if form == "mp4" else None
    raw = clips.clip(clips.ramp(20), form, container=container)
    for share in (0.1, 0.4, 0.7, 0.9):
        with pytest.raises(UserError) as told:
            sampled(uri(raw[: int(len(raw) * share)]), 4)
        assert len(told.value.problems) == 1 and "\n" not in str(told.value)


REFUSED = {
    "sound alone": (clips.sound_alone, "sound"),
    "sound alone, WebM": (lambda: clips.sound_alone("webm"), "sound"),
    "no frame": (clips.no_frames, "no picture"),
    "too long": (lambda: clips.clip(clips.ramp(3), times=[0, 100, 10**6]), "seconds"),
    "too many frames": (lambda: clips.many_frames(MAX_FRAMES + 1), "36,001 frames"),
    "a wide screen": (lambda: clips.wide_screen(65535, 65535), "pixels"),
    "two billion samples": (lambda: clips.many_samples(False), "2,000,000,000"),
    "two billion samples in a fragment": (lambda: clips.many_samples(True), "2,000,000,000"),
    "an MP4 by its beginning alone": (lambda: b"\0\0\0\x18ftypisom" + bytes(3000), "decoded"),
    "a WebM by its beginning alone": (lambda: b"\x1a\x45\xdf\xa3" + b"\x80" * 3000, "decoded"),
    "an AVI by its beginning alone": (lambda: b"RIFF\xff\xff\xff\x7fAVI " + b"LIST" * 300, "decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_with_one_message(name: str) -> None:
    make, word = REFUSED[name]
    with pytest.raises(UserError, match=word) as told:
        sampled(uri(make()), 4)
    assert len(told.value.problems) == 1


def test_too_much_to_decode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = uri(clips.clip(clips.ramp(40)))
    monkeypatch.setattr(codec, "MAX_WORK", 64 * 48 * 30)
    with pytest.raises(UserError, match="would have to be decoded"):
        sampled(raw, 4)
    sampled(uri(clips.clip(clips.ramp(40), options={"g": "4"})), 4)  # key frames: little of it has to be
    monkeypatch.setattr(codec, "MAX_PIXELS", 1000)
    monkeypatch.setattr(codec, "_OPTIONS", {**codec._OPTIONS, "max_pixels": "1000"})
    with pytest.raises(UserError, match="pixels"):
        sampled(raw, 4)


def test_any_bytes_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    for form in ("mp4", "webm", "avi", "gif"):
        raw = clips.clip(clips.ramp(6, 16, 16), form)
        for _ in range(25):
            bad = bytearray(raw)
            for at in rng.integers(12, len(bad), size=int(rng.integers(1, 30))):
                bad[at] = int(rng.integers(256))
            try:
                assert len(sampled(uri(bytes(bad)), 3)) == 3
            except UserError as error:
                assert len(error.problems) == 1


def test_a_folder_of_frames_is_a_clip(tmp_path: Path) -> None:
    from PIL import Image

    for i, frame in enumerate(clips.ramp(12, 8, 8)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    clip, fault = read_clip(tmp_path)
    assert not fault and isinstance(clip, ClipFile) and [p.stem for p in clip.paths] == [str(i) for i in range(12)]
    found = [int(np.asarray(image).mean()) for image in sampled(clip, 4)]
    assert found == [round(255 * i / 11) for i in (1, 4, 7, 10)]
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:40])
    with pytest.raises(UserError, match="decoded"):
        sampled(read_clip(tmp_path)[0], 4)


def test_a_codec_comes_back_and_gives_frames_of_one_form(tmp_path: Path) -> None:
    made = [uri(clips.clip(clips.ramp(6, 20, 30))), uri(b"\0\0\0\x18ftypisom" + bytes(3000))]
    fitted = ClipCodec.fit(made, 5, multiple=4)
    assert (fitted.image.size, fitted.image.channels) == (20, 1)
    fitted.save(tmp_path)
    again = ClipCodec.load(tmp_path)
    found = again.encode(made[0])
    assert found.shape == (5, 1, 20, 20) and found.dtype == np.uint8 and np.array_equal(found, fitted.encode(made[0]))
    with pytest.raises(UserError, match="no picture"):
        ClipCodec.fit(made[1:], 5)
    assert again.frames == 5 and isinstance(again.image, ImageCodec)


def test_small_copies_are_clips_and_strips_are_pictures() -> None:
    raw = uri(clips.clip(clips.ramp(10, 200, 300)))
    small = small_clip(raw, 5, 64)
    assert small.startswith("data:image/gif") and len(small) < len(raw) + 4000
    found = [round(float(np.asarray(image).mean())) for image in sampled(small, 5)]
    assert np.abs(np.subtract(found, [255 * i / 9 for i in (1, 3, 5, 7, 9)])).max() <= 4
    assert strip(raw, 4).startswith("data:image/png") and not strip("data:video/mp4;base64,AAAA", 4)
