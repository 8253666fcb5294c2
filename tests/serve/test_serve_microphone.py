"""The page at / in a real browser: it takes a recording from a file and from the microphone."""

from __future__ import annotations

import os

import numpy as np
import pytest
import serve_models as models
from test_serve_page import CHROMIUM, FLAGS, serving

from multihead.codec.audio import wav

FAKE = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


def test_a_recording_from_a_file_and_one_from_the_microphone():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no Chromium at {CHROMIUM}; install it, or name it in CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra [dev] is not installed")
    hears = models.ears(decoder_layers=0, chunk=2)
    with sync_api.sync_playwright() as playwright, serving(hears, max_body_bytes=1 << 22) as (address, _):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + FAKE)
        page = browser.new_context(locale="en-US").new_page()
        faults: list[str] = []
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.get_by_role("tab", name="ears").click()
        file = {"name": "a.wav", "mimeType": "audio/wav", "buffer": wav(np.zeros(9000, np.int16))}
        page.locator("input[type=file]").set_input_files(file)
        page.locator(".answer").first.wait_for(timeout=20_000)
        page.get_by_role("button", name="Record").click()
        page.get_by_role("button", name="Done").wait_for(timeout=20_000)
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Done").click()
        page.wait_for_function("() => document.querySelectorAll('.answer').length === 2", timeout=20_000)
        assert page.locator(".answer audio").count() == 2
        assert page.locator(".answers").inner_text().count("seconds") == 2
        assert not faults, faults
        browser.close()
