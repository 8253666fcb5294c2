"""IDX files of pictures (LeCun's MNIST form: bytes, the most significant first), each with that of its labels."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from multihead.data.files import Source, read_chunks, read_head
from multihead.data.images import to_uri
from multihead.data.media_rows import Found
from multihead.errors import UserError, tr


class Idx:
    """An IDX file of pictures (LeCun's MNIST form: bytes, most significant first) with that of their labels, if any."""

    def __init__(self, pictures: Source, labels: Source | None) -> None:
        self.pictures, self.label_source, self.name = pictures, labels, pictures.name
        self.sources = [pictures, *([labels] if labels else [])]
        shape = idx_shape(pictures) or (0,)
        self.count, self.height, self.width = shape[:3]
        self.channels = shape[3] if len(shape) > 3 else 1

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
