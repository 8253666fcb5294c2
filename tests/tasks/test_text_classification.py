"""text-classification against closed forms and scikit-learn; what every task keeps is in test_contract.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.runtime import optim
from multihead.train import Trainer, train
from multihead.transformer.config import TransformerConfig
from multihead.transformer.heads import weighed_ngrams
from multihead.transformer.inputs import ngram_hashes

Kind = task.find("text-classification")
SMALL = {
    "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "ngram_buckets": 512},
    "train": {"steps": 60, "batch_size": 16, "threads": 1, "precision": "float32", "lr": 0.01},
    "evaluate": {"bootstrap": 50},
}
GOOD, BAD = "房间很干净，服务热情", "床单很脏，再也不来"


def fitted(rows: list[dict[str, Any]], **options: Any) -> Any:
    made = Kind(Kind.Options(**options))
    made.fit(rows)
    return made


def several(count: int) -> list[dict[str, Any]]:
    """Rows whose labels are the words in them: any of three, or none but "other"."""
    words = {"床": "bed", "饭": "food", "价": "price"}
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        chosen = [w for w in words if rng.random() < 0.5]
        labels = [words[w] for w in chosen] or ["other"]
        rows.append({"text": "今天".join(["", *rng.permutation(chosen), f"第{i}天"]), "label": labels})
    return rows


def recipe_for(folder: Path, data: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    values = {"task": "text-classification", "name": "t", "data": {"train": str(data)}, **SMALL, **sections}
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return path


class Says(torch.nn.Module):
    """A model that answers the same logits to everything."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.logits

    def deep(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(*ids.shape, 1), self.logits


def test_a_long_text_keeps_its_head_and_its_tail() -> None:
    made = fitted([{"text": "abcdefghij", "label": "x"}, {"text": "a", "label": "y"}], max_tokens=5)
    ids = made.encode({"text": "abcdefghij"})["ids"]
    assert made.codec.decode(ids) == "abcij"
    assert made.codec.decode(made.encode({"text": "abcde"})["ids"]) == "abcde"


def test_one_label_only_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to tell apart"):
        fitted([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])


def test_a_label_never_seen_is_refused_by_name() -> None:
    made = fitted([{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])
    with pytest.raises(UserError, match="did you mean 'good'"):
        made.encode({"text": "a", "label": "goood"})


def test_the_loss_is_the_cross_entropy_and_balance_makes_labels_equal() -> None:
    rows = [{"text": "a", "label": "x"}] * 3 + [{"text": "b", "label": "y"}]
    logits = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.5], [3.0, 0.0]]
    for how, weight in (("none", [1.0, 1.0]), ("balanced", [4 / (2 * 3), 4 / (2 * 1)])):
        made = fitted(rows, class_weights=how, label_smoothing=0.0, wide=[])
        batch = made.collate([made.encode(row) for row in rows])
        loss = made.loss(Says(logits).eval(), batch)
        p = torch.tensor(logits).softmax(-1)[torch.arange(4), [0, 0, 0, 1]]
        each = torch.tensor([weight[0]] * 3 + [weight[1]])
        assert float(loss.total) == pytest.approx(float(-(each * p.log()).sum()), rel=1e-5)
        assert loss.count == 4 and float(each.mean()) == pytest.approx(1)


