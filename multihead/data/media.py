"""Pictures, recordings and clips as the values of rows: what is one, and how it is written down.

In a row each is a data URI (RFC 2397), ``data:image/jpeg;base64,…``, its file's bytes as they are: the same in a table,
in a request and in a stored row, equal where the files are equal. Nothing is decoded here (`codec` does).
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multihead.data.files import os_error
from multihead.errors import UserError, tr

PREFIX = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,\"]*)*);base64,", re.IGNORECASE)
Words = tuple[str, str]
"""The same in English and in Chinese."""


@dataclass(frozen=True)
class Media:
    """What one medium's files are, and what is said of a file that is none.

    Args:
        one: what messages call one of them.
        kinds: the sentence that names the forms which are read.
        example: a media type that messages show; the part before ``/`` is that of a table's cells.
        magic: first bytes → media type; the first that fits counts.
        others: first bytes → what else this is.
        endings: of the names of such files.
        head: how many first bytes are enough to tell.
        most: bytes of the largest file.
        smaller: what to do about a larger one.
        doubtful: why a file that begins as one is none; "" where it is one.
        prefix: the data URIs that are taken.
    """

    one: Words
    kinds: Words
    example: str
    magic: tuple[tuple[re.Pattern[bytes], str], ...]
    others: tuple[tuple[re.Pattern[bytes], str, str], ...]
    endings: tuple[str, ...]
    head: int = 64
    most: int = 64 << 20
    smaller: Words = ("make it smaller first", "请先缩小")
    doubtful: Callable[[bytes], str] = lambda raw: ""
    prefix: re.Pattern[str] = PREFIX

    # -- files ---------------------------------------------------------------------------------------------------------

    def kind_of(self, head: bytes) -> str:
        """The media type by a file's first bytes; "" where it is none that can be read."""
        return next((kind for pattern, kind in self.magic if pattern.match(head)), "")

    def none(self, head: bytes) -> str:
        """Why these first bytes are none of such a file, for a person."""
        (en, zh), kinds = self.one, tr(*self.kinds)
        if not head:
            return tr(f"the {en} is empty (0 bytes)", f"{zh}是空的（0 字节）")
        for pattern, this, this_zh in self.others:
            if pattern.match(head):
                return tr(f"this is {this}; {kinds}: save it as one", f"这是{this_zh}；{kinds}：请另存")
        return tr(f"this is no {en}; {kinds}", f"这不是{zh}；{kinds}")

    def too_large(self, size: int, most: int | None = None) -> str:
        """The message for a file of `size` bytes, beyond `most` (default: `Media.most`)."""
        (en, zh), mib = self.one, math.ceil(size / 2**20)
        most = (most or self.most) >> 20
        return tr(f"the {en}'s file has {mib:,} MiB; at most {most:,} MiB are read: {self.smaller[0]}",
                  f"{zh}文件有 {mib:,} MiB；最多读取 {most:,} MiB：{self.smaller[1]}")

    def to_uri(self, raw: bytes) -> tuple[str, str]:
        """(the data URI of a file's bytes, "") or ("", why it is none)."""
        kind = self.kind_of(raw[: self.head])
        if not kind:
            return "", self.none(raw[: self.head])
        if len(raw) > self.most:
            return "", self.too_large(len(raw))
        if fault := self.doubtful(raw):
            return "", fault
        return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}", ""

    def read_file(self, path: Path) -> tuple[str, str]:
        """(the data URI of a file, "") or ("", why it is none)."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > self.most:
                head = file.read(self.head)
                return "", self.too_large(size) if self.kind_of(head) else self.none(head)
            return self.to_uri(file.read(self.most + 1))

    # -- data URIs -----------------------------------------------------------------------------------------------------

    def from_uri(self, uri: str) -> bytes:
        """The bytes of a data URI. UserError where it is none, or not of such a file."""
        found = self.prefix.match(uri)
        if not found:
            raise UserError(self.not_uri(uri))
        if len(uri) > self.most * 4 // 3 + 1000:
            raise UserError(self.too_large(len(uri) * 3 // 4))
        try:
            raw = base64.b64decode(memoryview(uri.encode("ascii"))[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            en, zh = self.one
            raise UserError(tr(f"the {en}'s base64 is damaged ({error})",
                               f"{zh}的 base64 已损坏（{error}）")) from None
        if not self.kind_of(raw[: self.head]):
            raise UserError(self.none(raw[: self.head]))
        if fault := self.doubtful(raw):
            raise UserError(fault)
        return raw

    def not_uri(self, value: Any) -> str:
        """The message for a value that is none."""
        shown = repr(value[:60] if isinstance(value, (str, bytes)) else value)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        return tr(f'a {self.one[0]} is written as "data:{self.example};base64,…", not {shown}',
                  f'{self.one[1]}写作 "data:{self.example};base64,…"，而不是 {shown}')

    def value(self, given: Any) -> tuple[str, str]:
        """(a row's form of it, "") or ("", what is wrong). `given`: a data URI, bytes, or {"bytes": …} (Parquet)."""
        if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
            given = given["bytes"]
        if isinstance(given, (bytes, bytearray, memoryview)):
            return self.to_uri(bytes(given))
        if isinstance(given, str) and self.prefix.match(given):
            return given, ""
        return "", self.not_uri(given)

    # -- paths ---------------------------------------------------------------------------------------------------------

    def looks_like_path(self, given: Any) -> bool:
        """Whether a table's cell may be one: a data URI, bytes, or a path with one of the endings."""
        if isinstance(given, bytes) or (isinstance(given, dict) and ("bytes" in given or "path" in given)):
            return True
        uri = f"data:{self.example.split('/')[0]}/"
        return isinstance(given, str) and (given.startswith(uri) or given.strip().lower().endswith(self.endings))

    def located(self, path: str, table: Path) -> tuple[Path, str]:
        """(where the file or folder at `path` lies, "") or (…, why it cannot be had).

        A relative path starts from the table's folder and must stay inside it, links followed; an absolute one is taken
        as it is: it is the person's own table.
        """
        en, zh = self.one
        if re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE):
            return table, tr(f"{path!r} is an address; nothing is fetched from the network: download the {en}s first",
                             f"{path!r} 是网址；不会从网络获取：请先下载{zh}")
        if "\0" in path:
            return table, tr(f"{path!r} is not the name of a file", f"{path!r} 不是文件名")
        folder = os.path.realpath(table.parent)
        full = os.path.join(folder, path)
        if not os.path.isabs(path) and os.path.commonpath((folder, os.path.realpath(full))) != folder:
            return table, tr(f"{path!r} lies outside the table's folder {table.parent}; put the table above its {en}s",
                             f"{path!r} 位于表格所在文件夹 {table.parent} 之外；请把表格放到{zh}的上级文件夹")
        try:
            if os.path.exists(full):
                return Path(full), ""
        except OSError as error:
            return table, str(os_error(path, error).problems[0].message)
        return table, tr(f"there is no {en} {path!r}; paths start from the table's folder {table.parent}",
                         f"没有{zh} {path!r}；路径从表格所在文件夹 {table.parent} 开始")

    def read_path(self, path: str, table: Path) -> tuple[str, str]:
        """(the data URI of the file that a table names, "") or ("", why it cannot be had): see `located`."""
        full, fault = self.located(path, table)
        if not fault and not full.is_file():
            fault = tr(f"{path!r} is no file", f"{path!r} 不是文件")
        try:
            return ("", fault) if fault else self.read_file(full)
        except OSError as error:
            return "", str(os_error(path, error).problems[0].message)


def path_of(given: Any) -> str | None:
    """The path that a table's cell names; None where it holds the thing itself, or nothing that could be a path."""
    if isinstance(given, dict) and not given.get("bytes") and isinstance(given.get("path"), str):
        given = given["path"]
    if not isinstance(given, str) or not given.strip() or given.lstrip().startswith("data:"):
        return None
    return given.strip()
