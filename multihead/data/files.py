"""From what a person names (a file, a list, a glob, a folder) to files, and from a file to its bytes."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multihead.errors import Problem, UserError, nearest, tr

CHUNK = 1 << 18
# Text packs 3 to 20 times, deflate at most 1,032 times. Beyond this much output at this ratio it is a trap.
BOMB_BYTES = 64 << 20
BOMB_RATIO = 200

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_NOT_DATA = ("readme", "license", "licence", "thumbs.db", "desktop.ini")
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8",
     "zip 压缩包或 Excel 工作簿：请先解压，或把工作表另存为“CSV UTF-8”"),
    (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc): save it as CSV UTF-8",
     "旧版 Office 文件（.xls、.doc）：请另存为“CSV UTF-8”"),
    (b"%PDF-", "a PDF: extract its text first", "PDF 文件：请先提取文字"),
    (b"\x89PNG", "a PNG image", "PNG 图片"),
    (b"\xff\xd8\xff", "a JPEG image", "JPEG 图片"),
    (b"GIF8", "a GIF image", "GIF 图片"),
    (b"RIFF", "a WAV, AVI or WebP file", "WAV、AVI 或 WebP 文件"),
    (b"fLaC", "a FLAC recording", "FLAC 录音"),
    (b"ID3", "an MP3 recording", "MP3 录音"),
    (b"BZh", "packed with bzip2: unpack it with bunzip2", "bzip2 压缩文件：请先用 bunzip2 解压"),
    (b"\xfd7zXZ\x00", "packed with xz: unpack it with unxz", "xz 压缩文件：请先用 unxz 解压"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd: unpack it with unzstd", "zstd 压缩文件：请先用 unzstd 解压"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it", "7z 压缩包：请先解压"),
    (b"Rar!", "a RAR archive: unpack it", "RAR 压缩包：请先解压"),
    (b"\x1f\x8b", "packed with gzip twice: unpack it once", "被 gzip 压缩了两次：请先解压一次"),
    (b"SQLite format 3\x00", "an SQLite database: export the table as CSV", "SQLite 数据库：请把表导出为 CSV"),
    (b"\x7fELF", "a program", "可执行程序"),
    (b"\x93NUMPY", "a NumPy array", "NumPy 数组"),
    (b"\x80\x04\x95", "a Python pickle: these are never opened, because opening one can run any code",
     "Python pickle 文件：打开它可能执行任意代码，因此从不读取"),
    (b"PAR1", "a packed Parquet file: unpack it", "压缩过的 Parquet 文件：请先解压"),
)


@dataclass(frozen=True)
class Source:
    """One file of data: its path, how messages call it, and the folder name that labels it, if any.

    `content`: of a file that lies in an archive, its bytes; `path` is then the archive's. `inside`: the folder of an
    archive that alone is meant."""

    path: Path
    name: str
    label: str | None = None
    content: bytes | None = None
    inside: str = ""


def os_error(name: str, error: OSError) -> UserError:
    """What the operating system said about a file, as a person's error."""
    reason = error.strerror or type(error).__name__
    return UserError(tr(f"this file cannot be read: {reason}", f"无法读取这个文件：{reason}"), where=name)


def find_sources(paths: Paths, base: Path, archives: bool = False) -> tuple[list[Source], list[str]]:
    """(the files that `paths` means, in order and once each; names of files in folders that were passed over).

    Relative paths start from `base`; messages call a file as the person did. A folder means every file in it and below
    it, sorted by name, but for hidden ones and READMEs and licences. With `archives`, ``photos.zip/train`` means what
    lies in that folder of the archive. Raises UserError: nothing there.
    """
    items = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not items:
        raise UserError(tr("no data file is named; give a file, a list of files, a glob or a folder",
                           "没有指定数据文件；请给出文件、文件列表、通配符或文件夹"))
    problems: list[Problem] = []
    sources: dict[str, Source] = {}
    skipped: list[str] = []
    for item in items:
        try:
            found, passed = _expand(os.fspath(item), base, archives)
        except UserError as error:
            problems += error.problems
            continue
        except OSError as error:
            problems += os_error(os.fspath(item), error).problems
            continue
        for source in found:
            sources.setdefault(os.path.join(os.path.abspath(source.path), source.inside), source)
        skipped += passed
    if problems:
        raise UserError.many(problems)
    return list(sources.values()), skipped


