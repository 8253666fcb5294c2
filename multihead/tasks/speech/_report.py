"""What is told of recordings: which cannot be learned from, what the data holds, where words lie, what was mistaken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xxhash

from multihead.codec import activity
from multihead.codec.audio import RATE, wav
from multihead.codec.text import TextCodec
from multihead.codec.transcript import PinyinCodec, words
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.generation.ctc import align
from multihead.metrics.speech import ErrorRates
from multihead.task import Answer
from multihead.tasks.speech._recogniser import POSITION, positions_of

SAMPLES = 20
MISTAKES = 30
NAMED = 20
SILENT = 33  # −60 dB of full scale: the loudest sample of a recording in which nobody speaks
CLIPPED = 0.002  # share of samples at full scale
FAST, SLOW = 30.0, 0.3  # tokens a second beyond which a text hardly belongs to its recording


def fits(samples: int, target_L: np.ndarray) -> bool:
    """Whether CTC can say the text in so many samples: a position for each token, and one between two that are alike.
    """
    repeats = int((target_L[1:] == target_L[:-1]).sum())
    return int(positions_of(samples)) >= len(target_L) + repeats


def refuse_unfit(samples: int, target_L: np.ndarray, longest: float) -> None:
    """UserError where a recording and its text cannot be learned from."""
    seconds = samples / RATE
    if seconds > longest:
        raise UserError(tr(f"the recording is {seconds:.1f} s long, more than options.max_seconds ({longest:g}): cut "
                           "it, or raise the option",
                           f"录音长 {seconds:.1f} 秒，超过 options.max_seconds（{longest:g}）：请剪短，或调大该选项"))
    if not len(target_L):
        raise UserError(tr("nothing is left of the text without its punctuation", "文本去掉标点后没有内容"))
    if not fits(samples, target_L):
        raise UserError(tr(f"the text has {len(target_L)} tokens, too many for {seconds:.2f} s (25 a second at most): "
                           "it hardly belongs to this recording",
                           f"文本有 {len(target_L)} 个词元，{seconds:.2f} 秒的录音容纳不下（每秒至多 25 个）："
                           "它多半不属于这段录音"))


def described(store: Store) -> dict[str, Any]:
    """Seconds, rates and what is suspicious of one part: counts under ``issues``, places under ``issue_examples``."""
    rates = Counter(int(rate) for rate in store.stream("rate").tolist())
    usual = rates.most_common(1)[0][0]
    found: dict[str, list[int]] = {name: [] for name in ("silent", "clipped", "another_rate", "same_samples",
                                                         "text_too_long", "text_too_short")}
    seen: dict[int, int] = {}
    for i in range(len(store)):
        example = store[i]
        samples, target = example["audio"], example.get("target", np.zeros(0))
        size_N = np.abs(samples.astype(np.int32))
        loudest = int(size_N.max(initial=0))
        speed = len(target) / (len(samples) / RATE)
        for name, bad in (
            ("silent", loudest <= SILENT), ("clipped", float((size_N >= 32766).mean()) > CLIPPED),
            ("another_rate", int(example["rate"]) != usual), ("text_too_long", speed > FAST),
            ("text_too_short", len(samples) > 3 * RATE and speed < SLOW),
            ("same_samples", seen.setdefault(xxhash.xxh3_64_intdigest(samples.tobytes()), i) != i),
        ):  # fmt: skip
            if bad:
                found[name].append(i)
    issues = {name: len(rows) for name, rows in found.items() if rows}
    report: dict[str, Any] = {"hours": round(int(store.lengths("audio").sum()) / RATE / 3600, 4)}
    if "whole" in store[0]:
        report["hours_cut"] = round(int(store.stream("whole").sum()) / RATE / 3600 - report["hours"], 4)
    if len(rates) > 1:
        report["rates"] = {str(rate): count for rate, count in sorted(rates.items())}
    if issues:
        report["issues"] = issues
        report["issue_examples"] = {name: [store.where(i) for i in found[name][:NAMED]] for name in issues}
    return report


def as_wav(samples: Any, rate: Any) -> bytes:
    """Samples, float from −1 to 1 or int16, (N,) or (N, channels), as a WAV file."""
    array = np.asarray(samples)
    if array.ndim == 2:
        array = array.mean(1)
    if array.ndim != 1 or not isinstance(rate, int):
        raise UserError(tr("a recording from Python is (samples, rate): an array of one or two axes and a whole number",
                           "Python 中的录音写作 (samples, rate)：一维或二维数组与整数"))
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UserError(tr("the recording holds samples that are no numbers", "录音里有不是数的采样"))
        array = np.rint(np.clip(array, -1, 1) * 32767)
    return wav(array.astype(np.int16), rate)


def pieces(units: TextCodec | PinyinCodec, ids: Sequence[int]) -> list[str]:
    """What each token writes."""
    if isinstance(units, PinyinCodec):
        return units.pieces(ids)
    stream = units.stream()
    return [stream.push(i) for i in ids]


def timed(units: TextCodec | PinyinCodec, logp_SV: np.ndarray, ids: Sequence[int], seconds: float
          ) -> list[dict[str, Any]]:
    """The words of a text with their times in seconds and their confidence, by the likeliest path of CTC."""
    found: list[dict[str, Any]] = []
    fresh = True
    for piece, (first, behind, sure) in zip(pieces(units, ids), align(logp_SV, list(ids)), strict=False):
        text = piece.strip()
        if not text:
            fresh = fresh or piece.isspace()
            continue
        apart = fresh or piece[0].isspace() or len(words(found[-1]["word"][-1] + text[0])) > 1
        start, end = (round(min(frame * POSITION / RATE, seconds), 2) for frame in (first, behind))
        if apart:
            found.append({"word": text, "start": start, "end": end, "confidence": sure, "tokens": 1})
        else:
            one = found[-1]
            one |= {"word": one["word"] + text, "end": end, "tokens": one["tokens"] + 1,
                    "confidence": (one["confidence"] * one["tokens"] + sure) / (one["tokens"] + 1)}
        fresh = piece[-1].isspace()
    return [{**{k: v for k, v in one.items() if k != "tokens"}, "confidence": round(one["confidence"], 4)}
            for one in found]


def put_back(words: Sequence[dict[str, Any]], voiced_K2: np.ndarray) -> None:
    """Times in a recording whose silences were cut → times in the whole."""
    for word in words:
        for name in ("start", "end"):
            place = activity.original(np.array(word[name] * RATE), voiced_K2, ends=name == "end")
            word[name] = round(float(place) / RATE, 2)


def figures(rates: ErrorRates, answers: Sequence[Answer], rows: Sequence[dict[str, Any]],
            text_of: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """What the report shows of transcripts."""
    chosen = sorted({int(i) for i in np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows)))})
    samples = [{"prompt": f"{text_of(rows[i])}\n", "text": f"→ {answers[i]['text']}"} for i in chosen]
    worst = np.argsort(-rates.character_errors, kind="stable")[:MISTAKES]
    mistakes = [
        {"text": tr(f"{rates.character_errors[i]:.0f} of {rates.character_count[i]:.0f} characters wrong",
                    f"{rates.character_count[i]:.0f} 个字符错 {rates.character_errors[i]:.0f} 个"),
         "truth": text_of(rows[i]), "answer": answers[i]["text"], "score": float(answers[i]["score"]),
         "where": getattr(rows[i], "where", "")}
        for i in worst if rates.character_errors[i] > 0
    ]  # fmt: skip
    confused = rates.confused()
    found: dict[str, Any] = {"samples": samples, "mistakes": mistakes, "errors": confused}
    names = sorted({one[side] for one in confused for side in ("truth", "answer") if one[side]})
    if names and len(names) <= NAMED:
        matrix = np.zeros((len(names), len(names)), int)
        for one in confused:
            if one["truth"] and one["answer"]:
                matrix[names.index(one["truth"]), names.index(one["answer"])] = one["count"]
        found["confusion"] = {"labels": names, "matrix": matrix.tolist()}
    return found