def test_several_labels_are_judged_each_alone() -> None:
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["z"]}]
    made = fitted(rows, multiple=True, label_smoothing=0.0, wide=[])
    batch = made.collate([made.encode(row) for row in rows])
    logits = [[1.0, -0.2, -3.0], [-2.0, -1.0, -0.1]]
    p = 1 / (1 + np.exp(-np.array(logits)))
    target = np.array([[1, 1, 0], [0, 0, 1]])
    loss = made.loss(Says(logits).eval(), batch)
    assert float(loss.total) / 2 == pytest.approx(-np.log(np.where(target, p, 1 - p)).mean(), rel=1e-5)
    answers = made.predict(Says(logits).eval(), batch, {})
    assert [a["labels"] for a in answers] == [["x"], []]
    scores = made.score(answers, rows)
    assert scores["exact_match"] == 0 and scores["micro_f1"] == pytest.approx(2 * 1 / (1 + 3))
    assert scores["log_loss"] == pytest.approx(float(loss.total) / 2, rel=1e-4)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_several_labels_are_learned_from_lists_and_from_tables(form: str, tmp_path: Path) -> None:
    rows, data = several(240), tmp_path / f"rows.{form}"
    if form == "jsonl":
        lines = [json.dumps({"内容": r["text"], "标签": r["label"]}, ensure_ascii=False) for r in rows]
    else:
        signs = ";|；" * 80
        lines = ["内容,标签", *(f"{r['text']},{sign.join(r['label'])}" for r, sign in zip(rows, signs, strict=True))]
    data.write_text("\n".join(lines), "utf-8")
    run = train(
        recipe_for(tmp_path, data, options={"multiple": True}), ["train.steps=120"], tmp_path / "run", progress=False
    )
    found = run.evaluate(progress=False)["metrics"]
    assert set(found) == {"micro_f1", "macro_f1", "exact_match", "log_loss"}
    assert found["micro_f1"]["value"] > 0.95
    assert set(run.predict(["今天床今天饭"])[0]["labels"]) == {"bed", "food"}
    assert "confusion" not in run.task.figures(*held_out(run))


