"""two-tower-retrieval: vectors of users and items that training, search and serving agree on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import multihead
from multihead import prepare, task
from multihead import recipe as recipes
from multihead.codec.sides import Side
from multihead.data.store import Store
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.tasks.recommendation._nearest import Index, recall
from multihead.tasks.recommendation._towers import TwoTower, tastes
from multihead.tasks.recommendation.two_tower_retrieval import TwoTowerRetrieval
from multihead.train import train
from multihead.transformer.config import TransformerConfig

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_length": 32, "dropout": 0.0}
FILMS = "id,title,genres,year\n" + "".join(
    f"i{n},Film number {n} ({1990 + n}),{'Drama|War' if n % 2 else 'Comedy'},{1990 + n}\n" for n in range(12)
)
PEOPLE = "user,gender,age\n" + "".join(f"u{n},{'FM'[n % 2]},{20 + 3 * n}\n" for n in range(9))
LOG = "user,item,time\n" + "".join(f"u{u},i{(u + t) % 10},{10 * t + u}\n" for t in range(10) for u in range(7))
OPTIONS = {"features": ["genres", "title", "year"], "user_features": ["gender", "age"], "max_items": 6}


def written(tmp_path: Path, options: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A recipe of the log and the two tables."""
    for name, text in (("log.csv", LOG), ("films.csv", FILMS), ("people.csv", PEOPLE)):
        (tmp_path / name).write_text(text)
    values: dict[str, Any] = {"task": "two-tower-retrieval", "name": "two", "model": TINY, **sections}
    values["data"] = {"train": "log.csv", **sections.get("data", {})}
    values["options"] = {"items": "films.csv", "users": "people.csv", **OPTIONS, **(options or {})}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return path


def prepared(tmp_path: Path, options: dict[str, Any] | None = None, **sections: Any) -> tuple[Any, RunFolder]:
    path = written(tmp_path, options, **sections)
    recipe = recipes.load(path, find=task.find)
    made, folder = prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run")
    prepare.prepare(recipe, made, folder)
    return made, folder


def model_of(made: TwoTowerRetrieval) -> TwoTower:
    torch.manual_seed(0)
    return made.model(TransformerConfig(**{**TINY, "norm": "layernorm", "activation": "gelu"})).eval()  # type: ignore[arg-type]


def ids(found: dict[str, Any]) -> list[str]:
    return [item["id"] for item in found["items"]]


def answer(made: TwoTowerRetrieval, model: TwoTower, row: dict[str, Any], **ask: Any) -> dict[str, Any]:
    with torch.no_grad():
        return made.predict(model, made.collate([made.encode(row)]), ask)[0]


# -- data --------------------------------------------------------------------------------------------------------------


def test_by_time_every_interaction_of_a_period_is_asked_for_from_all_before_it(tmp_path: Path) -> None:
    _, folder = prepared(tmp_path, data={"split": {"by": "time", "valid": 0.2, "test": 0.2}})
    whole = sorted((t, f"u{u}", f"i{(u + t // 10) % 10}") for u in range(7) for t in range(u, 100 + u, 10))
    parts = [list(Store(folder.file(f"data/{part}")).rows()) for part in ("valid", "test")]
    assert sum(map(len, parts)) == sum(len(p) for p in parts) == 28  # 40 % of 70
    for row in [*parts[0], *parts[1]]:
        mine = [item for _, user, item in whole if user == row["user"]]
        assert row["history"] == mine[: len(row["history"])] and row["item"] == mine[len(row["history"])]
    train_rows = Store(folder.file("data/train"))
    assert sum(len(row["history"]) + 1 for row in train_rows) == 42


def test_newcomers_of_a_period_are_asked_for_too(tmp_path: Path) -> None:
    path = written(tmp_path, data={"split": {"by": "time", "valid": 0.2, "test": 0.2}})
    (tmp_path / "log.csv").write_text(LOG + "late,i1,99\nlate,i2,100\n")
    recipe = recipes.load(path, find=task.find)
    made, folder = prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run")
    prepare.prepare(recipe, made, folder)
    found = [r for r in Store(folder.file("data/test")).rows() if r["user"] == "late"]
    assert [(r["history"], r["item"]) for r in found] == [([], "i1"), (["i1"], "i2")]
    assert made.encode(found[0])["user"] == len(made.users)  # nobody that training met


