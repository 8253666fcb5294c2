"""Pictures and clips made to do harm, in small forms: each one message, and none is taken for what it is not."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from multihead.codec.image import decoded
from multihead.data import images
from multihead.data.columns import Column
from multihead.data.rows import open_rows
from multihead.errors import UserError
from tests import clips

GREY = b"P5 4 4 255\n" + bytes(16)
COLUMNS = (Column("image", "image"), Column("label", "label", target=True))


def zipped(*names: str) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, GREY)
        return file.getvalue()


def test_a_picture_that_is_also_an_archive_is_refused() -> None:
    for comment in (b"", b"behind the end"):
        archive = zipped("a/1.pgm")
        both = GREY + archive[:-2] + len(comment).to_bytes(2, "little") + comment
        assert zipfile.is_zipfile(io.BytesIO(both))
        assert "zip archive at once" in images.to_uri(both)[1]
    assert not images.to_uri(GREY + b"PK\x05\x06 by chance" + bytes(30))[1]


def test_a_film_is_no_picture() -> None:
    pytest.importorskip("PIL")
    assert decoded(images.from_uri(images.to_uri(clips.many_frames(images.MAX_FRAMES))[0])).size == (1, 1)
    film = clips.many_frames(images.MAX_FRAMES + 1)
    assert "10,001 frames" in images.to_uri(film)[1]
    with pytest.raises(UserError, match="10,001 frames"):
        images.from_uri(images.to_uri(clips.many_frames(1))[0].partition(",")[0] + "," + base64(film))


def base64(raw: bytes) -> str:
    from base64 import b64encode

    return b64encode(raw).decode()


@pytest.mark.parametrize("raw", [b"GIF89a=1;alert(1)//", b"<svg onload='alert(1)'/>", b"<!DOCTYPE html><script>", b"",
                                 b"\x89PNG\r\n\x1a\n<script>", b"\xff\xd8\xff<?php echo 1 ?>"])  # fmt: skip
def test_what_only_begins_like_a_picture_is_refused(raw: bytes) -> None:
    pytest.importorskip("PIL")
    uri, fault = images.to_uri(raw)
    if not fault:
        with pytest.raises(UserError) as told:
            decoded(images.from_uri(uri))
        assert len(told.value.problems) == 1


def test_archives_that_climb_out_swell_or_hold_links(tmp_path: Path) -> None:
    (tmp_path / "climbs.zip").write_bytes(zipped("a/1.pgm", "../../b/2.pgm"))
    with zipfile.ZipFile(tmp_path / "swells.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.pgm", bytes(80 << 20))
    with tarfile.open(tmp_path / "links.tar", "w") as links:
        for i, target in enumerate(("/etc/passwd", "../../2.pgm")):
            info = tarfile.TarInfo(f"a/{i}.pgm")
            info.type, info.linkname = tarfile.SYMTYPE, target
            links.addfile(info)
    for name, word in (("climbs.zip", "outside"), ("swells.zip", "trap"), ("links.tar", "no picture")):
        with pytest.raises(UserError, match=word) as told:
            list(open_rows(name, COLUMNS, base=tmp_path))
        assert len(told.value.problems) == 1, name