def held_out(run: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = list(run.store("test").rows())
    return run.predict([row["text"] for row in rows]), rows


def test_what_the_report_shows_agrees_with_scikit_learn(tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    data = tmp_path / "reviews.csv"
    rng = np.random.default_rng(0)
    good, wrong = rng.random(300) < 0.6, rng.random(300) < 0.1
    lines = [f"{GOOD if g else BAD}{i},{int(g != w)}" for i, (g, w) in enumerate(zip(good, wrong, strict=True))]
    data.write_text("评论,类别\n" + "\n".join(lines), "utf-8")
    run = train(recipe_for(tmp_path, data), run=tmp_path / "run", progress=False)
    answers, rows = held_out(run)
    truth, guess = [row["label"] for row in rows], [a["label"] for a in answers]
    scores, figures = run.task.score(answers, rows), run.task.figures(answers, rows)
    assert scores["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, guess)) and scores["accuracy"] > 0.8
    assert scores["macro_f1"] == pytest.approx(sklearn.f1_score(truth, guess, average="macro"))
    p = [a["scores"]["1"] for a in answers]
    assert scores["log_loss"] == pytest.approx(sklearn.log_loss(truth, p), rel=1e-4)
    assert figures["confusion"]["matrix"] == sklearn.confusion_matrix(truth, guess).tolist()
    sure = [one["score"] for one in figures["mistakes"]]
    assert sure == sorted(sure, reverse=True) and len(sure) == sum(a != b for a, b in zip(truth, guess, strict=True))
    assert all("reviews.csv:" in one["where"] for one in figures["mistakes"])
    assert all(sum(a["scores"].values()) == pytest.approx(1, abs=1e-4) for a in answers)
    weights = np.random.default_rng(1).integers(0, 3, size=(4, len(rows)))
    drawn = run.task.score(answers, rows, weights=weights)
    for r, w in enumerate(weights):
        index = np.repeat(np.arange(len(rows)), w)
        alone = run.task.score([answers[i] for i in index], [rows[i] for i in index])
        assert {k: v[r] for k, v in drawn.items()} == pytest.approx({k: float(v) for k, v in alone.items()})


def test_the_share_of_hidden_tokens_differs_from_text_to_text() -> None:
    made = fitted([{"text": GOOD * 50, "label": "x"}, {"text": BAD, "label": "y"}], hidden=0.3, max_tokens=512)
    example = made.encode({"text": GOOD * 50, "label": "x"})
    one, two = (made.augment(example, np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(one[k], two[k]) for k in one) and np.array_equal(one["ids"], example["ids"])
    rng = np.random.default_rng(0)
    shares = np.stack([made.augment(example, rng)["hidden"].mean() for _ in range(300)])
    # Uniform from 0 to 0.6: mean 0.3, standard deviation 0.6/√12 = 0.173.
    assert shares.mean() == pytest.approx(0.3, abs=0.04) and shares.std() == pytest.approx(0.173, abs=0.03)


def test_the_wide_reader_weighs_words_as_scikit_learn_does() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    said = ["好好好吃", "不好吃", "好", "不吃不吃"]
    made = fitted([{"text": t, "label": "xy"[i % 2]} for i, t in enumerate(said)], wide=(1, 2))
    vectors = text.TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True).fit(said)
    batch = made.collate([made.encode({"text": t}) for t in said])
    ids = batch["ids"].long()
    mask = torch.arange(ids.shape[1]) < batch["ids_lengths"][:, None]
    row, key, value = weighed_ngrams(ids, mask, (1, 2), torch.from_numpy(made.idf))
    truth = vectors.transform(said)
    # Ours also sees where a text begins, as a 2-gram of its own: without it, the rest keeps scikit-learn's proportions.
    for i in range(len(said)):
        begins = ngram_hashes(ids[i : i + 1, :1], None, (1, 2), 1 << 17)[0, 0, 1]
        rest = value[(row == i) & (key != begins)].double()
        found, wanted = (rest / rest.norm()).sort().values.numpy(), np.sort(truth[i].data)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_wide_table_moves_by_its_rate_times_the_sum_of_gradients() -> None:
    rows = [{"text": GOOD, "label": "x"}, {"text": BAD, "label": "y"}]
    made = fitted(rows, wide=(1,), wide_rate=2, label_smoothing=0.0)
    model = made.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2, ngram_buckets=64))
    batch = made.collate([made.encode({"text": GOOD, "label": "x"}), made.encode({"text": BAD, "label": "y"})])
    made.loss(model, batch).total.backward()
    table, gradient = model.wide.table.weight, model.wide.table.weight.grad.to_dense()
    optimizer = optim.build(model, optimizer="adamw", lr=0.1, batch_size=2)
    optim.clip(model.parameters(), None, 1 / 2)
    optimizer.step()
    torch.testing.assert_close(table.detach(), -2 * gradient)


@pytest.mark.parametrize("pool", ["attention", "mean", "first"])
def test_a_trunk_alone_reads_what_is_there_and_nothing_behind_it(pool: str) -> None:
    made = fitted([{"text": GOOD, "label": "x"}, {"text": BAD * 2, "label": "y"}], pool=pool, wide=[], hidden=0)
    model = made.model(TransformerConfig(d_model=16, num_layers=2, num_heads=2, ngrams=(), max_length=256)).eval()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"input", "trunk", "head"}
    batch = made.collate([made.encode({"text": t}) for t in (GOOD, BAD * 2)])
    together, ids = model(batch["ids"].long(), batch["ids_lengths"]), batch["ids"].long()[:1, : len(GOOD)]
    x = model.trunk(model.input(ids))
    torch.testing.assert_close(together[:1], model(ids, batch["ids_lengths"][:1]))
    if pool == "mean":
        torch.testing.assert_close(together[:1], model.head.linear(x.mean(1)))
    elif pool == "first":
        torch.testing.assert_close(together[:1], model.head.linear(torch.tanh(model.head.pooler(x[:, 0]))))


def test_the_data_report_counts_classes(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "\n".join(f"{'ab'[i % 2] * 3}{i},{'xxxy'[i % 4]}" for i in range(40)), "utf-8")
    recipe = recipes.load(recipe_for(tmp_path, data), find=task.find)
    made = prepare.make_task(recipe, tmp_path)
    report = prepare.prepare(recipe, made, RunFolder.create(tmp_path / "run"))
    counts = [part["classes"] for part in report["parts"].values()]
    assert sum(c["x"] for c in counts) == 30 and sum(c["y"] for c in counts) == 10
    with pytest.raises(UserError, match=r"beyond model\.max_length 100"):
        Trainer(recipes.load(tmp_path / "recipe.yaml", ["model.max_length=100"], find=task.find), made,
                RunFolder.open(tmp_path / "run"), progress=False)  # fmt: skip