def test_items_nobody_chose_are_in_the_catalogue_by_what_is_known_of_them(tmp_path: Path) -> None:
    made, folder = prepared(tmp_path)
    assert len(made.codec) == 12 and made.items.met == 10 and made.codec.counts[10:].tolist() == [0, 0]
    assert made.items.names == made.codec.names
    about = {one["id"]: one for one in made.codec.described()}
    assert about["i11"]["genres"] == ["Drama", "War"] and about["i11"]["title"] == "Film number 11 (2001)"
    assert made.items.kinds == {"genres": "multi", "title": "text", "year": "numeric"}
    again = TwoTowerRetrieval(made.options)
    again.load(folder.file("codec"))
    for one, two in ((made.items, again.items), (made.users, again.users)):
        assert one.names == two.names and one.met == two.met
        assert one.arrays.keys() == two.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array.numpy(), two.arrays[name].numpy())


def test_an_unknown_row_of_a_side_knows_nothing() -> None:
    side = Side.fit(["a", "b"], 1, {"a": {"x": "p|q"}, "b": {"x": "p"}}, ["x"], {"x": "multi"})
    assert side.number("a") == 0 and side.number("c") == 2
    assert side.arrays["several_lengths"].tolist() == [2, 1, 1] and int(side.arrays["several"][2, 0]) == 0


@pytest.mark.parametrize("options, words", [
    ({"items": None}, "options.items"), ({"users": None}, "options.users"), ({"features": ["brnd"]}, "'brnd'"),
    ({"max_items": 40}, "max_length 32"), ({"fields": {"gendre": "multi"}}, "'gendre'.*'genres'"),
])  # fmt: skip
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepared(tmp_path, options)


def test_tables_of_other_ids_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "people.csv").write_text("user,gender,age\nx1,F,3\nx2,M,4\n")
    recipe = recipes.load(path, find=task.find)
    with pytest.raises(UserError, match="ids there look like 'x1'"):
        prepare.prepare(recipe, prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run"))


# -- learning ----------------------------------------------------------------------------------------------------------


def batch_of(made: TwoTowerRetrieval, folder: RunFolder) -> dict[str, torch.Tensor]:
    examples = made.examples(Store(folder.file("data/train")), "train")
    return made.collate([examples[i] for i in range(len(examples))])


def test_every_item_is_asked_for_once_however_histories_are_cut(tmp_path: Path) -> None:
    made, folder = prepared(tmp_path, {"max_items": 3}, data={"split": {"valid": 0, "test": 0}})
    examples = made.examples(Store(folder.file("data/train")), "train")
    asked = Counter((int(e["user"]), int(i)) for e in examples for i in e["items"][int(e["first"]) :])
    assert all(len(e["items"]) <= 4 for e in examples)
    assert sum(asked.values()) == 70 and set(asked.values()) == {1}


@pytest.mark.parametrize("logq", [True, False])
def test_the_loss_is_a_softmax_over_the_batch_corrected_by_how_often_items_occur(tmp_path: Path, logq: bool) -> None:
    made, folder = prepared(tmp_path, {"logq": logq})
    model, batch = model_of(made), batch_of(made, folder)
    found = made.loss(model, batch)
    targets = [(b, t) for b, n in enumerate(batch["items_lengths"].tolist())
               for t in range(int(batch["first"][b]), n)]  # fmt: skip
    share = made.codec.counts[:10] / made.codec.counts.sum()
    items = model.item_tower(torch.arange(10))[0]
    total = 0.0
    for b, t in targets:
        mine = batch["items"][b, : int(batch["items_lengths"][b])].tolist()
        context = batch["items"][b : b + 1, :t].long()
        user = model.users(batch["user"][b : b + 1], context if t else torch.zeros(1, 1).long(), torch.tensor([t]))[0]
        right = int(batch["items"][b, t])
        # Every target of the batch is a candidate as often as it occurs, but for the user's own items.
        others = [int(batch["items"][x, y]) for x, y in targets]
        others = [i for i in others if i not in mine]
        numbers = torch.tensor([right, *others])
        logits = items[numbers] @ user / model.warmth()
        if logq:
            logits = logits - torch.tensor(share)[numbers].log()
        total += float(-F.log_softmax(logits, 0)[0].detach())
    assert found.count == len(targets)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)


def test_the_whole_catalogue_is_every_item_met(tmp_path: Path) -> None:
    made, folder = prepared(tmp_path, {"negatives": "catalogue"})
    model, batch = model_of(made), batch_of(made, folder)
    one = {key: value[:1] for key, value in batch.items()}
    n = int(one["items_lengths"][0])
    mine, items = one["items"][0, :n].tolist(), model.item_tower(torch.arange(10))[0]
    total = 0.0
    for t in range(int(one["first"][0]), n):
        user = model.users(one["user"], one["items"][:, : max(1, t)].long(), torch.tensor([t]))[0]
        kept = [mine[t], *(i for i in range(10) if i not in mine)]
        total += float(-F.log_softmax((items[kept] @ user) / model.warmth(), 0)[0].detach())
    assert float(made.loss(model, one).total.detach()) == pytest.approx(total, rel=1e-4)


