"""click-through-rate: a table becomes fields, fields a probability, and many items of a request one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.codec.fields import MISSING, UNSEEN, FieldCodec, Sizes
from multihead.data.store import Store
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.tasks.recommendation._fields import WIDE, ClickModel, FieldTable, Pairs
from multihead.tasks.recommendation._importance import importance
from multihead.train import train
from multihead.transformer.config import TransformerConfig

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
USERS = "1::F::25\n2::M::40\n3::F::31\n4::M::18\n"
ITEMS = "id,title,genres,price\nx,Old Film,Drama|War,3.5\ny,New Film,Drama,\nz,Other,Comedy,12\n"


def log(rows: int = 60) -> str:
    """Women click on x, men on y; the hour is noise."""
    rng = np.random.default_rng(0)
    lines = ["user,item,hour,rating"]
    for i in range(rows):
        user, item = 1 + i % 4, "xyz"[int(rng.integers(3))]
        likes = item == "x" if user in (1, 3) else item == "y"
        lines.append(f"{user},{item},{rng.integers(24)},{5 if likes else 2}")
    return "\n".join(lines) + "\n"


def recipe_of(tmp_path: Path, text: str, **sections: Any) -> Path:
    (tmp_path / "log.csv").write_text(text, "utf-8")
    (tmp_path / "users.dat").write_text(USERS, "utf-8")
    (tmp_path / "items.csv").write_text(ITEMS, "utf-8")
    values = {"task": "click-through-rate", "name": "ctr", "model": TINY, **sections}
    values["data"] = {"train": str(tmp_path / "log.csv"), **sections.get("data", {})}
    values["options"] = {"min_count": 1, **sections.get("options", {})}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def prepared(tmp_path: Path, text: str, **sections: Any) -> tuple[Any, RunFolder, dict[str, Any]]:
    path = recipe_of(tmp_path, text, **sections)
    recipe = recipes.load(path, find=task.find)
    made, folder = prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run")
    return made, folder, prepare.prepare(recipe, made, folder)


TABLES = {"threshold": 4, "users": "users.dat", "user_columns": {"gender": 2, "age": 3}, "items": "items.csv"}


# -- fields ------------------------------------------------------------------------------------------------------------


def test_kinds_are_guessed_from_names_and_values() -> None:
    rows = [{"user": str(i % 7), "site_id": str(i % 5), "price": f"{i * 1.5}", "tags": "a|b" if i % 2 else "c",
             "day": f"2024-03-{1 + i % 28:02}", "about": f"some words number{i}", "colour": "red" if i % 3 else "blue",
             "same": "1", "many": ["p", "q"]} for i in range(300)]
    codec = FieldCodec.fit(rows, list(rows[0]), {}, Sizes())
    assert {f.name: f.kind for f in codec.fields} == {
        "user": "categorical", "site_id": "categorical", "price": "numeric", "tags": "multi", "day": "time",
        "about": "words", "colour": "categorical", "same": "ignore", "many": "multi"}  # fmt: skip


def test_values_are_known_rare_missing_or_never_seen_and_come_back_from_the_file(tmp_path: Path) -> None:
    rows = [{"c": v} for v in ["a"] * 5 + ["b"] * 3 + ["once", "twice", "twice"]]
    codec = FieldCodec.fit(rows, ["c"], {}, Sizes(min_count=3, buckets=2))
    about = codec.fields[0]
    assert about.values == ["a", "b"] and sorted(about.rare) == ["once", "twice"]
    assert sum(about.counts) == len(rows) and about.counts[:2] == [0, 0]
    codec.save(tmp_path)
    for held in (codec, FieldCodec.load(tmp_path)):
        placed = {v: (int(held.encode({"c": v})[0]["one"][0]), held.encode({"c": v})[1]) for v in
                  ("a", "b", "once", "new", "", None)}
        assert placed["a"] == (4, []) and placed["b"] == (5, [])
        assert placed["once"][0] in (2, 3) and placed["once"][1] == []
        assert placed["new"] == (UNSEEN, ["c"]) and placed[""] == placed[None] == (MISSING, [])


def test_a_quantity_is_encoded_piece_by_piece_as_published() -> None:
    """Gorishniy et al. 2022, eq. 1: 1 for the pieces below, the share of its own piece, 0 above."""
    rng = np.random.default_rng(0)
    values = rng.exponential(size=400)
    codec = FieldCodec.fit([{"x": v} for v in values], ["x"], {}, Sizes(bins=6))
    edges = np.array(codec.fields[0].edges)
    assert len(edges) == 7 and np.histogram(values, edges)[0].min() >= 60
    table = FieldTable(codec, 6, 0.0)
    with torch.no_grad():
        table.piece.copy_(torch.eye(6)[None])
    for x in (0.0, 0.3, 1.7, float(values.max()) * 2):
        encoded, _ = codec.encode({"x": x})
        found = table(torch.zeros(1, 0).long(), torch.zeros(1, 0).long(), torch.zeros(1).long(),
                      torch.from_numpy(encoded["quantity"])[None])[0, 0]
        right = np.clip((x - edges[:-1]) / np.diff(edges), 0, 1)
        np.testing.assert_allclose(found.detach().numpy(), right, atol=1e-5)
    assert np.isnan(codec.encode({"x": "n/a"})[0]["quantity"]).all()


def test_pairs_with_equal_weights_are_a_factorization_machine() -> None:
    """Rendle 2010, lemma 3.1: the sum over pairs is half of the squared sum less the sum of squares."""
    rows = [{"a": str(i % 3), "b": f"{i % 5}|{i % 2}", "c": i * 0.5} for i in range(40)]
    codec = FieldCodec.fit(rows, ["a", "b", "c"], {"a": "categorical", "b": "multi"}, Sizes(min_count=1))
    pairs = Pairs(codec, 5)
    encoded = [codec.encode(row)[0] for row in rows]
    several = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(e["several"]).long() for e in encoded], True)
    batch = (torch.from_numpy(np.stack([e["one"] for e in encoded])).long(), several,
             torch.tensor([len(e["several"]) for e in encoded]),
             torch.from_numpy(np.stack([e["quantity"] for e in encoded])))
    v = pairs.table(*batch)
    right = (v.sum(1).square() - v.square().sum(1)).sum(-1) / 2
    torch.testing.assert_close(pairs(*batch), right)
    own = [pairs.table.value.weight[several[i, :n]].mean(0) for i, n in enumerate(batch[2])]
    torch.testing.assert_close(v[:, 1], torch.stack(own))


# -- tables and labels -------------------------------------------------------------------------------------------------


def test_each_member_is_the_model_of_its_own_vectors_and_they_are_averaged() -> None:
    rows = [{"user": u, "item": i, "price": p, "tags": t} for u, i, p, t in
            (("a", "x", 1.0, "p|q"), ("b", "y", 2.0, "q"), ("a", "y", 4.0, "p|r"), ("c", "x", 8.0, "r"))]  # fmt: skip
    codec = FieldCodec.fit(rows, ("user", "item", "price", "tags"), {}, Sizes(min_count=1))
    encoded = [codec.encode(row)[0] for row in rows]
    several = [torch.from_numpy(one["several"]).long() for one in encoded]
    batch = (torch.tensor(np.array([one["one"] for one in encoded])).long(),
             torch.nn.utils.rnn.pad_sequence(several, batch_first=True), torch.tensor([len(s) for s in several]),
             torch.tensor(np.array([one["quantity"] for one in encoded])))  # fmt: skip
    config = TransformerConfig(**TINY, positions="none")
    torch.manual_seed(0)
    model = ClickModel(codec, config, 4, 0.5, members=3).eval()
    once_V = torch.rand(codec.size)
    told, pulled = [], []
    for m in range(3):
        own = {name: value.chunk(3, dim=0 if name.startswith("head.") else -1)[m]
               if name.startswith(("input.", "cross.table.", "head.")) else value
               for name, value in model.state_dict().items()}  # fmt: skip
        single = ClickModel(codec, config, 4, 0.5).eval()
        single.load_state_dict(own)
        told.append(single(*batch))
        pulled.append(single.penalty(batch, once_V, 0.25, 2.0, 3.0))
    torch.testing.assert_close(model.each(*batch), torch.stack(told))
    torch.testing.assert_close(model(*batch), torch.stack(told).mean(0))
    torch.testing.assert_close(model.penalty(batch, once_V, 0.25, 2.0, 3.0), torch.stack(pulled).mean())
    # Over all training rows each value is pulled once, and so is what a quantity is read by.
    count_V = torch.tensor([n for field in codec.used for n in field.counts])
    tables = (model.wide, model.input.table, model.cross.table)
    whole = [t.value.weight[count_V > 0].square().sum() + t.piece.square().sum() + t.log.square().sum() for t in tables]
    told = model.penalty(batch, 1 / count_V.clamp(min=1), 1 / len(rows), 2.0, 3.0)
    torch.testing.assert_close(told, 2 * WIDE**2 * whole[0] + 3 * (whole[1] + whole[2]) / 3)


def test_tables_are_joined_in_training_and_in_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, folder, report = prepared(tmp_path, log(), options=TABLES)
    assert any("genres" in line for line in report["reading"]["train"])
    assert {str(tmp_path / name) for name in ("log.csv", "users.dat", "items.csv")} <= set(report["data"])
    again = task.find("click-through-rate")(made.options)
    again.load(folder.file("codec"))
    whole = {"user": "1", "item": "x", "hour": "3", "gender": "F", "age": "25", "genres": ["Drama", "War"],
             "price": 3.5, "title": "Old Film"}
    for held in (made, again):
        joined = held.encode({"user": "1", "item": "x", "hour": 3})
        assert all(np.array_equal(joined[k], v, equal_nan=True) for k, v in held.encode(whole).items())
        other = held.encode({"user": "1", "item": "x", "hour": 3, "gender": "M"})
        assert not np.array_equal(joined["one"], other["one"])  # what the row says itself stands
    assert [c.name for c in again.context()] == ["hour"]


def test_what_cannot_be_learned_from_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"options\.threshold"):
        prepared(tmp_path, log())
    with pytest.raises(UserError, match="nothing to tell apart"):
        prepared(tmp_path, log(), options={"threshold": 1})
    with pytest.raises(UserError, match="finds its user"):
        (tmp_path / "other.csv").write_text("user,age\nu1,3\nu2,4\n", "utf-8")
        prepared(tmp_path, log(), options={"threshold": 4, "users": "other.csv"})
    with pytest.raises(UserError, match="hourr"):
        prepared(tmp_path, log(), options={"threshold": 4, "fields": {"hourr": "numeric"}})


def test_a_table_without_a_header_and_with_blanks(tmp_path: Path) -> None:
    """Criteo's form: a label, numbers, hashes, blanks; none of them named."""
    rng = np.random.default_rng(0)
    rows = [[str(i % 2), str(rng.integers(9)) if i % 3 else "", f"{i % 4:08x}", "" if i % 5 else "05db9164"]
            for i in range(60)]
    made, folder, report = prepared(tmp_path, "\n".join("\t".join(row) for row in rows) + "\n",
                                    data={"columns": {"label": 1}})
    assert {f.name: f.kind for f in made.codec.used} == {"2": "numeric", "3": "categorical", "4": "categorical"}
    assert sum(report["parts"][p]["rows"] for p in ("train", "valid", "test")) == 60
    store = Store(folder.file("data/train"))
    assert np.isnan(store.stream("quantity")).any() and report["parts"]["train"]["clicks"] > 0


