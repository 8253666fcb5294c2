"""Pictures as the values of rows: what is one, how it is written down, and sets of pictures that are rows themselves.

In a row a picture is a data URI (RFC 2397), ``data:image/jpeg;base64,…``, its file's bytes as they are: the same in a
table, in a request and in a stored row, equal where the files are equal. Nothing is decoded here (`codec.image` does).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from multihead.data.files import Source, os_error, read_chunks, read_head
from multihead.errors import UserError, tr

MAX_BYTES = 64 << 20
"""Largest file of one picture."""
MAX_FRAMES = 10_000
"""Most frames of a GIF whose first is taken for a picture."""
HEAD = 64
PARTS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
         "test": "test", "testing": "test", "eval": "test"}
"""What folders of parts are called, and a recipe's word for each."""

_PREFIX = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,\"]*)*);base64,", re.IGNORECASE)
_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "image/bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), "image/tiff"),
    (re.compile(rb"P[1-6]\s+(#|\d)"), "image/x-portable-anymap"),
)
_OTHERS = (
    (re.compile(rb"\s*(<\?xml|<!--|<!DOCTYPE svg|<svg)", re.IGNORECASE), "an SVG or other XML file", "SVG 等 XML 文件"),
    (re.compile(rb"\s*<(!DOCTYPE )?html", re.IGNORECASE), "a web page", "网页"),
    (re.compile(rb"....ftyp(heic|heix|mif1|msf1|hevc)", re.DOTALL), "a HEIC photo", "HEIC 照片"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF picture", "AVIF 图片"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video", "视频"),
    (re.compile(rb"%PDF-"), "a PDF", "PDF"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "zip 压缩包"),
    (re.compile(rb"8BPS"), "a Photoshop file", "Photoshop 文件"),
)


def kind_of(head: bytes) -> str:
    """The media type of a picture by its first bytes; "" where it is none that can be read."""
    return next((kind for pattern, kind in _MAGIC if pattern.match(head)), "")


def no_picture(head: bytes) -> str:
    """Why these first bytes are not those of a picture, for a person."""
    kinds = tr("a picture is a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM file",
               "图片须是 JPEG、PNG、WebP、GIF、BMP、TIFF 或 PNM 文件")
    if not head:
        return tr("the picture is empty (0 bytes)", "图片是空的（0 字节）")
    for pattern, en, zh in _OTHERS:
        if pattern.match(head):
            return tr(f"this is {en}; {kinds}: save it as one", f"这是{zh}；{kinds}：请另存")
    return tr(f"this is no picture; {kinds}", f"这不是图片；{kinds}")


def to_uri(raw: bytes) -> tuple[str, str]:
    """(the data URI of a picture's file, "") or ("", why it is none)."""
    kind = kind_of(raw[:HEAD])
    if not kind:
        return "", no_picture(raw[:HEAD])
    if len(raw) > MAX_BYTES:
        return "", too_large(len(raw))
    if fault := doubtful(raw):
        return "", fault
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}", ""


def too_large(size: int) -> str:
    """The message for a picture whose file is beyond `MAX_BYTES`."""
    most = MAX_BYTES >> 20
    return tr(f"the picture's file has {size / 2**20:.0f} MiB; at most {most} MiB are read",
              f"图片文件有 {size / 2**20:.0f} MiB；最多读取 {most} MiB")