def test_an_item_alone_in_its_batch_has_a_slope(tmp_path: Path) -> None:
    made, folder = prepared(tmp_path)
    model = model_of(made)
    one = {key: value[:1] for key, value in batch_of(made, folder).items()}
    made.loss(model, one).total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_pads_a_history_or_a_text_changes_nothing(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    model = model_of(made)
    user = torch.tensor([1, 2])
    padded = model.users(user, torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]]), torch.tensor([2, 4]))
    torch.testing.assert_close(padded[:1], model.users(user[:1], torch.tensor([[3, 4]]), torch.tensor([2])))
    short = model.item_tower(torch.arange(12))[0]
    behind = torch.arange(model.item.side_words.shape[1]) >= model.item.side_words_lengths[:, None]
    assert behind.any()
    model.item.side_words = model.item.side_words.masked_fill(behind, 7)
    torch.testing.assert_close(model.item_tower(torch.arange(12))[0], short)


# -- answering ---------------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_user_is_the_basis_of_the_answer(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    model = model_of(made)
    known = answer(made, model, {"user": "u1"}, k=12)
    assert known["basis"] == "history" and not set(ids(known)) & set(made.known["u1"]["history"])
    assert known["user"] == "u1" and "unknown_user" not in known
    described = answer(made, model, {"user": "u8"}, k=3)  # in the file of users only
    assert described["basis"] == "user" and "unknown_user" not in described and len(ids(described)) == 3
    nobody = answer(made, model, {"user": 2**70}, k=3)
    assert nobody["basis"] == "popularity" and nobody["unknown_user"] == str(2**70)
    assert [made.codec.counts[made.codec.names.index(i)] for i in ids(nobody)] == made.codec.counts[:3].tolist()
    guest = answer(made, model, {"history": ["i1", "new"], "exclude": ["i2"]}, k=12)
    assert guest["basis"] == "history" and guest["unknown"] == ["new"] and not {"i1", "i2"} & set(ids(guest))
    scores = [item["score"] for item in guest["items"]]
    assert scores == sorted(scores, reverse=True) and max(map(abs, scores)) <= 1 + 1e-6
    assert all(item["title"].startswith("Film number") for item in guest["items"])


