"""image-generation: from pictures with labels or captions to pictures drawn, alone and over the OpenAI API."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import cli
from multihead.data.images import from_uri, to_uri
from multihead.errors import UserError
from multihead.predict import encode
from multihead.tasks.vision import _drawn as drawn
from multihead.tasks.vision._diffusion import unpatched
from multihead.tasks.vision.image_generation import ImageGeneration
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.transformer.patches import patches

Image = pytest.importorskip("PIL.Image")
SIDE = 8
CAPTIONS = {"red": ["red, warm", "红色，暖"], "green": ["green, fresh", "绿色，鲜"]}


def uri(value: int, red: bool = False) -> str:
    """A plain square, grey, or red of that brightness."""
    pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
    if red:
        pixels[..., 1:] = 0
        return to_uri(b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes())[0]
    return to_uri(b"P5 %d %d 255\n" % (SIDE, SIDE) + pixels[..., 0].tobytes())[0]


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Dark and light squares, each of its own brightness, so that none is a copy of another."""
    return [{"image": uri(i if i % 2 else 255 - i), "label": "dark" if i % 2 else "light",
             "caption": ["night, black", "day, white"][i % 2 == 0], "caption_2": ["夜，黑", "昼，白"][i % 2 == 0]}
            for i in range(count)]  # fmt: skip