def from_uri(uri: str) -> bytes:
    """The bytes of a data URI. UserError where it is none, or not a picture's."""
    found = _PREFIX.match(uri)
    if not found:
        raise UserError(not_uri(uri))
    if len(uri) > MAX_BYTES * 4 // 3 + 1000:
        raise UserError(too_large(len(uri) * 3 // 4))
    try:
        raw = base64.b64decode(uri[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(tr(f"the picture's base64 is damaged ({error})", f"图片的 base64 已损坏（{error}）")) from None
    if not kind_of(raw[:HEAD]):
        raise UserError(no_picture(raw[:HEAD]))
    if fault := doubtful(raw):
        raise UserError(fault)
    return raw


def doubtful(raw: bytes) -> str:
    """Why a file is not what it says, though it begins as a picture: a zip archive at its end, or a film; else ""."""
    end = raw.rfind(b"PK\x05\x06", -66_000)  # the end record of a zip, which says how much stands behind it
    if end >= 0 and int.from_bytes(raw[end + 20 : end + 22], "little") == len(raw) - end - 22:
        return tr("this is a picture and a zip archive at once; save the picture anew",
                  "这个文件既是图片又是 zip 压缩包；请重新保存图片")
    frames = raw.count(b"\x21\xf9\x04") if raw.startswith(b"GIF8") else 0
    if frames > MAX_FRAMES:
        return tr(f"this GIF has about {frames:,} frames; at most {MAX_FRAMES:,} make a picture: save one of them",
                  f"这个 GIF 约有 {frames:,} 帧；作为图片至多 {MAX_FRAMES:,} 帧：请另存其中一帧")
    return ""


def not_uri(value: Any) -> str:
    """The message for a value that is not a picture."""
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
    return tr(f'a picture is written as "data:image/jpeg;base64,…", not {shown}',
              f"图片写作 \"data:image/jpeg;base64,…\"，而不是 {shown}")


def value(given: Any) -> tuple[str, str]:
    """(a picture in a row's form, "") or ("", what is wrong). `given`: a data URI, bytes, or {"bytes": …} (Parquet)."""
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        given = given["bytes"]
    if isinstance(given, (bytes, bytearray, memoryview)):
        return to_uri(bytes(given))
    if isinstance(given, str) and _PREFIX.match(given):
        return given, ""
    return "", not_uri(given)


# -- pictures that a table names --------------------------------------------------------------------------------------


def path_of(given: Any) -> str | None:
    """The path that a table's cell names; None where it holds the picture itself, or nothing that could be a path."""
    if isinstance(given, dict) and not given.get("bytes") and isinstance(given.get("path"), str):
        given = given["path"]
    if not isinstance(given, str) or not given.strip() or given.lstrip().startswith("data:"):
        return None
    return given.strip()


def looks_like_path(given: Any) -> bool:
    """Whether a table's cell may be a picture: a data URI, bytes, or a path with a picture's ending."""
    if isinstance(given, bytes) or (isinstance(given, dict) and ("bytes" in given or "path" in given)):
        return True
    endings = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
    return isinstance(given, str) and (given.startswith("data:image/") or given.strip().lower().endswith(endings))


def located(path: str, table: Path, what: str) -> tuple[Path, str]:
    """(where the file at `path` lies, "") or (…, why it cannot be had). A relative path starts from the table's folder
    and must stay inside it, links followed; an absolute one is taken as it is: it is the person's own table.

    Args:
        what: what messages call it.
    """
    if re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE):
        return table, tr(f"{path!r} is an address; nothing is fetched from the network: download the files first",
                         f"{path!r} 是网址；不会从网络获取：请先下载文件")
    if "\0" in path:
        return table, tr(f"{path!r} is not the name of a file", f"{path!r} 不是文件名")
    folder = os.path.realpath(table.parent)
    full = os.path.join(folder, path)
    if not os.path.isabs(path) and os.path.commonpath((folder, os.path.realpath(full))) != folder:
        return table, tr(f"{path!r} lies outside the table's folder {table.parent}; put the table above its files",
                         f"{path!r} 位于表格所在文件夹 {table.parent} 之外；请把表格放到这些文件的上级文件夹")
    try:
        if os.path.exists(full):
            return Path(full), ""
    except OSError as error:
        return table, str(os_error(path, error).problems[0].message)
    return table, tr(f"there is no {what} {path!r}; paths start from the table's folder {table.parent}",
                     f"没有{what} {path!r}；路径从表格所在文件夹 {table.parent} 开始")


def read_path(path: str, table: Path) -> tuple[str, str]:
    """(the picture at `path`, "") or ("", why it cannot be had): see `located`."""
    full, fault = located(path, table, tr("picture", "图片"))
    if not fault and not full.is_file():
        fault = tr(f"{path!r} is no file", f"{path!r} 不是文件")
    try:
        return ("", fault) if fault else read_file(full)
    except OSError as error:
        return "", str(os_error(path, error).problems[0].message)


def read_file(path: Path) -> tuple[str, str]:
    """(the picture in a file, "") or ("", why it is none)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            return "", too_large(size)
        return to_uri(file.read(MAX_BYTES + 1))


# -- pictures that are rows themselves --------------------------------------------------------------------------------


class Found(NamedTuple):
    """One picture: its place, itself, its label if it has one; or what is wrong with it."""

    where: str
    image: Any
    label: str | None
    fault: str = ""


def labels_of(names: Sequence[str]) -> list[str | None]:
    """The label of each picture: the first folder of its path in which the paths differ; where all lie in one folder,
    that one's name; None for pictures above the folders of the others."""
    folders = [PurePosixPath(name.replace(os.sep, "/")).parts[:-1] for name in names]
    first, last = min(folders, default=()), max(folders, default=())
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    if all(len(parts) == common for parts in folders):
        common = max(0, common - 1)
    return [parts[common] if len(parts) > common else None for parts in folders]


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders train, val and test of a folder of pictures, by what a recipe calls them; {} where it has no two of
    them, or folders of classes beside them."""
    if not folder.is_dir():
        return {}
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {PARTS[path.name.casefold()]: path for path in inside if path.name.casefold() in PARTS}
    return found if len(found) == len(inside) > 1 and "train" in found else {}


def refuse_splits(labels: Sequence[str | None], where: str) -> None:
    """UserError where the folders are those of parts and not of classes."""
    names = {label for label in labels if label is not None}
    if names and all(name.casefold() in PARTS for name in names) and len(names) > 1:
        shown = ", ".join(sorted(names))
        raise UserError(tr(f"the folders in here are parts, not classes: {shown}. Name each by itself: data.train: "
                           f"{where}/train, data.valid: …, data.test: …",
                           f"这里的文件夹是数据划分而不是类别：{shown}。请分别指定：data.train: {where}/train，"
                           f"data.valid、data.test 同理"), where)


def _common(names: Sequence[str]) -> str:
    """What messages call several files: the folder they share, else the first of them."""
    try:
        return (os.path.commonpath(names) if len(names) > 1 else "") or names[0]
    except ValueError:  # relative and absolute ones
        return names[0]


class Files:
    """Picture files; each file's folder is its label."""

    form = "images"

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.labels = labels_of([source.name for source in self.sources])
        self.name = _common([source.name for source in self.sources])

    def __iter__(self) -> Iterator[Found]:
        for source, label in zip(self.sources, self.labels, strict=True):
            try:
                uri, fault = read_file(source.path)
            except OSError as error:
                uri, fault = "", str(os_error(source.name, error).problems[0].message)
            yield Found(source.name, uri, label, fault)


class Idx:
    """An IDX file of pictures (LeCun's MNIST form: bytes, most significant first) with that of their labels, if any."""

    form = "idx"

    def __init__(self, pictures: Source, labels: Source | None) -> None:
        self.pictures, self.label_source, self.name = pictures, labels, pictures.name
        self.sources = [pictures, *([labels] if labels else [])]
        shape = idx_shape(pictures) or (0,)
        self.count, self.height, self.width = shape[:3]
        self.channels = shape[3] if len(shape) > 3 else 1
        self.labels: list[str | None] = [None]

    def __iter__(self) -> Iterator[Found]:
        labels = self._read_labels()
        size = self.height * self.width * self.channels
        kind = "P5" if self.channels == 1 else "P6"
        head = f"{kind} {self.width} {self.height} 255\n".encode()
        for i, raw in enumerate(self._records(self.pictures, self.count, size)):
            uri, fault = to_uri(head + raw)
            yield Found(f"{self.name}:{i + 1}", uri, labels[i] if labels else None, fault)

    def _read_labels(self) -> list[str] | None:
        if self.label_source is None:
            return None
        count = (idx_shape(self.label_source) or (0,))[0]
        if count != self.count:
            raise UserError(tr(f"holds {count:,} labels, but {self.name} holds {self.count:,} pictures",
                               f"有 {count:,} 个标签，而 {self.name} 有 {self.count:,} 张图片"), self.label_source.name)
        return [str(raw[0]) for raw in self._records(self.label_source, count, 1)]

    @staticmethod
    def _records(source: Source, count: int, size: int) -> Iterator[bytes]:
        """The records behind the header, `size` bytes each. UserError where there are fewer."""
        held, skip, read = bytearray(), 4 + 4 * _axes(source), 0
        for chunk in read_chunks(source):
            held += chunk
            if skip:
                if len(held) < skip:
                    continue
                del held[:skip]
                skip = 0
            whole = min(len(held) // size, count - read)
            for i in range(whole):
                yield bytes(held[i * size : (i + 1) * size])
            read += whole
            del held[: whole * size]
            if read == count:
                return
        raise UserError(tr(f"ends after {read:,} of {count:,} records: it was not copied whole; fetch it again",
                           f"在第 {read:,} 条之后提前结束（应有 {count:,} 条）；文件不完整，请重新获取"), source.name)


def _axes(source: Source) -> int:
    return read_head(source, 4)[0][3]


def idx_shape(source: Source, head: bytes | None = None) -> tuple[int, ...] | None:
    """The shape in the header of an IDX file; None where it is none. UserError where it holds other than bytes, or is
    neither labels nor pictures."""
    head = read_head(source, 20)[0] if head is None else head
    if len(head) < 8 or head[:2] != b"\0\0" or head[2] not in (8, 9, 11, 12, 13, 14) or not 1 <= head[3] <= 4:
        return None
    axes = head[3]
    if len(head) < 4 + 4 * axes:
        return None
    shape = struct.unpack(f">{axes}I", head[4 : 4 + 4 * axes])
    fits = head[2] == 8 and (axes == 1 or (axes >= 3 and shape[1] * shape[2] and shape[3:] in ((), (1,), (3,))))
    if not fits:
        raise UserError(tr(f"this IDX file has type 0x{head[2]:02x} and shape {shape}; pictures are bytes (0x08) of "
                           "shape (n, height, width) or (n, height, width, 3), labels bytes of shape (n,)",
                           f"这个 IDX 文件类型为 0x{head[2]:02x}、形状为 {shape}；图片应为字节（0x08），"
                           "形状 (n, 高, 宽) 或 (n, 高, 宽, 3)，标签应为字节，形状 (n,)"), source.name)
    return shape


def pair_idx(sources: Sequence[Source]) -> list[Idx]:
    """Each IDX file of pictures with its labels: among `sources` by name, or by count where there is but one; else the
    file beside it that is called so (``…-labels-idx1-…``)."""
    shapes = {source: idx_shape(source) or () for source in sources}
    pictures = [s for s in sources if len(shapes[s]) > 1]
    labels = [s for s in sources if len(shapes[s]) == 1]
    if not pictures:
        raise UserError(tr("these are labels without pictures; name the file of the pictures too",
                           "这里只有标签，没有图片；请同时指定图片文件"), sources[0].name)
    found = []
    for source in pictures:
        name = source.path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
        fits = [s for s in labels if s.path.name == name] or (labels if len(labels) == len(pictures) == 1 else [])
        beside = source.path.with_name(name)
        if not fits and name != source.path.name and beside.is_file():
            fits = [Source(beside, str(Path(source.name).with_name(name)))]
        found.append(Idx(source, fits[0] if fits else None))
    return found
