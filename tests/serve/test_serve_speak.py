"""The page at / plays what it synthesises, in a real browser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_serve_page import browser, serving, visit  # noqa: F401

from multihead.codec.audio import RATE, wav
from multihead.data.audio import to_uri
from multihead.serve.app import Served
from multihead.tasks.speech.text_to_speech import TextToSpeech
from multihead.transformer.config import TransformerConfig


@pytest.fixture
def lectern() -> Served:
    task = TextToSpeech(TextToSpeech.Options(mels=20, text_layers=1, steps=2, max_seconds=5))
    tone = (8000 * np.sin(np.arange(RATE // 2) / 5)).astype(np.int16)
    task.fit([{"audio": to_uri(wav(tone))[0], "text": "<b>abc</b>", "speaker": name} for name in ("one", "two")])
    torch.manual_seed(0)
    return Served("lectern", task, task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval(),
                  examples=[{"text": "<b>abc</b>"}])


def test_the_page_reads_aloud_in_a_voice_and_the_same_again_for_a_seed(lectern, visit) -> None:  # noqa: F811
    with serving(lectern) as (address, _):
        page = visit(address)
        page.locator("nav button").nth(3).click()
        page.locator(".chips button", has_text="abc").click()
        page.wait_for_selector(".answer audio")
        assert page.locator("main b").count() == 0
        page.locator("[name=voice]").select_option("two")
        page.locator("[name=seed]").fill("7")
        for times in (2, 3):
            page.locator("[name=text]").fill("cab")
            page.locator("#card .go").click()
            page.wait_for_function(f"() => document.querySelectorAll('.answer').length === {times}")
        first, second = (page.locator(".answer audio").nth(i).get_attribute("src") for i in (0, 1))
        assert first == second and first.startswith("data:audio/wav;base64,UklGR")
        assert page.evaluate("""async () => { const player = document.querySelector('.answer audio');
            await new Promise((done) => player.readyState ? done() : player.addEventListener('loadedmetadata', done));
            return player.duration; }""") > 0.02
        page.locator("[name=text]").fill("???")
        page.locator("#card .go").click()
        page.wait_for_selector("#card .problem:not([hidden])")
        page.locator("summary").click()
        shown = page.locator("#curl").inner_text()
        assert "/v1/audio/speech" in shown and '"voice":"two"' in shown
