"""translation: the loss against closed forms, both sides' codecs, answers, limits, and what broken data is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from multihead import prepare, task
from multihead import recipe as recipes
from multihead.cli import main
from multihead.errors import UserError
from multihead.run import RunFolder
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import dropout
from multihead.transformer.losses import vocabulary_loss

pytest.importorskip("sacrebleu")
Kind = task.find("translation")
DIGITS = dict(zip("0123456789", "零一二三四五六七八九", strict=True))
SMALL = {
    "options": {"tokenizer": "char", "shared_vocabulary": False, "beam": 3, "max_tokens": 32},
    "model": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "max_length": 32, "dropout": 0.0},
    "train": {"steps": 250, "batch_size": 32, "threads": 1, "precision": "float32", "lr": 0.01, "ema": 0.95,
              "eval_every": 125},
    "evaluate": {"bootstrap": 50},
}  # fmt: skip


def numbers(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Numbers and how they are written in Chinese, digit by digit."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(DIGITS), size=int(rng.integers(1, 6)))) for _ in range(count)]
    return [{"source": text, "target": "".join(DIGITS[c] for c in text)} for text in texts]


def recipe_for(folder: Path, rows: list[dict[str, str]], **sections: Any) -> Path:
    (folder / "pairs.tsv").write_text("".join(f"{r['source']}\t{r['target']}\tCC-BY\n" for r in rows), "utf-8")
    data = {"train": str(folder / "pairs.tsv"), "header": False, "columns": {"source": 1, "target": 2}}
    values = {"task": "translation", "name": "t", "data": data, **SMALL, **sections}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return path


def fitted(**options: Any) -> Any:
    made = Kind(Kind.Options(**options))
    made.fit(numbers(50))
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("translation")
    return train(recipe_for(folder, numbers(600)), run=folder / "run", progress=False)


def test_it_learns_and_says_how_well(run: Any) -> None:
    found = run.evaluate(progress=False)
    metrics = {name: figure["value"] for name, figure in found["metrics"].items()}
    assert list(metrics) == ["bleu", "chrf", "loss"] and metrics["chrf"] > 80 and metrics["loss"] < 0.3
    answers = run.predict([{"source": "407"}, "15"])
    assert [a["text"] for a in answers] == ["四零七", "一五"]
    assert answers[0]["finish_reason"] == "stop" and answers[0]["tokens"] == 3
    page = run.folder.file("report.html").read_text("utf-8")
    assert "tok:zh" in page and "→ " in page
    assert "tok:zh" in json.loads(run.folder.file("metrics.json").read_text("utf-8"))["signatures"]["bleu"]


def test_wishes_are_heard_and_checked(run: Any) -> None:
    assert run.predict(["40712"], max_tokens=2)[0] | {"score": 0} == {
        "text": "四零", "score": 0, "tokens": 2, "finish_reason": "length"
    }  # fmt: skip
    assert run.predict(["407"], beam=1, length_penalty=0)[0]["text"] == "四零七"
    for ask in ({"beam": 0}, {"beam": 99}, {"beam": True}, {"max_tokens": 0}, {"length_penalty": "long"}):
        with pytest.raises(UserError, match=next(iter(ask))):
            run.predict(["407"], **ask)
    with pytest.raises(UserError, match=r"'source' has 41 tokens, more than options.max_tokens, 32"):
        run.predict(["4" * 40])


def test_it_is_served_in_batches(run: Any) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app

    app = create_app([Served(name="zh", task=run.task, model=run.model)], run.recipe.serve)
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        reply = client.post("/v1/predict", json={"model": "zh", "input": ["407", "15"], "beam": 2}).json()
        assert [a["text"] for a in reply["answers"]] == ["四零七", "一五"]
        assert client.post("/v1/predict", json={"model": "zh", "input": "4" * 40}).status_code == 422
        assert client.post("/v1/predict", json={"model": "zh", "input": "4", "beam": 0}).status_code == 422


def test_the_loss_is_that_of_every_target_token_given_those_before() -> None:
    made = fitted(tokenizer="char", label_smoothing=0.1)
    torch.manual_seed(0)
    model = made.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    batch = made.collate([made.encode(row) for row in numbers(6)])
    found = made.loss(model, batch)
    target = batch["target"].long()
    logits = model(batch["ids"].long(), target)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(
        logits, target[:, 1:].flatten(), ignore_index=made.codec.pad, reduction="sum", label_smoothing=0.1
    )
    assert int(found.count) == int((batch["target_lengths"] - 1).sum())
    torch.testing.assert_close(found.total, expected)
    foretold = made._foretell(model, batch)
    plain = F.cross_entropy(logits, target[:, 1:].flatten(), ignore_index=made.codec.pad, reduction="sum")
    assert sum(loss for loss, _ in foretold) == pytest.approx(float(plain.detach()), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("words", [7, 5000])
def test_the_chunked_loss_is_cross_entropy_and_so_are_its_slopes(words: int, smoothing: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(words, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(words, (1000,))
    ours = vocabulary_loss(x, weight, target, smoothing) * 0.5
    slow = F.cross_entropy(x @ weight.T, target, reduction="sum", label_smoothing=smoothing) * 0.5
    torch.testing.assert_close(ours.double(), slow, rtol=1e-5, atol=1e-2)
    for a, b in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(slow, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    x = torch.ones(1001, 301, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(y.detach().float().mean()) == pytest.approx(1.0, abs=0.01)
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert dropout(x, 0.3, training=False) is x and dropout(x, 0.0) is x
    # A row and its neighbour know nothing of each other.
    kept = (y.detach() != 0).float()
    assert abs(float(((kept[1:] - 0.7) * (kept[:-1] - 0.7)).mean())) < 0.003


def test_a_vocabulary_for_both_or_one_for_each() -> None:
    shared, apart = fitted(tokenizer="char"), fitted(tokenizer="char", shared_vocabulary=False)
    assert shared.codec is shared.target_codec
    assert apart.codec.vocab_size < 16 and apart.target_codec.vocab_size < 16 < shared.codec.vocab_size
    example = apart.encode({"source": "12", "target": "一二"})
    assert example["ids"][-1] == apart.codec.eos and example["target"][0] == apart.target_codec.bos
    assert apart.target_codec.decode(example["target"]) == "一二" and apart.codec.decode(example["ids"]) == "12"
    mixed = fitted(tokenizer="bpe", target_tokenizer="char", shared_vocabulary=False, vocab_size=300)
    assert (mixed.codec.kind, mixed.target_codec.kind) == ("bpe", "char")
    with pytest.raises(UserError, match="shared_vocabulary: false"):
        fitted(tokenizer="bpe", target_tokenizer="char")


@pytest.mark.parametrize("shared", [True, False])
def test_it_starts_from_a_model_that_fills_masks(shared: bool, tmp_path: Path) -> None:
    rows, steps = numbers(60), {**SMALL["train"], "steps": 2, "eval_every": 2}
    texts = [json.dumps({"text": "".join(row.values())}) for row in rows]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), "utf-8")
    shape = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "max_length": 32}
    mask = {"task": "fill-mask", "data": {"train": "texts.jsonl"}, "options": {"tokenizer": "char", "context": 16},
            "model": shape, "train": steps}  # fmt: skip
    (tmp_path / "mask.yaml").write_text(yaml.safe_dump(mask), "utf-8")
    before = train(tmp_path / "mask.yaml", run=tmp_path / "mask", progress=False)
    options = {"tokenizer": "char", "shared_vocabulary": shared, "max_tokens": 32}
    path = recipe_for(tmp_path, rows, options=options, model={"from": str(before.path)}, train=steps)
    run = train(path, run=tmp_path / "run", progress=False)
    assert run.task.codec.vocab_size == before.task.codec.vocab_size
    assert (run.task.target_codec is run.task.codec) == shared
    assert isinstance(run.predict(["407"])[0]["text"], str)


def test_both_languages_have_their_share_of_a_joint_vocabulary() -> None:
    rows = [{"source": "the quick brown fox " * 60, "target": "der schnelle braune Fuchs " * 60}] * 300
    made = Kind(Kind.Options(vocab_size=300))
    made.fit(rows)
    sizes = [len(made.codec.encode(rows[0][side])) for side in ("source", "target")]
    assert max(sizes) < 2 * min(sizes)


def test_a_sentence_with_two_translations_is_two_examples_in_one_part(tmp_path: Path) -> None:
    rows = [{"source": f"n {i}", "target": t} for i in range(30) for t in (f"eins {i}", f"zwei {i}")]
    path = recipe_for(tmp_path, rows, options={**SMALL["options"], "max_tokens": 32})
    recipe = recipes.load(path, find=task.find)
    made, folder = prepare.make_task(recipe, tmp_path), RunFolder.create(tmp_path / "run")
    report = prepare.prepare(recipe, made, folder)
    assert sum(part["rows"] for part in report["parts"].values()) == 60
    assert all(part["rows"] % 2 == 0 for part in report["parts"].values())


@pytest.mark.parametrize("broken", [
    ({"source": "a.en", "target": "short.de"}, "short.de:40", "ends after line 40, while"),
    ({"source": "a.en", "target": "blank.de"}, "blank.de:7", "'target' is empty"),
    ({"source": "a.en"}, "", "no file for the column 'target'"),
    ({"source": "a.en", "traget": "a.de"}, "", "'traget' is no column of this task"),
    ({"source": "a.en", "target": "gone.de"}, "gone.de", "no such file"),
])  # fmt: skip
def test_broken_pairs_are_told_with_their_place(
    broken: tuple[dict[str, str], str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, place, told = broken
    for name, lines in {"a.en": 60, "a.de": 60, "short.de": 40, "blank.de": 60}.items():
        text = [f"line {i}" if not (name == "blank.de" and i == 6) else "" for i in range(lines)]
        (tmp_path / name).write_text("\n".join(text) + "\n", "utf-8")
    path = recipe_for(tmp_path, numbers(3), data={"train": files})
    with pytest.raises(SystemExit) as exit:
        main(["prepare", str(path), "--run", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and told in said and place in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_init_writes_a_recipe_for_two_columns_and_for_two_files(tmp_path: Path) -> None:
    rows = [f"the number {i} is good\tdie Zahl {i} ist gut\tCC-BY 2.0 #{i}" for i in range(40)]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows), "utf-8")
    for side, column in (("en", 0), ("de", 1)):
        (tmp_path / f"a.{side}").write_text("\n".join(row.split("\t")[column] for row in rows), "utf-8")
    out = tmp_path / "out.yaml"
    for data in (
        [str(tmp_path / "pairs.tsv")],
        [f"source={tmp_path / 'a.en'}", f"target={tmp_path / 'a.de'}"],
    ):
        with pytest.raises(SystemExit) as exit:
            main(["init", "translation", *data, "-o", str(out), "--force"])
        assert exit.value.code in (0, None)
        recipe = recipes.load(out, find=task.find)
        rows_found = prepare._open_all(recipe.data, prepare.make_task(recipe, tmp_path), tmp_path)["train"]
        assert next(iter(rows_found)).items() >= {
            ("source", "the number 0 is good"), ("target", "die Zahl 0 ist gut")
        }  # fmt: skip


def test_perplexities_of_nothing_and_of_everything_are_numbers() -> None:
    made = fitted(tokenizer="char")
    answers = [{"text": "", "loss": 5.0, "target_tokens": 2}, {"text": "一", "loss": 1.0, "target_tokens": 1}]
    rows = [{"target": "一二"}, {"target": "一"}]
    found = made.score(answers, rows)
    assert found["loss"] == pytest.approx(2.0) and all(math.isfinite(v) for v in found.values())
    weighted = made.score(answers, rows, np.array([[1, 1], [0, 2]]))
    assert weighted["loss"] == pytest.approx([2.0, 1.0]) and weighted["bleu"].shape == (2,)
