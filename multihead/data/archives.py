"""Archives read in place: zip, and tar (also gzipped), member by member; nothing is ever unpacked onto the disk.

A member's name is only a name here: one that climbs out (``../x``) or is absolute makes the archive refused, links and
devices are passed over, and what unpacks beyond all reason is refused before it is read.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from multihead.data.files import BOMB_BYTES, BOMB_RATIO, Source, read_chunks, read_head
from multihead.errors import UserError, tr

MAX_MEMBER = 64 << 20
"""Longest member that is read."""
_PASSED = ("__MACOSX",)


def is_archive(head: bytes) -> bool:
    """Whether a file's first 512 bytes (unpacked where it is gzip) are those of a zip or tar."""
    return head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar"


def members(source: Source, most: int = MAX_MEMBER) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of every plain file of an archive, in its order; None for one of more than `most` bytes.

    Hidden files and macOS's own are left out. Raises UserError: damaged, encrypted, names that climb out, a bomb.
    """
    zipped = read_head(source, 4)[0].startswith(b"PK")
    for name, content in _zip(source, most) if zipped else _tar(source, most):
        parts = PurePosixPath(name).parts
        if not any(part.startswith(".") or part in _PASSED for part in parts):
            yield name, content


def _checked(name: str, source: Source) -> str:
    """`name` in one form. UserError where it points outside the archive."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith(("/", "\\")) or (parts and parts[0].endswith(":")) or "\0" in name:
        raise UserError(tr(f"the archive holds a file called {name!r}, which points outside it: nothing of it is read",
                           f"压缩包里有一个名为 {name!r} 的文件，指向压缩包之外：不读取其中任何内容"), source.name)
    return "/".join(parts)


def _damaged(source: Source, error: object) -> UserError:
    return UserError(tr(f"this archive is damaged ({error}); fetch it again",
                        f"这个压缩包已损坏（{error}）；请重新获取"), source.name)


def _zip(source: Source, most: int) -> Iterator[tuple[str, bytes | None]]:
    try:
        with zipfile.ZipFile(source.path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            total, size = sum(info.file_size for info in infos), source.path.stat().st_size
            if total > BOMB_BYTES and total > BOMB_RATIO * size:
                raise UserError(tr(f"this zip archive unpacks to more than {BOMB_RATIO} times its size: it looks "
                                   "like a trap; unpack it yourself if you trust it",
                                   f"这个 zip 解压后超过原来的 {BOMB_RATIO} 倍，像是“压缩炸弹”；"
                                   "如果信任它，请自行解压"), source.name)
            names = {id(info): _checked(info.filename, source) for info in infos}
            for info in infos:
                if (info.external_attr >> 16) & 0o170000 == 0o120000:  # a symbolic link
                    continue
                if info.flag_bits & 1:
                    raise UserError(tr("this zip archive is encrypted: unpack it yourself",
                                       "这个 zip 已加密：请自行解压"), source.name)
                if info.file_size > most:
                    yield names[id(info)], None
                    continue
                with archive.open(info) as file:
                    content = file.read(info.file_size + 1)
                yield names[id(info)], content
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise _damaged(source, error) from None


class _Chunks(io.RawIOBase):
    """The bytes of a source as a file that is read once, forwards."""

    def __init__(self, source: Source) -> None:
        self._chunks, self._held, self.last = read_chunks(source), b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            try:
                self._held = next(self._chunks)
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._held))
        self.last = (self.last + self._held[max(0, count - 512) : count])[-512:]
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _tar(source: Source, most: int) -> Iterator[tuple[str, bytes | None]]:
    chunks = _Chunks(source)
    try:
        file = io.BufferedReader(chunks, 1 << 18)
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                name = _checked(info.name, source)
                if not info.isreg():
                    continue
                member = archive.extractfile(info)
                content = None if info.size > most or member is None else member.read()
                if content is not None and len(content) != info.size:
                    raise EOFError(name)
                yield name, content
        while file.read(1 << 18):
            pass
        if chunks.last.strip(b"\0"):  # a whole archive ends with empty blocks
            raise EOFError("…")
    except EOFError:
        raise UserError(tr("this archive ends too early: it was not copied whole; fetch it again",
                           "这个压缩包不完整（提前结束）；请重新获取"), source.name) from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise _damaged(source, error) from None
