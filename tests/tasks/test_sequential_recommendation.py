"""sequential-recommendation: logs become histories without a leak, and histories become lists."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.data import fastlog
from multihead.data.interactions import EVENTS, RATING, Filters, Log
from multihead.data.rows import open_rows
from multihead.data.store import Store
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.tasks.recommendation._next_item import NextItem, gap_kinds, gbce
from multihead.tasks.recommendation.sequential_recommendation import SequentialRecommendation
from multihead.train import train
from multihead.transformer.config import TransformerConfig

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_length": 8, "dropout": 0.0, "positions": "rotary"}
LOG = ("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in [
    ("b", "x", 4), ("a", "x", 1), ("a", "z", 3), ("a", "y", 2), ("b", "y", 6), ("b", "z", 5), ("a", "w", 9),
    ("b", "w", 7), ("c", "x", 1), ("c", "y", 8)]))  # fmt: skip


def prepared(tmp_path: Path, text: str | bytes, name: str = "log.csv", **sections: Any) -> tuple[Any, RunFolder, dict]:
    """A log, prepared: the task, the run folder and the data report."""
    data = tmp_path / name
    data.write_bytes(text if isinstance(text, bytes) else text.encode())
    values = {"task": "sequential-recommendation", "name": "rec", "model": TINY, **sections}
    values["data"] = {"train": str(data), **sections.get("data", {})}
    values["options"] = {"max_items": 8, **sections.get("options", {})}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    recipe = recipes.load(path, find=task.find)
    made, folder = prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run")
    return made, folder, prepare.prepare(recipe, made, folder)


def rows(made: Any, folder: RunFolder, part: str) -> dict[str, tuple[list[str], str | None]]:
    """user or place → (history, next item) of a part, read back from its store."""
    store = Store(folder.file(f"data/{part}"))
    found = {}
    for i in range(len(store)):
        example, item = store[i], int(store[i]["item"])
        user = json.loads(bytes(example["note"]))["user"]
        history = [made.codec.decode(n) for n in example["history"]]
        found[user] = (history, made.codec.decode(item) if item >= 0 else None)
    return found


# -- from a log to parts -----------------------------------------------------------------------------------------------


def test_leave_one_out_of_an_unsorted_log(tmp_path: Path) -> None:
    made, folder, report = prepared(tmp_path, LOG)
    assert rows(made, folder, "train") == {"b": (["x"], "z"), "a": (["x"], "y"), "c": (["x"], "y")}
    assert rows(made, folder, "valid") == {"b": (["x", "z"], "y"), "a": (["x", "y"], "z")}
    # w was never seen in training: it is a miss, and has no number.
    assert rows(made, folder, "test") == {"b": (["x", "z", "y"], None), "a": (["x", "y", "z"], None)}
    assert report["rejected"]["count"] == 0 and "3 users, 4 items, 10 interactions" in report["reading"]["train"][1]


def test_by_time_nothing_of_a_later_period_is_learned_or_read(tmp_path: Path) -> None:
    log = "user,item,time\n" + "".join(f"u{u},i{(u + t) % 7},{10 * t + u}\n" for t in range(10) for u in range(5))
    made, folder, _ = prepared(tmp_path, log, data={"split": {"by": "time", "valid": 0.2, "test": 0.2}})
    for user, (history, _) in rows(made, folder, "train").items():
        assert len(history) == 5, user  # of ten moments the first six: five, and the one that came next
    for part, known in (("valid", 6), ("test", 8)):
        found = rows(made, folder, part)
        assert len(found) == 5
        assert all(history == [f"i{(int(u[1:]) + t) % 7}" for t in range(known)] for u, (history, _) in found.items())
        assert all(item == f"i{(int(u[1:]) + known) % 7}" for u, (_, item) in found.items())


@pytest.mark.parametrize("name, text", [
    ("log.jsonl", '{"uid": 1, "product": "a", "ts": "2024-01-02"}\n'
                  '{"uid": "1", "product": "b", "ts": "2024/1/3 5:00"}\n'
                  '{"uid": 1.0, "product": "c", "ts": "2024-02-01T00:00:00Z"}\n'),
    ("log.csv", "时间,用户ID,商品\n3,1,c\n1,1,a\n2,1,b\n"),
    ("ratings.dat", "1::c::5::978300763\n1::a::3::978300761\n1::b::4::978300762\n"),
    ("u.data", "1\tb\t3\t881250942\n1\ta\t3\t881250941\n1\tc\t3\t881250949\n"),
    ("lists.txt", "1 a b c\n"),
    ("lists.jsonl", '{"user": 1, "items": ["a", "b", "c"]}\n'),
    ("log.txt.gz", gzip.compress(b"1 a b c\n", mtime=0)),
])  # fmt: skip
def test_forms_of_logs(tmp_path: Path, name: str, text: str | bytes) -> None:
    made, folder, _ = prepared(tmp_path, text, name, data={"split": {"valid": 0, "test": 0}})
    assert rows(made, folder, "train") == {"1": (["a", "b"], "c")}


def test_lines_of_items_alone_where_lines_begin_alike(tmp_path: Path) -> None:
    made, folder, _ = prepared(tmp_path, "a b c\na c b\nb a c\n", "s.txt", data={"split": {"valid": 0, "test": 0}})
    assert rows(made, folder, "train") == {"1": (["a", "b"], "c"), "2": (["a", "c"], "b"), "3": (["b", "a"], "c")}


def test_ids_are_texts_of_any_size(tmp_path: Path) -> None:
    big = 2**64 + 12345
    log = "".join(json.dumps({"user": u, "item": i, "time": t}) + "\n"
                  for t, (u, i) in enumerate([(big, 1), (str(big), "1"), (big, -(2**70)), (big, "一 二")]))  # fmt: skip
    made, folder, _ = prepared(tmp_path, log, "l.jsonl", data={"split": {"valid": 0, "test": 0}})
    assert rows(made, folder, "train") == {str(big): (["1", "1", str(-(2**70))], "一 二")}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    log = "user,item,time,rating\n" + "".join(
        f"{u},{i},{t},{r}\n" for u, i, t, r in
        [(1, "a", 1, 5), (1, "a", 1, 5), (1, "b", 2, 1), (1, "b", 3, 4), (1, "b", 4, 4), (1, "c", 5, 5), (2, "a", 1, 5)]
    )  # fmt: skip
    options = {"min_rating": 3, "repeats": "merge", "min_actions": 2}
    made, folder, report = prepared(tmp_path, log, options=options, data={"split": {"valid": 0, "test": 0}})
    assert rows(made, folder, "train") == {"1": (["a", "b"], "c")}
    said = "\n".join(report["reading"]["train"])
    assert "exact copies: 1 " in said and "min_rating: 1 " in said and "repeats (options.repeats): 1 " in said
    assert "too few (options.min_actions, min_users): 1 " in said


def test_what_is_odd_in_a_log_is_said_and_counted(tmp_path: Path) -> None:
    """Unsorted, with copies, one-item users, ratings as text that nobody asked for, ids of mixed types beyond 2⁶⁴."""
    big = str(2**64 + 1)
    lines = [("b", big, 9, "good"), ("a", "7", 5, "ok"), ("a", "x", 3, "bad"), ("b", "x", 2, ""), ("a", "7", 5, "ok"),
             ("solo", "x", 1, "5"), ("a", big, 8, "1"), ("b", "7", 4, "n/a")]  # fmt: skip
    text = "user,item,time,rating\n" + "".join(",".join(map(str, line)) + "\n" for line in lines)
    made, folder, report = prepared(tmp_path, text, data={"split": {"valid": 0}})
    assert rows(made, folder, "train") == {"b": (["x"], "7"), "a": (["x"], "7"), "solo": ([], "x")}
    assert rows(made, folder, "test") == {"b": (["x", "7"], None), "a": (["x", "7"], None)}  # new to training: a miss
    said = "\n".join(report["reading"]["train"])
    assert "exact copies: 1 " in said and "fewer than 3: 1 users" in said and report["rejected"]["count"] == 0
    (tmp_path / "untimed").mkdir()
    untimed = "user,item\n" + "".join(f"{u},{i}\n" for u, i, *_ in lines)
    *_, report = prepared(tmp_path / "untimed", untimed, data={"split": {"valid": 0}})
    assert any("no times: the order of the file" in line for line in report["reading"]["train"])


def test_a_part_of_its_own_holds_users_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("user,item\nq,x\nq,y\nr,y\n")
    made, folder, _ = prepared(tmp_path, LOG, data={"test": str(tmp_path / "test.csv")})
    assert rows(made, folder, "test") == {"q": (["x"], "y"), "r": ([], "y")}
    assert rows(made, folder, "valid")["a"] == (["x", "y", "z"], None)
    assert rows(made, folder, "train")["a"] == (["x", "y"], "z")


@pytest.mark.parametrize("text, sections, words", [
    ("user,price\n1,2\n", {}, "'item'"),
    ("user,item,rating\n1,a,good\n2,b,bad\n", {"options": {"min_rating": 3}}, "'rating'"),
    ("user,item,time\n" + "1,a,3\n" * 5 + "2,b,soon\n", {}, "soon"),
    ("user,item,time\n" + "1,a,3\n" * 5 + "2,b,\n", {}, "no time, though others do"),
    ("user,item\n1,a\n1,b\n1,c\n", {"data": {"split": {"by": "time"}}}, "no time column"),
    ("user,item\n1,a\n2,b\n", {}, "none of 2 users has enough"),
    ("user,item\n1,a\n1,a\n1,a\n1,a\n", {}, "two at least"),
    ("user,item\n1,a\n1,b\n1,c\n", {"options": {"min_users": 2}}, "none of 3 interactions is left"),
    ("user,item\n", {}, "no row below"),
    ("", {}, "empty"),
    ("1 5 978300761\n1 6 978300762\n2 5 978300763\n", {}, "data.delimiter"),
    (LOG, {"options": {"features": ["brand"]}}, "options.items"),
    (LOG, {"options": {"max_items": 9}}, "max_length 8"),
    ("user,item\n1,a\n1,b\n1,c\n", {"options": {"gaps": True}}, "options.gaps asks for times"),
])  # fmt: skip
def test_broken_logs_say_what_and_where(tmp_path: Path, text: str, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, text, **sections)
    assert any(words in str(problem) for problem in caught.value.problems), caught.value.problems
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_task_whose_lines_are_rows_cannot_be_cut_by_user(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"good {i},{i % 2}\n" for i in range(30)))
    path = tmp_path / "r.yaml"
    path.write_text(f"task: text-classification\ndata: {{train: {tmp_path / 't.csv'}, split: {{by: last}}}}\n")
    recipe = recipes.load(path, find=task.find)
    with pytest.raises(UserError, match="no interactions"):
        prepare.prepare(recipe, prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run"))


# -- learning ----------------------------------------------------------------------------------------------------------


def fitted(**options: Any) -> SequentialRecommendation:
    """A task that knows the items 0 … 9, 0 the most popular."""
    made = SequentialRecommendation(SequentialRecommendation.Options(max_items=8, **options))
    made.fit([{"history": [str(i)] * (9 - i), "item": str(i)} for i in range(10)])
    return made


def model_of(made: SequentialRecommendation, seed: int = 0) -> NextItem:
    torch.manual_seed(seed)
    return made.model(TransformerConfig(**TINY)).eval()  # type: ignore[arg-type]


def test_long_histories_are_cut_so_that_every_item_is_foretold_once(tmp_path: Path) -> None:
    lengths = [2, 3, 5, 9, 11, 1]
    log = "user,item\n" + "".join(f"u{n},{n}.{i}\n" for n, most in enumerate(lengths) for i in range(most))
    made, folder, _ = prepared(tmp_path, log, options={"max_items": 4}, data={"split": {"valid": 0, "test": 0}})
    slices = made.examples(Store(folder.file("data/train")), "train")
    told = [[made.codec.decode(i) for i in slices[n]["items"]] for n in range(len(slices))]
    assert all(2 <= len(one) <= 5 for one in told) and slices.lengths("items").tolist() == [len(one) for one in told]
    everything = sorted(f"{n}.{i}" for n, most in enumerate(lengths) for i in range(1, most))
    assert sorted(name for one in told for name in one[1:]) == everything


def test_what_comes_later_changes_nothing_before_it() -> None:
    made = fitted()
    model = model_of(made)
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    torch.testing.assert_close(model(a)[0][:, :3], model(b)[0][:, :3])


def test_the_loss_is_cross_entropy_over_all_items_at_every_place() -> None:
    made = fitted()
    model = model_of(made)
    batch = made.collate([{"items": np.array(ids, np.int32)} for ids in ([1, 2, 3], [4, 5])])
    expected = torch.tensor(0.0)
    for ids in ([1, 2, 3], [4, 5]):
        x, table = model(torch.tensor([ids[:-1]]))
        expected = expected + torch.nn.functional.cross_entropy(x[0] @ table.T, torch.tensor(ids[1:]), reduction="sum")
    found = made.loss(model, batch)
    torch.testing.assert_close(found.total, expected)
    assert found.count == 3


def test_gbce_over_all_items_is_plain_binary_cross_entropy() -> None:
    made = fitted(loss="gbce", negatives=9, calibration=0.4)  # all others are drawn: nothing to correct
    model = model_of(made)
    batch = made.collate([{"items": np.array([3, 5, 1], np.int32)}])
    x, table = model(torch.tensor([[3, 5]]))
    scores = (x[0] @ table.T).detach()
    # Nine of ten items are drawn, so the right one may be among them: then eight others count.
    totals = []
    for skipped in range(10):
        kept = [i for i in range(10) if i != skipped]
        truth = torch.zeros(2, 10)
        truth[0, 5] = truth[1, 1] = 1
        terms = torch.nn.functional.binary_cross_entropy_with_logits(scores, truth, reduction="none")
        always = terms[0, 5] + terms[1, 1]
        others = sum(terms[n, i] for n, right in ((0, 5), (1, 1)) for i in kept if i != right)
        totals.append(float(always + others) / 10)
    assert any(abs(float(made.loss(model, batch).total.detach()) - total) < 1e-5 for total in totals)


def test_calibration_weighs_the_right_item_by_beta() -> None:
    x, table = torch.zeros(1, 16), torch.zeros(10, 16)  # every score 0: every term ln 2
    found = float(gbce(x, table, torch.tensor([4]), negatives=3, calibration=1.0)) * 4 / np.log(2)
    alpha = 3 / 9
    beta = alpha * (1.0 * (1 - 1 / alpha) + 1 / alpha)  # with t = 1: alpha
    assert min(abs(found - (beta + n)) for n in (2, 3)) < 1e-5 and beta == pytest.approx(alpha)


def test_the_bidirectional_form_reads_both_sides_and_no_padding() -> None:
    made = fitted(form="bidirectional", hidden=0.5)
    model = model_of(made)
    hidden = len(made.codec)
    a, b = torch.tensor([[1, hidden, 3]]), torch.tensor([[1, hidden, 4]])
    assert not torch.allclose(model(a)[0][:, 1], model(b)[0][:, 1], atol=1e-4)
    padded = torch.tensor([[1, hidden, 3, 0, 0]])
    torch.testing.assert_close(model(padded, None, torch.tensor([3]))[0][:, :3], model(a)[0])
    assert model(a)[1].shape == (10, 16)  # what is hidden is no item and is never foretold
    example = made.augment({"items": np.array([1, 2, 3, 4, 5], np.int32)}, np.random.default_rng(0))
    covered = example["items"] == hidden
    assert covered.any() and (example["targets"][~covered] == -1).all()
    assert example["targets"][covered].tolist() == (np.flatnonzero(covered) + 1).tolist()
    batch = made.collate([example, {"items": np.array([7, hidden], np.int32), "targets": np.array([-1, 8], np.int32)}])
    expected = torch.tensor(0.0)
    for ids, targets in ((example["items"], example["targets"]), ([7, hidden], [-1, 8])):
        x, table = model(torch.tensor([list(ids)]))
        places = torch.tensor(list(targets)) >= 0
        right = torch.tensor(list(targets))[places].long()
        expected = expected + torch.nn.functional.cross_entropy(x[0][places] @ table.T, right, reduction="sum")
    found = made.loss(model, batch)
    torch.testing.assert_close(found.total, expected)
    assert found.count == int(covered.sum()) + 1
    # An answer hides one more item behind the last ones: of a long history seven are read.
    assert made.collate([made.encode({"history": list("0123456789")})])["recent"].tolist() == [[*range(3, 10), 10]]
    assert answer(made, model, {"history": ["1"]}, k=20)["basis"] == "history"


def test_gaps_are_kinds_of_time_and_reach_the_model(tmp_path: Path) -> None:
    assert gap_kinds([]).tolist() == [] and gap_kinds([5.0]).tolist() == [0]
    day = 86400.0
    assert gap_kinds([0, 0, 1, 3, 3 + day, 2.0, None, 9, 1e300]).tolist() == [0, 1, 2, 2, 17, 1, 0, 0, 31]
    made, folder, _ = prepared(tmp_path, LOG, options={"gaps": True}, data={"split": {"valid": 0, "test": 0}})
    store = Store(folder.file("data/train"))
    found = {json.loads(bytes(store[i]["note"]))["user"]: store[i]["gaps"].tolist() for i in range(len(store))}
    assert found == {"b": [0, 1 + 1, 1 + 1], "a": [0, 2, 2], "c": [0]}
    slices = made.examples(store, "train")
    assert all(len(s["gaps"]) == len(s["items"]) - 1 for s in (slices[i] for i in range(len(slices))))
    model = model_of(made)
    torch.nn.init.normal_(model.input.gap.weight)  # type: ignore[union-attr]
    asked = {"history": ["x", "new", "y"], "times": ["1970-01-01", "5", "1970-01-03"]}
    assert made.encode(asked)["gaps"].tolist() == [0, 18]
    near = answer(made, model, asked | {"times": [0, 1, 2]}, k=3, seen="keep")
    assert near["items"] != answer(made, model, asked, k=3, seen="keep")["items"]
    for times, words in (([1], "each item"), ([1, 2, "soon"], "soon")):
        with pytest.raises(UserError, match=words):
            made.encode(asked | {"times": times})


@pytest.mark.parametrize("options, words", [
    ({"gaps": True, "form": "bidirectional"}, "causal"), ({"max_items": 1, "form": "bidirectional"}, "2 or more"),
])  # fmt: skip
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SequentialRecommendation(SequentialRecommendation.Options(**options))


def test_the_table_is_kept_while_the_weights_stay(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("id,title,brand\n0,Zero,A|B\n1,One,A\n2,Two,\n")
    made = fitted(items=str(tmp_path / "items.csv"), features=("brand",))
    model = model_of(made)
    with torch.no_grad():
        first = model.input.table()
        assert model.input.table() is first
        model.input.feature.weight.add_(1)  # type: ignore[union-attr]
        torch.testing.assert_close(model.input.table()[1] - first[1], torch.ones(16))
    assert model.input.table().requires_grad


def test_features_are_part_of_an_item_where_it_is_read_and_where_it_is_foretold(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("id,title,brand\n0,Zero,A|B\n1,One,A\n2,Two,\n")
    made = fitted(items=str(tmp_path / "items.csv"), features=("brand",))
    assert made.codec.feature_names == ["brand=A", "brand=B"] and made.codec.shown(0) == {"id": "0", "title": "Zero"}
    model = model_of(made)
    own, table = model.input.token.weight, model.input.table()
    vectors = model.input.feature.weight
    torch.testing.assert_close(table[0] - own[0], vectors.mean(0))
    torch.testing.assert_close(table[1] - own[1], vectors[0])
    torch.testing.assert_close(table[2:], own[2:])
    torch.testing.assert_close(model.input.read(torch.tensor([[1]]), table)[0, 0],
                               table[1] + (model.input.position.weight[0] if model.input.position else 0))


def test_attributes_of_a_json_object_are_features(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"0": [5, 6], "1": [5], "77": [9]}))
    made = fitted(items=str(tmp_path / "a.json"), features=("attributes",))
    assert made.codec.feature_names == ["attributes=5", "attributes=6"] and made.codec.features[:3] == [[0, 1], [0], []]


@pytest.mark.parametrize("text, features, words", [
    ("id,title\na,b\n", [], "none of the 10 items"),
    ("id,title\n0,b\n", ["brnd"], "no column 'brnd'"),
])  # fmt: skip
def test_items_files_that_do_not_go_with_the_log(tmp_path: Path, text: str, features: list[str], words: str) -> None:
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        fitted(items=str(tmp_path / "items.csv"), features=tuple(features))


# -- answering ---------------------------------------------------------------------------------------------------------


def answer(made: SequentialRecommendation, model: NextItem, row: dict[str, Any], **ask: Any) -> dict[str, Any]:
    return made.predict(model, made.collate([made.encode(row)]), ask)[0]


def ids(found: dict[str, Any]) -> list[str]:
    return [item["id"] for item in found["items"]]


def test_seen_and_excluded_items_are_dropped_and_unknown_ones_named() -> None:
    made = fitted()
    model = model_of(made)
    found = answer(made, model, {"history": [1, "2", "new", 2**70], "exclude": ["3", "?"], "user": 5}, k=10)
    assert set(ids(found)) == set("0456789") and found["unknown"] == ["new", str(2**70), "?"]
    assert found["user"] == "5" and found["basis"] == "history"
    scores = [item["score"] for item in found["items"]]
    assert scores == sorted(scores, reverse=True)
    kept = answer(made, model, {"history": ["1", "2"]}, k=10, seen="keep")
    assert len(ids(kept)) == 10 and sum(item["score"] for item in kept["items"]) == pytest.approx(1, abs=1e-4)
    assert ids(answer(made, model, {"history": ["1", "2"]}, k=3)) == [i for i in ids(kept) if i not in "12"][:3]


def test_who_has_no_history_gets_what_is_popular() -> None:
    made = fitted()
    model = model_of(made)
    for history in ([], ["never seen"]):
        found = answer(made, model, {"history": history}, k=4)
        assert found["basis"] == "popularity" and ids(found) == ["0", "1", "2", "3"]


def test_only_the_last_items_are_read_but_all_are_seen() -> None:
    made = fitted()
    model = model_of(made)
    long = [str(i % 10) for i in range(19)]
    assert ids(answer(made, model, {"history": long}, k=10)) == []
    a, b = (answer(made, model, {"history": h}, k=10, seen="keep") for h in (long, long[-8:]))
    assert a["items"] == b["items"]


def test_a_text_of_several_ids_is_a_history() -> None:
    made = fitted()
    model = model_of(made)
    assert answer(made, model, {"history": "1 2,3"}) == answer(made, model, {"history": ["1", "2", "3"]})
    assert answer(made, model, {"history": ["one id"]})["unknown"] == ["one id"]


@pytest.mark.parametrize("row, ask, words", [
    ({}, {}, "no 'history'"), ({"user": "9"}, {}, "options.remember"), ({"history": [{}]}, {}, "list of ids"),
    ({"history": [None]}, {}, "list of ids"), ({"history": ["1"]}, {"k": 0}, "1 to 1000"),
    ({"history": ["1"]}, {"k": 2.5}, "whole number"), ({"history": ["1"]}, {"seen": "no"}, "drop or keep"),
])  # fmt: skip
def test_requests_that_cannot_be_answered(row: dict[str, Any], ask: dict[str, Any], words: str) -> None:
    made = fitted()
    with pytest.raises(UserError, match=words):
        answer(made, model_of(made), row, **ask)


def test_an_item_that_training_never_saw_is_a_miss() -> None:
    made = fitted()
    model = model_of(made)
    rows = [{"history": ["1"], "item": "never"}, {"history": ["1"], "item": "2"}]
    found = made.predict(model, made.collate([made.encode(row) for row in rows]), {"evaluate": True})
    assert found[0]["rank"] is None and found[0]["tied"] == 0 and found[1]["rank"] is not None
    assert found[1]["candidates"] == 9
    assert made.score(found[:1], rows[:1])["mrr"] == 0
    both, one = made.score(found, rows), made.score(found[1:], rows[1:])
    assert both["mrr"] == pytest.approx(one["mrr"] / 2)
    weighted = made.score(found, rows, weights=np.array([[0.0, 2.0], [1.0, 1.0]]))
    assert weighted["mrr"] == pytest.approx([one["mrr"], both["mrr"]])


def test_a_round_is_learned_served_and_remembered(tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app

    log = "user,item,time\n" + "".join(f"u{u},i{(u + t) % 9},{t}\n" for u in range(30) for t in range(6))
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text("itemId,title\n" + "".join(f"i{i},Film {i}\n" for i in range(9)))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "task": "sequential-recommendation", "data": {"train": "log.csv"}, "model": TINY,
        "options": {"max_items": 8, "items": "items.csv", "remember": True},
        "train": {"steps": 120, "batch_size": 30, "lr": 0.01, "threads": 1, "precision": "float32"},
        "evaluate": {"bootstrap": 20}}))  # fmt: skip
    run = train(path, run=tmp_path / "run", progress=False)
    figures = run.evaluate(progress=False)["metrics"]
    assert figures["ndcg@10"]["value"] > 0.95 and figures["coverage@10"]["value"] == 1
    with testclient.TestClient(create_app([Served("rec", run.task, run.model)]), base_url="http://127.0.0.1") as client:
        body = {"input": {"history": ["i3", "i4", "zzz"], "exclude": ["i6"]}, "k": 2}
        reply = client.post("/v1/predict", json=body).json()["answers"][0]
        assert reply["items"][0]["id"] == "i5" and reply["items"][0]["title"] == "Film 5" and len(reply["items"]) == 2
        assert reply["unknown"] == ["zzz"]
        known = client.post("/v1/predict", json={"input": {"user": "u1"}, "k": 1}).json()["answers"][0]
        assert known["user"] == "u1" and ids(known) == ["i7"]  # i1 … i6, the test's item among them, are its history
        new = client.post("/v1/predict", json={"input": {"user": "nobody"}, "k": 3}).json()["answers"][0]
        assert new["basis"] == "popularity" and new["unknown_user"] == "nobody" and len(ids(new)) == 3
        for bad, words in (({"history": [True]}, "list of ids"), ({}, "history")):
            refused = client.post("/v1/predict", json={"input": bad})
            assert refused.status_code == 422 and words in refused.text, refused.text
        assert client.post("/v1/predict", json={"input": {"history": []}, "k": 0}).status_code == 422
    assert run.predict(["i3 i4"], k=1)[0]["items"][0]["id"] == "i5"


# -- large logs --------------------------------------------------------------------------------------------------------


def read(path: Path, large: int, min_rating: float | None = None) -> Log:
    log = Log(open_rows(str(path), [*EVENTS, *([RATING] if min_rating is not None else [])]), Filters(min_rating))
    log.large = large
    return log.read()


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.csv.gz", "log.parquet"])
def test_whole_columns_are_read_as_row_by_row(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    held = [(f"u{u}", int(i), 10**9 + int(t), r / 2) for u, i, t, r in rng.integers(50, size=(2000, 4)).tolist()]
    path = tmp_path / name
    if name.endswith("parquet"):
        columns = dict(zip(("user", "item", "time", "rating"), zip(*held, strict=True), strict=True))
        pq.write_table(pa.table(columns), path)
    else:
        sign = "\t" if "tsv" in name else ","
        lines = [sign.join(map(str, row)) for row in [("user", "item", "time", "rating"), *held]]
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    monkeypatch.setattr(fastlog, "BLOCK", 4096)
    fast = read(path, 0, 9)
    monkeypatch.setattr(Log, "_row_by_row", lambda self: pytest.fail("read row by row"))
    read(path, 0, 9)
    monkeypatch.undo()
    slow = read(path, 1 << 40, 9)
    assert (fast.users, fast.items, fast.count, fast.left_out) == (slow.users, slow.items, slow.count, slow.left_out)
    assert np.array_equal(fast.item, slow.item) and np.array_equal(fast.starts, slow.starts)
    assert fast.time is not None and slow.time is not None and np.array_equal(fast.time, slow.time)


@pytest.mark.parametrize("line", ["u1,,5", "u1,7", "u1,7,soon", ",7,5", "u1,7,5,6", "u1,[7],5", "u1,7,2024-01-02"])
def test_whatever_is_irregular_is_read_row_by_row(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n" + "u1,8,3\nu2,9,4\n" * 20 + line + "\n")
    fast, slow = read(path, 0), read(path, 1 << 40)
    assert [str(p) for p in fast.rejected] == [str(p) for p in slow.rejected]
    assert (fast.users, fast.items, fast.count) == (slow.users, slow.items, slow.count)
    assert fast.rejected_count == (0 if line in ("u1,[7],5", "u1,7,2024-01-02") else 1)
