"""Rows with a picture in them: folders of pictures, tables that name pictures, archives of either, IDX, Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from multihead.data.files import Source, read_head
from multihead.data.folders import shared
from multihead.data.idx import Idx, idx_shape, pair_idx
from multihead.data.images import PICTURE
from multihead.data.media_rows import MediaRows, Things


class PictureRows(MediaRows):
    """`Rows` with a picture in each."""

    media, kind, form = PICTURE, "image", "images"
    lacking = ("these pictures have no labels: put them into one folder per label (cat/1.jpg, dog/2.jpg), or give a "
               "table of paths and labels",
               "这些图片没有标签：请每个标签放一个文件夹（cat/1.jpg、dog/2.jpg），或提供图片路径与标签的表格")
    data = ("a folder of pictures, an archive of them, or a table with their paths",
            "图片文件夹、图片压缩包，或含图片路径的表格")
    _unpaired = ("these pictures have no labels: no file of labels lies beside it (…-labels-idx1-…)",
                 "这些图片没有标签：旁边没有标签文件（…-labels-idx1-…）")

    def _sort(self, source: Source) -> str:
        kind = super()._sort(source)
        return "idx" if kind == "other" and idx_shape(source, read_head(source, 512)[0]) else kind

    def _alone(self, groups: Mapping[str, Sequence[Source]]) -> list[Things]:
        made = [self._idx(one) for one in pair_idx(groups["idx"])] if groups["idx"] else []
        if pictures := groups["thing"]:
            names = [source.name for source in pictures]
            name = shared(names)
            made.append(self._by_folder(pictures, name, names, partial(self._read, pictures)))
        return made

    def _idx(self, found: Idx) -> Things:
        how = "content" if found.label_source is not None else ""
        return self._things(found.sources, found.name, how, found.__iter__, self._unpaired, "idx")
