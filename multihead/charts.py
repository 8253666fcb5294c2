"""Pictures for the report as inline SVG: no picture files, no fonts, no script; colours follow the page, light or dark.

Every function returns one ``<svg>`` whose texts are escaped. A pair of texts is (English, Chinese); both are drawn, and
the page shows one. Colours are CSS variables of the page: --ink --muted --grid --accent --second --wrong.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDE = 12  # labels: a larger confusion matrix takes the whole width of the page
Pair = tuple[str, str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart: its points in order of x, and how it is drawn ("line", "faint", "dots")."""

    name: Pair
    points: Sequence[Point]
    colour: str = "accent"
    style: str = "line"


@dataclass(frozen=True)
class Frame:
    """Where data lies on the picture: data ranges and the inner rectangle in SVG units."""

    x: Point
    y: Point
    left: float = 52
    top: float = 30
    width: float = 404
    height: float = 200

    def at(self, x: float, y: float) -> Point:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height


def text(x: float, y: float, words: str | Pair, anchor: str = "middle", css: str = "", extra: str = "") -> str:
    """A text at (x, y); of a pair both languages, each with the class that the page shows or hides."""
    if isinstance(words, tuple):
        if words[0] != words[1]:
            return "".join(
                text(x, y, w, anchor, f"{css} {lang}", extra) for w, lang in zip(words, ("en", "zh"), strict=True)
            )
        words = words[0]
    named = f' class="{css.strip()}"' if css.strip() else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{extra}>{escape(words)}</text>'


def width(words: str) -> int:
    """Columns a text takes: a Chinese character two, a Latin letter one."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words)


def clip(words: str, columns: int) -> str:
    """`words`, cut to `columns` with "…" where longer."""
    if width(words) <= columns:
        return words
    kept = ""
    for character in words:
        if width(kept + character) > columns - 1:
            break
        kept += character
    return kept + "…"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    rounds = (0.5, 1, 2, 5, 10)
    fit = next(i for i, m in enumerate(rounds) if m * power >= rough * 0.999)
    for m in (rounds[fit], rounds[fit - 1]):  # the wider one may have no multiple inside
        step = m * power
        found = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if found:
            break
    return found


def short(value: float) -> str:
    """A tick's number: 0.25, 12, 3.5k, 2M, 1e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size and size < 1e-3:
        return f"{value:.0e}"
    return f"{value:.4g}"


def lines(series: Sequence[Series], x_name: Pair, y_name: Pair, mark: tuple[float, Pair] | None = None) -> str:
    """A line chart. `mark` is a place on x with a name, drawn as a dashed line. "" where there is no point to draw."""
    series = [s for s in series if any(math.isfinite(y) for _, y in s.points)]
    if not series:
        return ""
    frame = Frame(*_ranges(series))
    body = [_axes(frame, x_name, y_name)]
    if mark is not None:
        x, _ = frame.at(mark[0], 0)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.top + frame.height}" class="mark"/>')
        body.append(text(x, frame.top - 3, mark[1], "middle", "note"))
    for one in series:
        body.append(_draw(frame, one))
    body.append(_legend(frame, series))
    return _svg(frame.left + frame.width + 22, frame.top + frame.height + 42, body, y_name)