# -- learning, ranking, importance -------------------------------------------------------------------------------------


def test_it_learns_a_cross_of_two_tables_and_ranks_as_it_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_of(tmp_path, log(240), options=TABLES, train={
        "steps": 150, "batch_size": 64, "lr": 0.01, "threads": 1, "eval_every": 50})
    run = train(path, run=tmp_path / "run", progress=False)
    found = run.evaluate(progress=False)["metrics"]
    assert found["auc"]["value"] > 0.99 and found["gauc"]["value"] > 0.99
    requests = [{"user": "1", "history": None, "context": {"hour": 3}, "items": ["z", "x", "y", "new"]},
                {"user": None, "history": ["x"], "context": {}, "items": ["y"]},
                {"user": "4", "history": None, "context": {}, "items": []}]
    for ahead in (False, True):
        if ahead:
            run.task.catalogue([{"id": "x"}, {"id": "new", "genres": ["Drama"]}])
        else:
            ranked = run.task.rank(run.model, requests)
            singly = run.predict([{"user": "1", "item": i, "hour": 3} for i in requests[0]["items"]] + [{"item": "y"}])
            assert [p for one in ranked for p in one] == pytest.approx([a["p"] for a in singly], abs=1e-5)
    assert [len(one) for one in run.task.rank(run.model, requests)] == [4, 1, 0]
    assert np.argmax(ranked[0]) == 1  # a woman, and x
    assert run.predict([{"user": "1", "item": "new"}])[0]["unseen"] == ["item"]
    held = run.task.explain(run.model, Store(run.folder.file("data/test")))["importance"]
    losses = {one["name"]: one["loss"] for one in held}
    assert held[0]["name"] in ("user", "item", "gender", "title", "genres", "price", "age")
    assert abs(losses["hour"]) < 0.05


def test_importance_is_the_auc_that_a_field_bears() -> None:
    rng = np.random.default_rng(0)
    rows = [{"a": str(rng.integers(2)), "b": str(rng.integers(2)), "m": "p|q" if rng.random() < 0.5 else "r"}
            for _ in range(500)]
    codec = FieldCodec.fit(rows, ["a", "b", "m"], {"a": "categorical", "b": "categorical"}, Sizes(min_count=1))
    examples = [{**codec.encode(row)[0], "label": np.float32(row["a"] == "1")} for row in rows]
    one = codec.single[0]
    yes = codec.starts["a"] + 2 + codec.sizes.buckets + one.values.index("1")

    def answer(some: Any) -> np.ndarray:
        return np.array([float(example["one"][0] == yes) for example in some])

    found = importance(codec, examples, answer)
    assert found[0]["name"] == "a" and found[0]["loss"] == pytest.approx(0.5, abs=0.06)
    assert [one["loss"] for one in found[1:]] == [0.0, 0.0]
