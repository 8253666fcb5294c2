"""Voice activity on made signals: what is voice, what is cut, and that a stream is cut as its pieces come."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from multihead.codec import activity
from multihead.codec.activity import FRAME, HANGOVER, Listener, active, joined, levels, original, spoken, stretches

RATE = 16000


def tone(seconds: float, loud: float = 8000) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    return (loud * np.sin(2 * np.pi * 440 * t)).astype(np.int16)


def hush(seconds: float, loud: float = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, loud, int(seconds * RATE)).astype(np.int16)


def test_the_level_of_a_tone_is_that_of_its_differences() -> None:
    # A sine of amplitude A and angle w a sample, less itself four samples before, has the amplitude 2 A sin(2 w).
    expected = 20 * np.log10(2 * 8000 / 32768 * np.sin(4 * np.pi * 440 / RATE) / np.sqrt(2))
    found = levels(tone(60))
    assert len(found) == 6000 and np.abs(found - expected).max() < 0.3
    assert np.allclose(levels(tone(1) + np.int16(3000)), found[:100], atol=1e-3)  # a constant is not heard
    assert len(levels(np.zeros(159, np.int16))) == 0


@pytest.mark.parametrize("noise", [0, 20, 200])
def test_ends_are_cut_and_pauses_shortened_whatever_the_noise(noise: float) -> None:
    parts = [hush(1, noise), tone(0.5), hush(2, noise, 1), tone(0.5), hush(1, noise, 2)]
    whole = np.concatenate(parts)
    spans = spoken(whole, 40.0)
    near = HANGOVER * FRAME + FRAME
    assert spans.shape == (1, 2) and abs(spans[0, 0] - RATE) <= near and abs(spans[0, 1] - 4 * RATE) <= near
    assert spans[0, 0] < RATE and spans[0, 1] > 4 * RATE  # nothing of the voice is lost
    cut = joined(whole, spoken(whole, 40.0, pause=0.4))
    assert len(cut) == len(joined(whole, spans)) - (2 * RATE - int(0.4 * RATE) - 2 * HANGOVER * FRAME)


def test_clicks_are_no_voice_and_silence_and_steady_sound_stay_whole() -> None:
    click = hush(4)
    click[RATE // 2 : RATE // 2 + 100] = 30000
    click[2 * RATE : 3 * RATE] = tone(1)
    (start, end), = spoken(click, 40.0)
    assert start >= 2 * RATE - (HANGOVER + 1) * FRAME and end <= 3 * RATE + (HANGOVER + 1) * FRAME
    for steady in (np.zeros(8000, np.int16), hush(1), tone(1), np.zeros(1, np.int16), hush(0.1)[:777]):
        assert np.array_equal(spoken(steady, 40.0, 0.3), [[0, len(steady)]])


def test_stretches_keep_half_of_a_pause_on_either_side() -> None:
    voice = np.zeros(40, bool)
    voice[[5, 6, 10, 30]] = True
    assert stretches(voice).tolist() == [[5, 31]]
    assert stretches(voice, 4).tolist() == [[5, 13], [28, 31]]
    assert stretches(~np.ones(3, bool)).tolist() == []
    level = np.full(10, -90.0, np.float32)
    level[[2, 5, 6, 7]] = 0, -10, -10, -10
    assert active(level, 30, burst=3, hangover=0).nonzero()[0].tolist() == [5, 6, 7]


def test_places_in_what_is_kept_are_places_in_the_whole() -> None:
    spans = np.array([[10, 20], [50, 60], [90, 100]])
    whole = np.arange(100)
    kept = joined(whole, spans)
    assert np.array_equal(original(np.arange(30), spans), kept)
    assert original(np.array([10, 20, 30]), spans, ends=True).tolist() == [20, 60, 100]


def heard(stream: np.ndarray, sizes: list[int], **options: int) -> list[tuple[int, int]]:
    listener, found, at, i = Listener(**options), [], 0, 0
    while at < len(stream):
        found += listener.push(stream[at : at + sizes[i % len(sizes)]])
        assert len(listener.held) <= listener.longest + RATE
        at, i = at + sizes[i % len(sizes)], i + 1
    return [(one.start, one.start + len(one.samples)) for one in [*found, *listener.finish()]]


def test_a_stream_is_cut_at_its_pauses_however_it_comes() -> None:
    stream = np.concatenate([hush(3), tone(1), hush(0.3), tone(1), hush(2), tone(0.7), hush(1.5), tone(0.5)])
    whole = heard(stream, [len(stream)])
    assert whole == heard(stream, [37, 1600, 5]) == heard(stream, [160])
    said = [(3.0, 5.3), (7.3, 8.0), (9.5, 10.0)]
    for (start, end), (first, last) in zip(whole, said, strict=True):
        assert first - 0.25 < start / RATE <= first and last - 0.01 <= end / RATE < last + 0.25


def test_what_never_pauses_is_cut_where_it_is_quietest_and_nothing_is_lost() -> None:
    # Eight syllables a second, weak for a fifth of a second at 5.0 s and at 9.2 s.
    t = np.arange(11 * RATE) / RATE
    stream = np.concatenate([hush(1), (tone(11) * np.abs(np.sin(2 * np.pi * 4 * t))).astype(np.int16)])
    for quiet in (5.0, 9.2):
        at = int(quiet * RATE)
        stream[at : at + RATE // 5] //= 4
    found = heard(stream, [1600], longest=5 * RATE)
    assert len(found) == 3 and all(b == c for (_, b), (c, _) in itertools.pairwise(found))
    assert found[0][1] / RATE == pytest.approx(5.1, abs=0.1) and found[1][1] / RATE == pytest.approx(9.3, abs=0.1)
    assert found[-1][1] == len(stream)


def test_noise_that_grows_is_heard_as_voice_only_for_a_while() -> None:
    stream = np.concatenate([hush(2, 5), hush(30, 60)])
    listener = Listener()
    listener.push(stream)
    assert not listener.speaking and listener.current is None
    assert listener.noise > activity.SILENCE