def _ranges(series: Sequence[Series]) -> tuple[Point, Point]:
    xs = [x for s in series for x, _ in s.points]
    ys = sorted(y for s in series for _, y in s.points if math.isfinite(y))
    # One wild first step must not press the rest of the curve flat: the highest 1 % may leave the picture.
    low, high = ys[0], ys[min(len(ys) - 1, math.ceil(0.99 * (len(ys) - 1)))]
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    floor = 0.0 if low >= 0 and low - room < 0 else low - room
    return (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (floor, high + room)


def _axes(frame: Frame, x_name: Pair, y_name: Pair | None, x_ticks: bool = True) -> str:
    body = []
    for value in ticks(*frame.y):
        _, y = frame.at(frame.x[0], value)
        body.append(f'<line x1="{frame.left}" x2="{frame.left + frame.width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(frame.left - 8, y + 4, short(value), "end", "tick"))
    bottom = frame.top + frame.height
    for value in ticks(*frame.x, about=6) if x_ticks else ():
        x, _ = frame.at(value, frame.y[0])
        body.append(text(x, bottom + 17, short(value), "middle", "tick"))
    body.append(f'<line x1="{frame.left}" x2="{frame.left + frame.width}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    body.append(text(frame.left + frame.width / 2, bottom + 36, x_name, "middle", "name"))
    if y_name is not None:
        body.append(text(4, frame.top - 15, y_name, "start", "name"))
    return "".join(body)


def _draw(frame: Frame, series: Series) -> str:
    places = [frame.at(x, min(y, frame.y[1])) for x, y in series.points if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f'style="stroke:var(--{series.colour})"'
    drawn = ""
    if len(places) > 1:
        drawn = f'<polyline points="{path}" class="{"faint" if series.style == "faint" else "line"}" {style}/>'
    if series.style == "dots" or len(places) == 1:
        radius = 3.2 if len(places) <= 40 else 1.8
        drawn += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:var(--{series.colour})">'
            f"<title>{short(p[0])}: {p[1]:.5g}</title></circle>"
            for (x, y), p in zip(places, [p for p in series.points if math.isfinite(p[1])], strict=True)
        )
    return drawn


def _legend(frame: Frame, series: Sequence[Series]) -> str:
    named = [s for s in series if s.style != "faint"]
    if len(named) < 2:
        return ""
    body, right = [], frame.left + frame.width
    for one in reversed(named):
        room = 7 * max(width(n) for n in one.name) + 30
        right -= room
        body.append(
            f'<line x1="{right:.1f}" x2="{right + 16:.1f}" y1="{frame.top - 19}" y2="{frame.top - 19}" class="line" '
            f'style="stroke:var(--{one.colour})"/>'
        )
        body.append(text(right + 21, frame.top - 15, one.name, "start", "name"))
    return "".join(body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_name: Pair,
    y_name: Pair,
    marks: Sequence[tuple[float, Pair]] = (),
) -> str:
    """Bars between `edges` (one more than `counts`), with named places on x. "" where nothing was counted."""
    if not counts or not any(counts) or len(edges) != len(counts) + 1:
        return ""
    frame = Frame((edges[0], edges[-1]), (0, max(counts) * 1.12))
    body = [_axes(frame, x_name, y_name)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x0, y0 = frame.at(low, count)
        x1, y1 = frame.at(high, 0)
        body.append(
            f'<rect x="{x0 + 0.5:.1f}" y="{y0:.1f}" width="{max(0.6, x1 - x0 - 1):.1f}" height="{y1 - y0:.1f}" '
            f'class="bar"><title>{short(low)} – {short(high)}: {short(count)}</title></rect>'
        )
    for value, name in marks:
        x, _ = frame.at(value, 0)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.top + frame.height}" class="mark"/>')
        late = x > frame.left + frame.width * 0.7
        # The first name stands above the second: two marks may lie close to each other.
        level = frame.top + 11 + 15 * [m[0] for m in marks].index(value)
        body.append(text(x + (-5 if late else 5), level, name, "end" if late else "start", "note"))
    return _svg(frame.left + frame.width + 22, frame.top + frame.height + 42, body, x_name)


def confusion(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """Truth in rows, answers in columns; a cell is as dark as its share of its row. Right is blue, wrong is red."""
    n = len(labels)
    if n == 0 or not any(map(any, matrix)):
        return ""
    cell = max(16.0, min(112.0, (400 if n <= WIDE else 780) / n))
    room = 14
    longest = max(width(clip(label, room)) for label in labels) * 7 + 16
    flat = n <= 6 and longest < cell + 14
    # Steeper where cells are narrow: names side by side need the height of a line each.
    slope = 0 if flat else 45 if cell >= 26 else 90
    left, top = 34.0 + longest, 40.0 + (26 if flat else longest * (0.75 if slope == 45 else 1))
    body = [
        text(left + n * cell / 2, 16, ("answer", "回答"), css="name"),
        text(
            0,
            0,
            ("truth", "真实"),
            css="name",
            extra=f' transform="translate(14 {top + n * cell / 2:.1f}) rotate(-90)"',
        ),
    ]
    for i, label in enumerate(labels):
        x, y = left + (i + 0.5) * cell, top + (i + 0.5) * cell + 4
        body.append(text(left - 9, y, clip(label, room), "end", "tick"))
        shift = 4 if slope == 90 else 0
        turn = f' transform="rotate(-{slope} {x + shift:.1f} {top - 9:.1f})"' if slope else ""
        body.append(text(x + shift, top - 9, clip(label, room), "start" if slope else "middle", "tick", turn))
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            body.append(
                _cell(
                    left + j * cell,
                    top + i * cell,
                    cell,
                    i == j,
                    count,
                    count / (sum(row) or 1),
                    f"{labels[i]} → {labels[j]}",
                )
            )
    # Slanted names at the right lean out of the grid.
    return _svg(
        left + n * cell + (60 if slope == 45 else 10), top + n * cell + 8, body, ("confusion matrix", "混淆矩阵"), True
    )


def _cell(x: float, y: float, size: float, right: bool, count: int, share: float, name: str) -> str:
    colour = "accent" if right else "wrong"
    # Errors are rare and must still be seen: the square root lifts small shares.
    strength = 0.06 + 0.94 * (share if right else math.sqrt(share)) if count else 0.04
    box = (
        f'<rect x="{x + 0.75:.2f}" y="{y + 0.75:.2f}" width="{size - 1.5:.2f}" height="{size - 1.5:.2f}" '
        f'rx="{min(4, size / 8):.1f}" style="fill:var(--{colour if count else "muted"});fill-opacity:{strength:.3f}"/>'
    )
    title = f"<title>{escape(name)}: {count} ({share:.1%})</title>"
    if size < 26:
        return f"<g>{title}{box}</g>"
    strong = " strong" if strength > 0.55 else ""
    middle = x + size / 2
    if size < 56:
        return (
            f"<g>{title}{box}{text(middle, y + size / 2 + 4, short(count), css='count' + strong) if count else ''}</g>"
        )
    return (
        f"<g>{title}{box}{text(middle, y + size / 2 + 1, short(count), css='count' + strong)}"
        f"{text(middle, y + size / 2 + 17, f'{share:.0%}', css='share' + strong)}</g>"
    )


def reliability(confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[int]) -> str:
    """Said confidence against how often it is right, one dot a bin, as large as the bin; the diagonal is honest."""
    bins = [(c, a, n) for c, a, n in zip(confidence, accuracy, count, strict=True) if n and math.isfinite(c + a)]
    if not bins:
        return ""
    low = min(0.9, math.floor(10 * min(min(c, a) for c, a, _ in bins)) / 10)
    frame = Frame((low, 1), (low, 1), width=300, height=300, left=52)
    x0, y0 = frame.at(low, low)
    x1, y1 = frame.at(1, 1)
    body = [
        _axes(frame, ("confidence said", "模型自称的把握"), ("how often right", "实际正确的比例")),
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="mark"/>',
    ]
    places = [frame.at(c, a) for c, a, _ in bins]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    body.append(f'<polyline points="{path}" class="faint" style="stroke:var(--accent)"/>')
    most = max(n for _, _, n in bins)
    for (x, y), (c, a, n) in zip(places, bins, strict=True):
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 + 8 * math.sqrt(n / most):.1f}" class="bubble">'
            f"<title>{c:.3f} → {a:.3f} (n = {n})</title></circle>"
        )
    return _svg(frame.left + frame.width + 22, frame.top + frame.height + 42, body, ("calibration", "校准"), True)


def interval(value: float, low: float, high: float) -> str:
    """A figure between 0 and 1 with its interval on a line from 0 to 1."""

    def at(v: float) -> float:
        return 4 + 192 * min(1.0, max(0.0, v))

    body = [
        '<line x1="4" x2="196" y1="8" y2="8" class="rail"/>',
        f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="8" y2="8" class="span"/>',
        f'<line x1="{at(value):.1f}" x2="{at(value):.1f}" y1="1" y2="15" class="point"/>',
    ]
    return _svg(200, 16, body, (f"{low:.3f} – {high:.3f}",) * 2)


def _svg(across: float, down: float, body: Sequence[str], name: Pair, natural: bool = False) -> str:
    size = f' width="{across:.0f}"' if natural else ""
    return (
        f'<svg viewBox="0 0 {across:.0f} {down:.0f}"{size} role="img" aria-label="{escape(name[0])} {escape(name[1])}">'
        f"{''.join(body)}</svg>"
    )
