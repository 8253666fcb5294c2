"""Rows with a recording in them: folders of recordings with their texts beside them, tables that name recordings,
archives of either.

A text lies beside its recording as ``name.txt`` or ``name.lab``; the folders in between do not matter, but the first of
them is kept as ``speaker``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from multihead.data.audio import RECORDING
from multihead.data.files import Source
from multihead.data.formats import whole_text
from multihead.data.media_rows import Content, Found, Inside, MediaRows, Things, stem
from multihead.errors import tr


class RecordingRows(MediaRows):
    """`Rows` with a recording in each."""

    media, kind, kinds, form = RECORDING, "audio", ("text",), "recordings"
    lacking = ("these recordings have no texts: put each text beside its recording (a.wav, a.txt), or give a table "
               "(CSV, TSV, JSONL) with the columns audio and text",
               "这些录音没有文本：请把文本放在录音旁边（a.wav、a.txt），"
               "或提供含 audio 与 text 两列的表格（CSV、TSV、JSONL）")
    data = ("a table with the columns audio and text, a folder of recordings each with its text beside it, or an "
            "archive of either",
            "含 audio 与 text 两列的表格、录音与文本成对的文件夹，或二者之一的压缩包")
    texts = (".txt", ".lab")

    def _texts(self, groups: Mapping[str, Sequence[Source]]) -> dict[str, Source]:
        """Texts that lie beside a recording."""
        stems = {stem(source.name) for source in groups["thing"]}
        found = {stem(s.name): s for s in groups["other"] if s.name.lower().endswith(self.texts)}
        return {name: source for name, source in found.items() if name in stems}

    def _apart(self, groups: Mapping[str, Sequence[Source]]) -> list[Source]:
        beside = set(self._texts(groups).values())
        return [source for source in groups["other"] if source not in beside]

    def _alone(self, groups: Mapping[str, Sequence[Source]]) -> list[Things]:
        if not (found := groups["thing"]):
            return []
        texts = self._texts(groups)
        name = str(PurePosixPath(found[0].name).parent) if len(found) > 1 else found[0].name
        speakers = {source.name: source.label for source in found}
        rows = partial(self._spoken, partial(self._read, found), lambda place: place, texts, speakers)
        return [self._things([*found, *texts.values()], name, "beside" if texts else "", rows)]

    def _inside(self, found: Inside) -> Things:
        contents, speakers = self._contents(found, set(found.chosen)), speakers_of(found.chosen, found.archive.inside)
        rows = partial(self._spoken, contents, found.where, found.texts, speakers)
        return self._things([found.archive], found.archive.name, "beside" if found.texts else "", rows)

    def _spoken(self, contents: Callable[[], Iterable[Content]], where: Callable[[str], str],
                texts: Mapping[str, Source], speakers: Mapping[str, str | None]) -> Iterator[Found]:
        """Recordings, each with its text where there are `texts`."""
        for name, uri, fault in contents():
            words, source = "", texts.get(stem(name))
            if texts and not fault:
                if source is None:
                    fault = tr("no text lies beside this recording (.txt or .lab)",
                               "这个录音旁边没有文本（.txt 或 .lab）")
                else:
                    words, fault = whole_text(source, self._wanted.encoding)
            yield Found(where(name), uri, words.strip(), fault, speakers[name])


def speakers_of(names: Sequence[str], inside: str) -> dict[str, str | None]:
    """The speaker of each recording in an archive: the first folder in `inside`, or in the one folder that holds all of
    the archive, as that of a folder on the disk."""
    paths = {name: PurePosixPath(name).relative_to(inside).parts[:-1] for name in names}
    deep = {parts[:1] for parts in paths.values()}
    above = int(not inside and len(deep) == 1 and max(map(len, paths.values())) > 1)
    return {name: parts[above] if len(parts) > above else None for name, parts in paths.items()}
