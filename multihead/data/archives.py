"""Archives read in place: zip, and tar (also gzipped), member by member, each only as far as it is wanted.

A member's name is only a name here: one that climbs out (``../x``) or is absolute makes the archive refused, links and
devices are passed over, and what unpacks beyond all reason is refused before it is read.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from multihead.data.files import BOMB_BYTES, BOMB_RATIO, CHUNK, Source, read_chunks, read_head
from multihead.errors import UserError, tr

MAX_MEMBER = 64 << 20
"""Longest member that is read into memory."""
_PASSED = ("__MACOSX",)


class Member:
    """A plain file of an archive. Its bytes can be read as long as the next member has not been asked for.

    Every reading raises UserError where the archive is damaged or ends too early.
    """

    def __init__(self, name: str, size: int, opened: Callable[[], Any], told: _Told) -> None:
        self.name, self.size = name, size
        self._opened, self._told = opened, told
        self._file: Any = None
        self._head = b""

    def head(self, count: int) -> bytes:
        """Its first `count` bytes, or all where there are fewer."""
        with self._told:
            self._file = self._opened() if self._file is None else self._file
            while len(self._head) < count and (more := self._file.read(count - len(self._head))):
                self._head += more
        return self._head[:count]

    def chunks(self) -> Iterator[bytes]:
        """All its bytes, at most `CHUNK` at a time; once only."""
        self.head(1)
        chunk, count = self._head, 0
        while chunk:
            count += len(chunk)
            yield chunk
            with self._told:
                chunk = self._file.read(CHUNK)
        if count != self.size:
            with self._told:
                raise EOFError(self.name)

    def close(self) -> None:
        """Let go of what was opened to read it."""
        if self._file is not None:
            self._file.close()

    def content(self, most: int = MAX_MEMBER) -> bytes | None:
        """All its bytes; None where they are more than `most`."""
        return None if self.size > most else b"".join(self.chunks())


def is_archive(head: bytes) -> bool:
    """Whether a file's first 512 bytes (unpacked where it is gzip) are those of a zip or tar."""
    return head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar"


def members(source: Source) -> Iterator[Member]:
    """Every plain file of an archive, in its order.

    Hidden files and macOS's own are left out. Raises UserError: damaged, encrypted, names that climb out, a bomb.
    """
    zipped = read_head(source, 4)[0].startswith(b"PK")
    for member in _zip(source) if zipped else _tar(source):
        if not any(part.startswith(".") or part in _PASSED for part in member.name.split("/")):
            yield member


def _checked(name: str, source: Source) -> str:
    """`name` in one form. UserError where it points outside the archive."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith(("/", "\\")) or (parts and parts[0].endswith(":")) or "\0" in name:
        raise UserError(tr(f"the archive holds a file called {name!r}, which points outside it: nothing of it is read",
                           f"压缩包里有一个名为 {name!r} 的文件，指向压缩包之外：不读取其中任何内容"), source.name)
    return "/".join(parts)


class _Told:
    """What the libraries raise on an archive that is not whole becomes a person's error; entered for every reading."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError) or (isinstance(error, tarfile.ReadError) and "end of data" in str(error)):
            raise UserError(tr("this archive ends too early: it was not copied whole; fetch it again",
                               "这个压缩包不完整（提前结束）；请重新获取"), self._source.name) from None
        if isinstance(error, (zipfile.BadZipFile, zlib.error, tarfile.TarError, struct.error, RuntimeError, OSError,
                              ValueError)):
            raise UserError(tr(f"this archive is damaged ({error}); fetch it again",
                               f"这个压缩包已损坏（{error}）；请重新获取"), self._source.name) from None


def _trap(source: Source, kind: str) -> UserError:
    return UserError(tr(f"this {kind} archive unpacks to more than {BOMB_RATIO} times its size: it looks like a trap; "
                        "unpack it yourself if you trust it",
                        f"这个 {kind} 解压后超过原来的 {BOMB_RATIO} 倍，像是“压缩炸弹”；"
                        "如果信任它，请自行解压"), source.name)


def _zip(source: Source) -> Iterator[Member]:
    told = _Told(source)
    with told, zipfile.ZipFile(source.path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        total, size = sum(info.file_size for info in infos), source.path.stat().st_size
        if total > BOMB_BYTES and total > BOMB_RATIO * size:
            raise _trap(source, "zip")
        names = {id(info): _checked(info.filename, source) for info in infos}
        for info in infos:
            if (info.external_attr >> 16) & 0o170000 == 0o120000:  # a symbolic link
                continue
            if info.flag_bits & 1:
                raise UserError(tr("this zip archive is encrypted: unpack it yourself",
                                   "这个 zip 已加密：请自行解压"), source.name)
            member = Member(names[id(info)], info.file_size, partial(archive.open, info), told)
            yield member
            member.close()


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


def _tar(source: Source) -> Iterator[Member]:
    chunks, told = _Chunks(source), _Told(source)
    with told:
        file = io.BufferedReader(chunks, 1 << 18)
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                name = _checked(info.name, source)
                if not info.isreg():
                    continue
                if info.size > BOMB_BYTES and info.size > BOMB_RATIO * _stored(info):
                    raise _trap(source, "tar")
                yield Member(name, info.size, partial(archive.extractfile, info), told)
        while file.read(1 << 18):
            pass
        if chunks.last.strip(b"\0"):  # a whole archive ends with empty blocks
            raise EOFError("…")


def _stored(info: Any) -> int:
    """Bytes that a member has in the archive, where one with holes is written without them."""
    return sum(length for _, length in info.sparse) if info.issparse() else info.size
