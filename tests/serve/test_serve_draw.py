"""The page at / draws pictures, in a real browser."""

from __future__ import annotations

import pytest
import torch
from test_serve_page import browser, serving, visit  # noqa: F401

from multihead.data.images import to_uri
from multihead.serve.app import Served
from multihead.tasks.vision.image_generation import ImageGeneration
from multihead.transformer.config import TransformerConfig


@pytest.fixture
def easel() -> Served:
    pytest.importorskip("PIL.Image")
    task = ImageGeneration(ImageGeneration.Options(size=8, condition="label", steps=4))
    task.fit([{"image": to_uri(b"P5 8 8 255\n" + bytes([value] * 64))[0], "label": name}
              for value, name in ((0, "<b>dark</b>"), (255, "light"))])  # fmt: skip
    torch.manual_seed(0)
    return Served("easel", task, task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval(),
                  examples=[{"label": "<b>dark</b>"}, {"label": "light"}])


def test_the_page_draws_what_is_asked_and_the_same_again_for_a_seed(easel, visit) -> None:  # noqa: F811
    with serving(easel) as (address, _):
        page = visit(address)
        page.locator("nav button").nth(3).click()
        page.locator(".chips button", has_text="dark").click()
        page.wait_for_selector(".drawn img")
        assert page.locator(".drawn img").count() == 4 and page.locator("main b").count() == 0
        page.locator("[name=seed]").fill("7")
        for times in (2, 3):
            page.locator("[name=prompt]").fill("light")
            page.locator("#card .go").click()
            page.wait_for_function(f"() => document.querySelectorAll('.answer').length === {times}")
        first, second = (page.locator(".answer").nth(i).locator("img").nth(0).get_attribute("src") for i in (0, 1))
        assert first == second and page.evaluate("() => document.querySelector('.drawn img').naturalWidth") == 8
        page.locator("[name=prompt]").fill("purple")
        page.locator("#card .go").click()
        page.wait_for_selector("#card .problem:not([hidden])")
        assert "purple" in page.locator("#card .problem").inner_text()
        page.locator("summary").click()
        assert "/v1/images/generations" in page.locator("#curl").inner_text()