def test_an_answer_is_the_product_of_the_two_vectors(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    model = model_of(made)
    users, items = model.embed_user(["u1", "u8", "?"]), model.embed_item(made.codec.names)
    assert users.shape == (3, 16) and items.shape == (12, 16)
    for vectors in (users, items):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    torch.testing.assert_close(model.embed_user("u1"), users[0])
    torch.testing.assert_close(model.embed_item("i3"), model.embed_item(["i3"])[0])
    torch.testing.assert_close(model.embed_user({"history": ["i1"]}), model.embed_user([{"history": ["i1"]}])[0])
    best = answer(made, model, {"user": "u8"}, k=12)
    cosines = dict(zip(made.codec.names, (items @ users[1]).tolist(), strict=True))
    assert ids(best) == sorted(cosines, key=lambda name: -cosines[name])
    with pytest.raises(UserError, match="no item i99"):
        model.embed_item(["i1", "i99"])


def test_tastes_are_the_right_singular_vectors_of_what_users_chose() -> None:
    torch.manual_seed(0)
    chosen = torch.rand(30, 12) < 0.3
    chosen[:, 11] = False
    user, item = chosen.nonzero().T
    weighed = chosen / chosen.sum(1, keepdim=True).clamp(min=1) ** 0.5 / chosen.sum(0).clamp(min=1) ** 0.25
    exact = F.normalize(torch.linalg.svd(weighed)[2][:4].T, dim=1)[:11]
    found = tastes(torch.cat((user, user[:5])), torch.cat((item, item[:5])), 12, 4)  # what is chosen twice counts once
    torch.testing.assert_close(found[:11] @ found[:11].T, exact @ exact.T, atol=1e-3, rtol=0)
    assert not found[11].any()
    assert tastes(torch.tensor([0, 1]), torch.tensor([0, 1]), 3, 4)[:, 2:].abs().max() == 0  # there are but two


def test_tastes_stand_in_both_vectors_and_are_kept(tmp_path: Path) -> None:
    made, folder = prepared(tmp_path, {"tastes": 4})
    model = model_of(made)
    users, items = model.embed_user([{"history": ["i1", "i2"]}, {"history": ["i3"]}]), model.embed_item(["i1", "i11"])
    assert users.shape == items.shape == (2, TINY["d_model"] + 4)
    torch.testing.assert_close(torch.cat((users, items)).norm(dim=1), torch.ones(4))
    assert made.taste is not None and torch.equal(model.taste_IR[-1], torch.zeros(4))  # of an item nobody chose
    again = TwoTowerRetrieval(made.options)
    again.load(folder.file("codec"))
    torch.testing.assert_close(model_of(again).embed_user([{"history": ["i1", "i2"]}])[0], users[0])


def test_vectors_follow_the_weights(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path)
    model = model_of(made)
    with torch.no_grad():
        first = made.item_vectors(model)
        assert made.item_vectors(model) is first
        model.item_out.weight.mul_(-1), model.fame.mul_(-1)
        torch.testing.assert_close(made.item_vectors(model), -first)


def test_an_index_answers_as_exact_search_does(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    made, folder = prepared(tmp_path)
    (tmp_path / "b").mkdir()
    indexed, _ = prepared(tmp_path / "b", {"index": "faiss"})
    a, b = model_of(made), model_of(indexed)
    for row in ({"user": "u1"}, {"user": "u8"}, {"user": "?"}, {"history": ["i1", "i2"], "exclude": ["i5"]}):
        for ask in ({"k": 4}, {"k": 12}, {"k": 3, "seen": "keep"}):
            one, two = answer(made, a, row, **ask), answer(indexed, b, row, **ask)
            assert one["basis"] == two["basis"] and (ids(one) == ids(two) or one["basis"] == "popularity")
            assert [i["score"] for i in one["items"]] == pytest.approx([i["score"] for i in two["items"]], abs=1e-5)
    rows = list(Store(folder.file("data/test")).rows())
    told = indexed.predict(b, indexed.collate([indexed.encode(r) for r in rows]), {"evaluate": True})
    assert indexed.score(told, rows)["index_recall@50"] == 1


def test_the_cells_of_a_large_index_hold_nearly_all_neighbours() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    centres = torch.randn(200, 16)
    vectors = F.normalize(centres[torch.randint(200, (25_000,))] + 0.5 * torch.randn(25_000, 16), dim=1)
    asked = vectors[:100]
    index = Index(vectors)
    assert float(recall(index, asked @ vectors.T, asked, 10).mean()) > 0.9
    best, numbers = index.search(asked, 1)
    assert numbers[:, 0].tolist() == list(range(100)) and torch.allclose(best, torch.ones(100, 1), atol=1e-5)


def test_a_pattern_is_learned_told_and_served(tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app

    lines = "user,item,time\n"  # who likes even items comes back for even ones; i10 and i11 are new
    rng = np.random.default_rng(0)
    for u in range(60):
        liked = rng.permutation(5)[:4] * 2 + u % 2
        lines += "".join(f"u{u},i{i},{t}\n" for t, i in enumerate(liked))
    path = written(tmp_path, {"user_features": ["gender"], "features": ["genres"]},
                   train={"steps": 120, "batch_size": 32, "lr": 0.01, "threads": 1, "precision": "float32"},
                   evaluate={"bootstrap": 10})  # fmt: skip
    (tmp_path / "log.csv").write_text(lines)
    people = "user,gender\n" + "".join(f"u{u},{'FM'[u % 2]}\n" for u in range(62))
    (tmp_path / "people.csv").write_text(people)
    train(path, run=tmp_path / "run", progress=False)
    run = multihead.load(tmp_path / "run")
    figures = run.evaluate(progress=False)["metrics"]
    assert figures["hr@10"]["value"] > 0.9 and figures["ndcg@5"]["low"] <= figures["ndcg@5"]["value"]
    even, odd = {f"i{n}" for n in range(0, 12, 2)}, {f"i{n}" for n in range(1, 12, 2)}
    assert set(ids(run.predict([{"user": "u60"}], k=6)[0])) == even  # never met, of one gender; i10 is new
    assert set(ids(run.predict([{"user": "u61"}], k=6)[0])) == odd
    assert run.predict(["i0 i2"], k=3)[0]["items"][0]["id"] in even
    score = run.embed_user(["u60", "u61"]) @ run.embed_item(["i10", "i11"]).T
    assert score[0, 0] > score[0, 1] and score[1, 1] > score[1, 0]
    with testclient.TestClient(create_app([Served("two", run.task, run.model)]), base_url="http://127.0.0.1") as client:
        users = [{"user": "u60"}, {"user": "u61"}, {"user": "nobody"}]
        reply = client.post("/v1/predict", json={"input": users, "k": 6}).json()["answers"]
        assert [one["user"] for one in reply] == ["u60", "u61", "nobody"] and reply[2]["unknown_user"] == "nobody"
        assert set(ids(reply[0])) == even and set(ids(reply[1])) == odd
        one = client.post("/v1/recommend", json={"user": "u61", "k": 3}).json()
        assert set(ids(one)) <= odd and one["items"][0]["title"].startswith("Film")
        assert json.dumps(one).count("u61") == 1
