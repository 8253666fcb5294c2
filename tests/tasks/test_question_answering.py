"""question-answering: where answers stand, what windows read, what is answered; what every task keeps is in
test_contract.py."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.data.rows import open_rows
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.task import Batch
from multihead.tasks.language import _passages as passages
from multihead.train import train
from multihead.transformer.config import TransformerConfig

Kind = task.find("question-answering")
CITIES = {"北京": "长城", "西安": "兵马俑", "成都": "大熊猫", "杭州": "西湖", "桂林": "漓江", "苏州": "园林"}


def row(context: str, question: str, answer: str | None = None, start: int | None = None) -> dict[str, Any]:
    given = [] if answer is None else [{"text": answer, **({} if start is None else {"answer_start": start})}]
    return {"context": context, "question": question, "answers": given}


def fitted(rows: list[dict[str, Any]], **options: Any) -> Any:
    made = Kind(Kind.Options(**{"max_tokens": 24, "stride": 6, "max_question": 8, **options}))
    made.fit(rows)
    return made


class Says(torch.nn.Module):
    """A model whose scores are read off a table: character of the passage → (first, last)."""

    def __init__(self, made: Any, table: dict[str, tuple[float, float]], none: float = -5.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((made.codec.vocab_size, 2), 0.0))
        with torch.no_grad():
            for character, scores in table.items():
                self.weight[int(made.codec.encode(character)[0])] = torch.tensor(scores)
            self.weight[made.codec.bos] = none

    def forward(self, ids_NL: Any, lengths: Any, segments: Any, overlap: Any) -> Any:
        return self.weight[ids_NL]


def log_softmax(scores: list[float]) -> np.ndarray:
    return torch.tensor(scores).double().log_softmax(0).numpy()


# -- where answers stand -----------------------------------------------------------------------------------------------


def test_an_answer_is_taken_from_the_nearest_place() -> None:
    text = "甲乙丙甲乙丁甲乙"
    assert passages.locate(text, "甲乙", 3) == 3  # it is there
    assert passages.locate(text, "甲乙", 5) == 6  # not there: the nearest
    assert passages.locate(text, "甲乙", 4) == 3
    assert passages.locate(text, "甲乙", 99) == 6
    assert passages.locate(text, "甲乙", -7) == 0
    assert passages.locate(text, "甲乙", None) == 0
    assert passages.locate(text, "戊", 0) is None


def test_every_token_is_read_and_windows_overlap() -> None:
    for length, room, stride in itertools.product(range(1, 30), range(2, 9), range(1, 9)):
        starts = passages.window_starts(length, room, min(stride, room)).tolist()
        assert {i for s in starts for i in range(s, min(length, s + room))} == set(range(length))
        assert starts == sorted(set(starts)) and all(s + room <= max(length, room) for s in starts)


def test_shared_runs_are_those_of_a_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        passage, question = ("".join(rng.choice(list("abcd"), size=n)) for n in (12, 6))
        expected = [
            max((n for n in range(1, passages.LONGEST + 1) for s in range(i - n + 1, i + 1)
                 if s >= 0 and s + n <= len(passage) and passage[s : s + n] in question), default=0)
            for i in range(len(passage))
        ]  # fmt: skip
        assert passages.shared_runs(list(passage), list(question)).tolist() == expected


def test_simplified_text_keeps_its_places() -> None:
    pytest.importorskip("opencc", reason="OpenCC is not installed")
    made = fitted([row("龍門石窟在洛陽。", "石窟在哪裡？", "洛陽")], simplify=True)
    one = made.encode(row("龍門石窟在洛陽。", "石窟在哪裡？", "洛陽"))
    two = made.encode(row("龙门石窟在洛阳。", "石窟在哪里？", "洛阳"))
    assert np.array_equal(one["context"], two["context"]) and one["target"].tolist() == [5, 6]
    batch = made.collate([{k: v for k, v in one.items() if k != "target"}])
    answer = made.predict(Says(made, {"洛": (9.0, 0.0), "阳": (0.0, 9.0)}), batch, {})[0]
    assert (answer["answer"], answer["start"], answer["end"]) == ("洛陽", 5, 7)  # as the passage writes it


# -- windows, loss and answers -----------------------------------------------------------------------------------------

LONG = "".join(chr(0x4E00 + i) for i in range(40))  # every character once
ASKED = "问"


def test_a_batch_holds_all_windows_of_a_row() -> None:
    made = fitted([row(LONG, ASKED, LONG[20:23])])
    examples = [made.encode(row(LONG, ASKED, LONG[20:23])), made.encode(row(LONG[:5], ASKED, LONG[1:2]))]
    batch = made.collate(examples)
    room = 24 - 4  # <bos> question <eos> … <eos>
    starts = passages.window_starts(40, room, 6).tolist()
    assert batch["ids"].shape == (2, len(starts), 24)
    assert batch["lengths"][1].tolist() == [4 + 5] + [0] * (len(starts) - 1)
    for w, start in enumerate(starts):
        part = made.codec.encode(LONG[start : start + room])
        expected, segments = made.codec.frame_pair(made.codec.encode(ASKED), part)
        assert batch["ids"][0, w].tolist() == expected.tolist()
        assert batch["segments"][0, w].tolist() == segments.tolist()
        assert (int(batch["begin"][0, w]), int(batch["at"][0, w])) == (start, 3)


@pytest.mark.parametrize("no_answer", [False, True])
def test_loss_and_answer_over_windows_are_those_counted_by_hand(no_answer: bool) -> None:
    rows = [row(LONG, ASKED, LONG[20:23]), row(LONG, "甲", LONG[2:3]), row(LONG, "乙", None)][: 3 if no_answer else 2]
    made = fitted(rows, no_answer=no_answer)
    rng = np.random.default_rng(1)
    table = {c: tuple(rng.normal(size=2).tolist()) for c in LONG}
    model, batch = Says(made, table, none=0.3), made.collate([made.encode(r) for r in rows])
    starts = passages.window_starts(40, 20, 6).tolist()
    # All windows' tokens of the passage share one softmax, and where there may be no answer, their first positions.
    places = [(w, i) for w, start in enumerate(starts) for i in range(start, start + 20)]
    none = [(w, -1) for w in range(len(starts))] if no_answer else []
    logs = [log_softmax([table[LONG[i]][k] if i >= 0 else 0.3 for _, i in places + none]) for k in (0, 1)]
    at = {place: n for n, place in enumerate(places + none)}
    total = 0.0
    for first, last in [(20, 22), (2, 2), (-1, -1)][: len(rows)]:
        windows = [w for w, start in enumerate(starts) if first < 0 or (start <= first and last < start + 20)]
        for k, token in ((0, first), (1, last)):
            total -= float(np.logaddexp.reduce([logs[k][at[w, token]] for w in windows])) / 2
    loss = made.loss(model, batch)
    assert int(loss.count) == len(rows) and float(loss.total.detach()) == pytest.approx(total, rel=1e-5)

    best = max(
        ((logs[0][at[w, i]] + logs[1][at[w, j]], i, j) for w, i in places for j in range(i, i + made.options.max_answer)
         if (w, j) in at)
    )  # fmt: skip
    with torch.no_grad():
        found = made.predict(model, batch, {"threshold": 1e9})[0]
    assert found["answer"] == LONG[best[1] : best[2] + 1] == LONG[found["start"] : found["end"]]
    assert found["score"] == pytest.approx(np.exp(best[0]), rel=1e-4)
    if no_answer:
        silent = sum(float(np.logaddexp.reduce([log[at[p]] for p in none])) for log in logs)
        assert found["none"] == pytest.approx(silent - best[0], rel=1e-4)
        with torch.no_grad():
            said = made.predict(model, batch, {"threshold": found["none"] - 0.01})[0]
        assert said["answer"] is None and said["best"] == found["answer"]


def test_hidden_tokens_leave_the_rest_as_it_is() -> None:
    made = fitted([row(LONG, ASKED, LONG[2:4])], hidden=0.3)
    example = made.encode(row(LONG, ASKED, LONG[2:4]))
    hidden = np.zeros(len(LONG))
    for i in range(400):
        noisy = made.augment(example, np.random.default_rng(i))
        changed = noisy["context"] != example["context"]
        assert (noisy["context"][changed] == made.codec.unk).all() and noisy["context"].dtype == np.int32
        assert all(np.array_equal(noisy[key], example[key]) for key in ("spans", "text", "overlap", "target"))
        hidden += changed
    assert np.abs(hidden / 400 - 0.3).max() < 0.1


def test_an_answer_longer_than_a_window_is_learned_from_its_ends() -> None:
    rows = [row(LONG, ASKED, LONG[5:35])]
    made = fitted(rows)
    model = Says(made, {LONG[5]: (9.0, 0.0), LONG[34]: (0.0, 9.0)})
    example = made.encode(rows[0])
    assert made.augment(example, np.random.default_rng(0))["windows"].tolist() == [5, 15]
    loss = made.loss(model, made.collate([example]))
    assert 0 < float(loss.total.detach()) < 0.5


def test_training_reads_a_window_with_the_answer_and_others_without() -> None:
    rows = [row(LONG * 2, ASKED, LONG[2:4]), row(LONG * 2, ASKED)]
    made = fitted(rows, no_answer=True, other_windows=1.5)
    answered, silent = (made.encode(r) for r in rows)
    counts, places = [], set()
    for i in range(100):
        starts = made.augment(answered, np.random.default_rng(i))["windows"].tolist()
        inside = [s for s in starts if s in (0, 1, 2)]
        assert len(inside) == 1 and all(s > 3 or s + 20 <= 2 for s in starts if s not in inside)
        counts.append(len(starts))
        places.update(inside)
        assert len(made.augment(silent, np.random.default_rng(i))["windows"]) in (2, 3)
    assert set(counts) == {2, 3} and 2.3 < np.mean(counts) < 2.7 and places == {0, 1, 2}


def test_answers_are_short_lie_within_the_passage_and_have_no_blanks_around_them() -> None:
    made = fitted([row("x ab cd y", "q z", "ab")], max_answer=3)
    table = {" ": (5.0, 5.0), "q": (9.0, 9.0), "x": (1.0, 0.0), "a": (0.0, 1.0)}
    batch = made.collate([made.encode({"context": "x ab cd y", "question": "q z"})])
    answer = made.predict(Says(made, table), batch, {})[0]
    assert answer["answer"] == "x ab cd y"[answer["start"] : answer["end"]].strip() == answer["answer"].strip()
    assert len(answer["answer"]) <= 3 and "q" not in answer["answer"]


def test_the_model_does_not_see_padding() -> None:
    """A row answers the same alone and beside one with more and longer windows (segments and overlap included)."""
    rows = [row(LONG, ASKED, LONG[3:4]), row(LONG[:9] + ASKED, ASKED, LONG[3:4])]
    made = fitted(rows)
    torch.manual_seed(0)
    model = made.model(TransformerConfig(d_model=16, num_layers=2, num_heads=2, max_length=64, segments=2)).eval()
    torch.nn.init.normal_(model.overlap.weight)
    examples = [made.encode(r) for r in rows]

    def scores(batch: Batch, i: int) -> Any:
        first, last = made._scores(model, batch)
        real = batch["lengths"][i] > 0
        return torch.stack((first[i], last[i]))[:, real].detach()

    together, alone = scores(made.collate(examples), 1), scores(made.collate(examples[1:]), 0)
    torch.testing.assert_close(together[..., : alone.shape[-1]], alone, rtol=1e-4, atol=1e-4)


# -- from a file to an answer ------------------------------------------------------------------------------------------


def nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """SQuAD's form, the questions of a passage together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for i, r in enumerate(rows):
        found.setdefault(r["context"], []).append({"id": f"q{i}", "question": r["question"], "answers": r["answers"]})
    passages = [{"context": context, "qas": qas} for context, qas in found.items()]
    return {"version": "1", "data": [{"title": "t", "paragraphs": [passage]} for passage in passages]}