def _expand(item: str, base: Path, archives: bool) -> tuple[list[Source], list[str]]:
    if not item.strip() or "\0" in item:
        raise UserError(tr(f"{item!r} is not the name of a file", f"{item!r} 不是文件名"))
    path = base / os.path.expanduser(item)
    if path.is_dir():
        return _folder(path, item)
    if path.is_file():
        return [Source(path, item)], []
    if path.exists():
        raise UserError(tr("this is neither a file nor a folder", "这既不是文件也不是文件夹"), where=item)
    if any(c in item for c in "*?["):
        return _glob(path, item)
    archive = next((above for above in path.parents if above.is_file()), None) if archives else None
    if archive is not None:
        inside = path.relative_to(archive)
        shown = Path(*Path(item).parts[: -len(inside.parts)])
        return [Source(archive, f"{shown}/{inside.as_posix()}", inside=inside.as_posix())], []
    hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(tr(f"there is no such file or folder{hint}; relative paths start from {base}",
                       f"没有这个文件或文件夹{hint}；相对路径从 {base} 开始"), where=item)


def _glob(path: Path, item: str) -> tuple[list[Source], list[str]]:
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = Path(*parts[:first])
    try:
        found = [p for p in root.glob(str(Path(*parts[first:]))) if p.is_file()]
    except ValueError as error:
        raise UserError(tr(f"this pattern cannot be used: {error}", f"这个通配符无法使用：{error}"),
                        where=item) from None
    names = sorted(p for p in found if not p.name.startswith("."))
    if not names:
        raise UserError(tr("no file matches this pattern", "没有文件与这个通配符匹配"), where=item)
    shown = Path(*Path(item).parts[: len(Path(item).parts) - (len(parts) - first)])
    return [Source(p, str(shown / p.relative_to(root))) for p in names], []


def _folder(path: Path, item: str) -> tuple[list[Source], list[str]]:
    found: list[Source] = []
    skipped: list[str] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        inside = Path(folder).relative_to(path)
        for name in sorted(names):
            shown = str(Path(item) / inside / name)
            if name.startswith(".") or name.lower().startswith(_NOT_DATA) or not (Path(folder) / name).is_file():
                skipped.append(shown)
            else:
                label = inside.parts[0] if inside.parts else None
                found.append(Source(Path(folder) / name, shown, label))
    if not found:
        raise UserError(tr("there is no data file in this folder", "这个文件夹里没有数据文件"), where=item)
    return found, skipped


def is_gzip(path: Path) -> bool:
    """Whether the file starts with gzip's two bytes."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_chunks(source: Source, size: int = CHUNK) -> Iterator[bytes]:
    """The file's bytes, unpacked where it is gzip, at most `size` at a time.

    Raises UserError: unreadable, truncated or damaged gzip, and gzip that unpacks beyond all reason.
    """
    try:
        with open(source.path, "rb") if source.content is None else io.BytesIO(source.content) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                while chunk := file.read(size):
                    yield chunk
                return
            total = 0
            with gzip.GzipFile(fileobj=file) as unpacked:
                while chunk := unpacked.read(size):
                    total += len(chunk)
                    if total > BOMB_BYTES and total > BOMB_RATIO * file.tell():
                        raise UserError(tr(
                            f"this gzip file unpacks to more than {BOMB_RATIO} times its size: it looks like a trap; "
                            f"unpack it yourself if you trust it",
                            f"这个 gzip 文件解压后超过原来的 {BOMB_RATIO} 倍，像是“压缩炸弹”；如果信任它，请自行解压"),
                            where=source.name)
                    yield chunk
    except EOFError:
        raise UserError(tr("this gzip file ends too early: it was not copied whole; fetch it again",
                           "这个 gzip 文件不完整（提前结束）；请重新获取"), where=source.name) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(tr(f"this gzip file is damaged ({error}); fetch it again",
                           f"这个 gzip 文件已损坏（{error}）；请重新获取"), where=source.name) from None
    except OSError as error:
        raise os_error(source.name, error) from None


def read_head(source: Source, size: int) -> tuple[bytes, bool]:
    """(the first `size` bytes at most, whether that is the whole file)."""
    head = bytearray()
    for chunk in read_chunks(source, min(size + 1, CHUNK)):
        head += chunk
        if len(head) > size:
            return bytes(head[:size]), False
    return bytes(head), True


def refuse_binary(head: bytes, name: str) -> None:
    """Raise UserError where the first bytes are those of a known kind of file that is not text."""
    for magic, en, zh in _MAGIC:
        if head.startswith(magic):
            raise UserError(tr(f"this is not a text file but {en}", f"这不是文本文件，而是{zh}"), where=name)
    if head[257:262] == b"ustar":
        raise UserError(tr("this is a tar archive: unpack it and name its files or its folder",
                           "这是 tar 压缩包：请先解压，再指定里面的文件或文件夹"), where=name)