def made(condition: str = "auto", **options: Any) -> ImageGeneration:
    task = ImageGeneration(ImageGeneration.Options(size=SIDE, condition=condition, **options))
    task.fit(rows())
    return task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained until dark and light are told apart."""
    folder = tmp_path_factory.mktemp("squares")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(160))
    (folder / "rows.jsonl").write_text(lines, "utf-8")
    recipe = {
        "task": "image-generation", "name": "squares", "data": {"train": str(folder / "rows.jsonl")},
        "options": {"condition": "label", "steps": 6, "samples": 4, "guidance": 1.5},
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2},
        "train": {"steps": 250, "batch_size": 32, "lr": 0.01, "threads": 1, "ema": 0.95, "precision": "float32",
                  "eval_every": 250},
        "evaluate": {"bootstrap": 20},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return train(folder / "recipe.yaml", run=folder / "run", progress=False)


def test_patches_are_put_together_as_they_were_cut() -> None:
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(unpatched(patches(x, 4), 4, 3), x)


def test_it_draws_what_it_is_asked_for(run: Any) -> None:
    dark, light = (drawn.from_png(answer["pictures"][0]).mean() for answer in run.predict(["dark", "light"]))
    assert dark < 90 and light > 165


def test_a_seed_gives_the_same_picture_alone_and_among_others(run: Any) -> None:
    alone = run.predict(["dark"], seed=5)[0]["pictures"][0]
    several = run.predict(["light", "dark"], seed=4, n=3)[1]["pictures"]
    assert run.predict(["dark"], seed=5)[0]["pictures"][0] == alone and len(set(several)) == 3
    # The second of seed 4 is the first of seed 5; a batch's sums may round another way.
    a, b = (drawn.from_png(one).astype(int) for one in (alone, several[1]))
    assert np.abs(a - b).max() <= 1


def test_the_report_shows_pictures_their_neighbours_and_the_floor(run: Any) -> None:
    found = run.evaluate(progress=False)
    assert {"loss", "frechet", "frechet_floor"} == set(found["metrics"])
    assert found["metrics"]["frechet"]["low"] is None and found["metrics"]["loss"]["low"] is not None
    report = (run.path / "report.html").read_text("utf-8")
    assert report.count('src="data:image/png') >= 4 + 4 * 5 and "img-src data:" in report


def test_pictures_are_written_where_the_command_says(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", str(run.path), "dark", "light", "--ask", "n=2", "--out", str(tmp_path / "drawn")])
    assert left.value.code in (0, None)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    places = [Path(place) for answer in told for place in answer["pictures"]]
    assert len(places) == 4 and all(Image.open(place).size == (SIDE, SIDE) for place in places)


# -- over the API ------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(run: Any) -> Any:
    openai = pytest.importorskip("openai")
    testclient = pytest.importorskip("starlette.testclient")
    from multihead.serve.app import Served, ServeSettings, create_app

    app = create_app([Served("squares", run.task, run.model)], ServeSettings())
    with testclient.TestClient(app, base_url="http://localhost") as client:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client)


def test_the_openai_client_gets_the_pictures_that_predict_makes(run: Any, api: Any) -> None:
    answer = api.images.generate(model="squares", prompt="light", n=2, size=f"{SIDE}x{SIDE}",  # type: ignore[call-overload]
                                 response_format="b64_json", extra_body={"seed": 3, "steps": 4, "guidance": 1.0})
    expected = run.predict(["light"], n=2, seed=3, steps=4, guidance=1.0)[0]["pictures"]
    assert [base64.b64decode(one.b64_json) for one in answer.data] == [from_uri(one) for one in expected]
    assert answer.output_format == "png" and answer.created > 0


def test_without_a_seed_pictures_differ_and_a_blank_prompt_is_free(api: Any) -> None:
    one, two = (api.images.generate(prompt=" ", response_format="b64_json").data[0].b64_json for _ in range(2))
    assert one != two


@pytest.mark.parametrize(("wish", "said"), [
    ({"n": 11}, "n"), ({"n": 0}, "n"), ({"size": "1024x1024"}, "8x8"), ({"response_format": "url"}, "response_format"),
    ({"prompt": "purple"}, "purple"), ({"prompt": "x" * 5000}, "prompt"), ({"extra_body": {"steps": 101}}, "steps"),
    ({"extra_body": {"guidance": 1e9}}, "guidance"), ({"extra_body": {"seed": -1}}, "seed"),
    ({"quality": "hd"}, "quality"), ({"extra_body": {"mask": "x"}}, "mask"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_by_name(api: Any, wish: dict, said: str) -> None:
    import openai

    with pytest.raises(openai.APIStatusError, match=said) as refused:
        api.images.generate(**{"prompt": "dark", **wish})
    assert refused.value.status_code == 422


# -- what a model is told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["none", "label", "text"])
def test_a_model_of_each_kind_learns_with_every_weight_and_draws(condition: str) -> None:
    task, rng = made(condition, keywords=True, steps=2, guidance=3.0), np.random.default_rng(0)
    torch.manual_seed(0)
    model = task.model(TransformerConfig(d_model=16, num_layers=2, num_heads=2))
    examples = [task.encode(row) for row in rows()[:8]]
    task.loss(model, task.collate([task.augment(one, rng) for one in examples])).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    asked = {"none": "", "label": "dark", "text": "夜"}[condition]
    batch = task.collate([encode(task, asked), encode(task, {})])
    with torch.no_grad():
        answers = task.predict(model.eval(), batch, {"n": 2, "seed": 1})
    assert [len(answer["pictures"]) for answer in answers] == [2, 2]
    assert drawn.from_png(answers[0]["pictures"][0]).shape == (1, SIDE, SIDE)


def test_captions_come_first_then_labels_then_nothing() -> None:
    assert made().told == "text" and [c.name for c in made().inputs()] == ["caption"]
    labelled = ImageGeneration(ImageGeneration.Options(size=SIDE))
    labelled.fit([{"image": row["image"], "label": row["label"]} for row in rows()])
    assert labelled.told == "label"
    free = ImageGeneration(ImageGeneration.Options(size=SIDE))
    free.fit([{"image": row["image"]} for row in rows()])
    assert free.told == "none" and free.inputs() == [] and free.request("") == {}
    with pytest.raises(UserError, match="freely"):
        free.request("a cat")
    with pytest.raises(UserError, match=r"data\.columns\.caption"):
        ImageGeneration(ImageGeneration.Options(condition="text")).fit([{"image": uri(1), "label": "a"}] * 2)


def test_training_sees_every_caption_and_any_of_its_keywords_but_an_evaluation_the_first() -> None:
    task = made("text", keywords=True, drop=0.0)
    example, rng = task.encode(rows()[0]), np.random.default_rng(0)
    seen = {task.words.decode(task.augment(example, rng)["ids"]) for _ in range(200)}
    assert seen == {"day", "white", "daywhite", "whiteday", "昼", "白", "昼白", "白昼"}
    ids = task.collate([example, task.encode(rows()[1])])["ids"][0]
    assert task.words.decode(ids.tolist()) == "daywhite"
    with pytest.raises(UserError, match="caption_length"):
        task.encode({"caption": "夜" * 1000})


def test_guidance_has_something_to_learn_from() -> None:
    rng, label, text = np.random.default_rng(0), made("label", drop=0.25), made("text", drop=0.25)
    untold = [label.augment(label.encode(rows()[0]), rng)["label"] == 2 for _ in range(2000)]
    silent = [len(text.augment(text.encode(rows()[0]), rng)["ids"]) == 1 for _ in range(2000)]
    assert abs(np.mean(untold) - 0.25) < 0.04 and abs(np.mean(silent) - 0.25) < 0.04


def test_transparent_pictures_stand_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    clear.save(tmp_path / "x.png")
    task = ImageGeneration(ImageGeneration.Options(size=SIDE, condition="none"))
    task.fit([{"image": to_uri((tmp_path / "x.png").read_bytes())[0]}] * 2)
    assert task.encode({"image": to_uri((tmp_path / "x.png").read_bytes())[0]})["image"].min() == 255


def test_nearest_pictures_are_found_and_a_copy_is_at_no_distance() -> None:
    among = np.random.default_rng(0).integers(256, size=(50, 1, 4, 4), dtype=np.uint8)
    which, far = drawn.nearest(among[[7, 3]], among, 2)
    assert which[:, 0].tolist() == [7, 3] and np.allclose(far[:, 0], 0, atol=1e-3)
    expected = np.sqrt(((among[7] / 255 - among / 255) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(far[0, 1], np.sort(expected)[1], rtol=1e-4)