def city_rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(80):
        chosen = rng.permutation(list(CITIES))[:3]
        context = f"第{i}天。" + "".join(f"{city}有{CITIES[city]}。" for city in chosen)
        rows += [row(context, f"{city}有什么？", CITIES[city], context.index(CITIES[city])) for city in chosen[:2]]
    return rows


def recipe_for(folder: Path, data: Path, **sections: Any) -> Path:
    values = {
        "task": "question-answering", "name": "t", "data": {"train": str(data), **sections.pop("rows", {})},
        "options": {"max_tokens": 48, "max_answer": 5},
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_length": 64, "dropout": 0.0},
        "train": {"steps": 120, "batch_size": 16, "threads": 1, "precision": "float32", "lr": 0.005},
        "evaluate": {"bootstrap": 50}, **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return path


def test_from_nested_json_to_a_served_answer(tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app

    data = tmp_path / "data.json"
    data.write_text(json.dumps(nested(city_rows()), ensure_ascii=False), "utf-8")
    run = train(recipe_for(tmp_path, data), run=tmp_path / "run", progress=False)
    parts = [{r["context"] for r in run.store(part).rows()} for part in ("valid", "test")]
    assert parts[0] and parts[1] and not parts[0] & parts[1]  # no passage in two parts
    assert run.evaluate(progress=False)["metrics"]["exact_match"]["value"] > 0.9
    body = {"question": "成都有什么？", "context": "第7天。西安有兵马俑。成都有大熊猫。杭州有西湖。"}
    assert run.predict([body])[0]["answer"] == "大熊猫"
    app = create_app([Served("qa", run.task, run.model)], run.recipe.serve)
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        reply = client.post("/v1/predict", json={"input": body})
        assert reply.status_code == 200, reply.text
        assert reply.json()["answers"][0] | {"score": 0} == {"answer": "大熊猫", "score": 0, "start": 14, "end": 17}
        refused = client.post("/v1/predict", json={"input": {"question": "成都有什么？"}})
        assert refused.status_code == 422 and "context" in refused.json()["error"]["message"]


FORMS = {
    "squad.json": json.dumps(nested([row("上海在东边", "哪里在东边", "上海", 0)])),
    "lines.jsonl": json.dumps(row("上海在东边", "哪里在东边", "上海", 0)) + "\n",
    "texts.jsonl": '{"passage": "上海在东边", "query": "哪里在东边", "answer": ["上海"], "start": 0}\n',
    "lists.jsonl": '{"context": "上海在东边", "question": "哪里在东边", "answers": {"text": ["上海"], '
                   '"answer_start": [0]}}\n',
    "table.csv": "问题,段落,答案\n哪里在东边,上海在东边,上海\n",
    "starts.csv": "question,context,answer,answer_start\n哪里在东边,上海在东边,上海,0\n",
    "cells.csv": 'question,context,answers\n哪里在东边,上海在东边,"[""上海""]"\n',
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_row(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text(FORMS[name], "utf-8")
    (found,) = open_rows("data", Kind.columns, base=tmp_path)
    assert (found["question"], found["context"], found["answers"][0]["text"]) == ("哪里在东边", "上海在东边", "上海")
    made = fitted([found])
    assert made.encode(found)["target"].tolist() == [0, 1]
    assert found.where == ("data:q0" if name == "squad.json" else f"data:{2 if name.endswith('csv') else 1}")


def test_passages_alone_serve_tasks_of_plain_text(tmp_path: Path) -> None:
    first, second = "第一段的文字", "第二段的文字"
    rows = [row(first, "问一", "文字"), row(first, "问二", "第一"), row(second, "问三", "第二")]
    (tmp_path / "data").write_text(json.dumps(nested(rows)), "utf-8")
    found = list(open_rows("data", task.find("text-generation").columns, base=tmp_path))
    assert [r["text"] for r in found] == [first, second]


GOOD = row("上海在东边", "哪里在东边", "上海", 0)
EAST = "上海在东边"


def after(bad: dict[str, Any]) -> dict[str, Any]:
    """Three good questions and a bad one."""
    return nested([GOOD] * 3 + [bad])


BROKEN: dict[str, tuple[Any, str]] = {
    "not in the passage": (after(row(EAST, "哪里在北边", "北京")), r"data:q3.*北京.*does not stand"),
    "beyond the passage": (after(row(EAST, "?", "北京", 99)), r"data:q3.*99 lies beyond its 5"),
    "no answer": (after(row(EAST, "哪里在北边")), r"data:q3.*no_answer=true"),
    "no question": (after(row(EAST, "", "上海")), r"data:q3.*'question' is empty"),
    "no context": (after(row("", "哪里", "上海")), r"data:q3.*'context' is empty"),
    "answers of another kind": (after(GOOD | {"answers": [{"start": 3}]}), r"data:q3.*should be an answer"),
    "a paragraph without qas": ({"data": [{"paragraphs": [{"context": "x"}]}]}, r"article 1, paragraph 1.*no 'qas'"),
    "qas of another kind": ({"data": [{"paragraphs": [{"context": "x", "qas": {}}]}]}, r"'qas' should be a list"),
    "an article without paragraphs": ({"data": [*nested([GOOD])["data"], {"title": "t"}]}, r"article 2.*'paragraphs'"),
    "a question that is a text": ({"data": [{"paragraphs": [{"context": "x", "qas": [1]}]}]}, r"question 1.*an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    data, told = BROKEN[name]
    (tmp_path / "data").write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    split = {"split": {"valid": 0, "test": 0}, "max_rejected": 0, "deduplicate": False}
    recipe = recipes.load(recipe_for(tmp_path, tmp_path / "data", rows=split), find=task.find)
    with pytest.raises(UserError, match=told):
        prepare.prepare(recipe, prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run"))


def test_a_text_that_stands_nowhere_is_measured_on_but_not_learned_from(tmp_path: Path) -> None:
    rows = [row(f"第{i}天上海在东边", "哪里在东边", "上海") for i in range(20)]
    (tmp_path / "train").write_text(json.dumps(nested(rows)), "utf-8")
    (tmp_path / "test").write_text(json.dumps(nested([row("上海在东边", "哪里", "沪")])), "utf-8")
    where = {"test": str(tmp_path / "test"), "split": {"valid": 0.1, "test": 0}}
    recipe = recipes.load(recipe_for(tmp_path, tmp_path / "train", rows=where), find=task.find)
    report = prepare.prepare(recipe, prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run"))
    assert report["parts"]["test"]["rows"] == report["parts"]["test"]["not_in_passage"] == 1
    assert report["rejected"]["count"] == 0


def test_windows_without_room_or_beyond_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="leaves no room"):
        fitted([row(LONG, LONG, "x")], max_question=30).encode(row(LONG, LONG))
    with pytest.raises(UserError, match=r"beyond model\.max_length 16"):
        fitted([row(LONG, ASKED)]).model(TransformerConfig(d_model=16, num_heads=2, max_length=16))
