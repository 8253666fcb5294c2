"""Where somebody speaks: voice activity by energy, for whole recordings and for sound as it comes.

Energy is measured every 10 ms on the difference of samples 0.25 ms apart, which hears 500 to 3,500 Hz best and neither
a constant nor hum. A burst shorter than a syllable (a click, a key) is no voice; around what is voice a moment is left,
since words begin and end quietly.

Legend: N samples, T frames, K stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAME = 160
"""Samples of a frame at 16 kHz: 10 ms."""
APART = 4
BURST, HANGOVER = 5, 15
"""Frames: shorter is no voice; so many are left before and after it."""
NEAREST = 20.0
"""Noise is never cut nearer to the loudest than so many decibels: what is that loud may be a quiet vowel."""
ABOVE = 6.0
"""Decibels above the noise that are voice."""
SILENCE = -100.0
_BLOCK = 1 << 10  # frames


def levels(samples_N: np.ndarray) -> np.ndarray:
    """Decibels of full scale of each whole frame of (N,) int16: (⌊N / FRAME⌋,) float32. Memory: a block of samples."""
    T = len(samples_N) // FRAME
    found_T = np.empty(T, np.float32)
    for first in range(0, T, _BLOCK):
        last = min(T, first + _BLOCK)
        block = samples_N[first * FRAME : last * FRAME].reshape(-1, FRAME).astype(np.float32) / 32768
        power_T = np.square(block[:, APART:] - block[:, :-APART]).mean(1)
        found_T[first:last] = 10 * np.log10(power_T + 10 ** (SILENCE / 10))
    return found_T


def active(level_T: np.ndarray, below: float, burst: int = BURST, hangover: int = HANGOVER) -> np.ndarray:
    """Which frames are voice, (T,) bool: those at most `below` decibels quieter than the loudest and above the noise.

    The noise is what one frame in ten is not louder than. Bursts shorter than `burst` frames count as what surrounds
    them (a morphological opening), also where the loudest is looked for; `hangover` frames are added on both sides.
    Nothing but bursts: none is voice.
    """
    if not len(level_T):
        return np.zeros(0, bool)
    smooth_T = _widest(_least(level_T, burst), burst)
    loudest = float(smooth_T.max())
    noise = float(np.quantile(level_T, 0.1))
    limit = max(loudest - below, min(noise + ABOVE, loudest - NEAREST))
    voice_T = (smooth_T >= limit) & (loudest > SILENCE + ABOVE)
    return _widest(voice_T, 2 * hangover + 1)


def _least(x_T: np.ndarray, width: int) -> np.ndarray:
    """The least of `width` neighbours, of which the frame itself is the one in the middle; an end counts as more."""
    return -_widest(-x_T, width, reverse=True)


def _widest(x_T: np.ndarray, width: int, reverse: bool = False) -> np.ndarray:
    """The largest of `width` neighbours."""
    before = (width - 1) // 2 if not reverse else width // 2
    low = np.finfo(x_T.dtype).min if x_T.dtype.kind == "f" else False
    padded = np.pad(x_T, (before, width - 1 - before), constant_values=low)
    return np.lib.stride_tricks.sliding_window_view(padded, width).max(1)


def stretches(voice_T: np.ndarray, pause: int = 0) -> np.ndarray:
    """First and last+1 frame of what is kept, (K, 2): from the first voice to the last; of each silence between longer
    than `pause` frames only so many are left, half of them on either side. 0: silences stay as they are."""
    edges = np.flatnonzero(np.diff(voice_T.astype(np.int8), prepend=0, append=0))
    spans_K2 = edges.reshape(-1, 2)
    if not len(spans_K2):
        return spans_K2
    gaps = spans_K2[1:, 0] - spans_K2[:-1, 1]
    cut = np.flatnonzero(gaps > pause) if pause else np.zeros(0, int)
    starts = np.concatenate((spans_K2[:1, 0], spans_K2[cut + 1, 0] - (pause - pause // 2)))
    ends = np.concatenate((spans_K2[cut, 1] + pause // 2, spans_K2[-1:, 1]))
    return np.stack((starts, ends), axis=1)


def spoken(samples_N: np.ndarray, below: float, pause: float = 0.0) -> np.ndarray:
    """First and last+1 sample of the stretches of (N,) int16 in which somebody speaks, (K, 2) int32: the ends are cut,
    silences longer than `pause` seconds are shortened to it. Where nobody speaks, the whole recording.

    Args:
        below: decibels below the loudest that count as silence.
    """
    frames_K2 = stretches(active(levels(samples_N), below), round(pause * 16000 / FRAME))
    if not len(frames_K2):
        return np.array([[0, len(samples_N)]], np.int32)
    spans_K2 = frames_K2 * FRAME
    if spans_K2[-1, 1] == len(samples_N) // FRAME * FRAME:
        spans_K2[-1, 1] = len(samples_N)
    return spans_K2.astype(np.int32)


def joined(x_N: np.ndarray, spans_K2: np.ndarray) -> np.ndarray:
    """The stretches of `x_N` end to end."""
    return np.concatenate([x_N[start:end] for start, end in spans_K2])


def original(times: np.ndarray, spans_K2: np.ndarray, ends: bool = False) -> np.ndarray:
    """Places in `joined` sound → places in the whole it was cut from.

    Args:
        ends: a place between two stretches is the end of the first, not the start of the second.
    """
    sizes = spans_K2[:, 1] - spans_K2[:, 0]
    begins = np.concatenate(([0], sizes.cumsum()[:-1]))
    at = np.searchsorted(begins, times, side="left" if ends else "right") - 1
    at = at.clip(0, len(sizes) - 1)
    return spans_K2[at, 0] + np.minimum(np.asarray(times) - begins[at], sizes[at])


def quietest(level_T: np.ndarray) -> int:
    """The frame in the middle of the quietest fifth of a second of (T,) decibels."""
    width = min(20, len(level_T))
    power = np.convolve(10 ** (np.asarray(level_T, np.float64) / 10), np.ones(width), "valid")
    return int(power.argmin()) + width // 2


def pieces(samples_N: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """First and last+1 sample of pieces of (N,) int16 that are at most `longest`, end to end; cut where it is quietest
    in the second half of what may be taken."""
    found, start = [], 0
    while len(samples_N) - start > longest:
        middle = start + longest // 2
        end = middle + quietest(levels(samples_N[middle : start + longest])) * FRAME
        found.append((start, end))
        start = end
    return [*found, (start, len(samples_N))]


# -- sound as it comes -------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What somebody has said so far, or said."""

    samples: np.ndarray
    """(N,) int16."""
    start: int
    """Samples of the whole stream before it."""
    whole: bool
    """True where it has ended, with a pause or because it grew too long."""


class Listener:
    """Cuts a stream of samples into what is said between pauses. Holds at most `longest` samples.

    The noise is followed downwards at once and upwards slowly; a frame is voice where it is `above` decibels louder.

    Args:
        pause: samples of silence that end an utterance.
        longest: samples after which one is cut, at its quietest moment in the last quarter.
    """

    RISE = 0.03
    """Decibels a frame by which the noise may be louder than was thought: 3 a second."""
    FIRST = -55.0

    def __init__(self, pause: int = 9600, longest: int = 20 * 16000, above: float = 10.0, least: float = -65.0) -> None:
        self.pause, self.longest, self.above, self.least = max(1, pause // FRAME), longest, above, least
        self.noise = self.FIRST
        self.held = np.zeros(0, np.int16)
        """Samples since the utterance began or, in silence, the last moment."""
        self.levels: list[float] = []
        self.read = 0
        """Samples of the stream so far."""
        self.loud = self.quiet = 0
        """Frames of voice in a row before the utterance counts; frames of silence since the last voice."""
        self.speaking = False

    def push(self, samples: np.ndarray) -> list[Heard]:
        """More samples, (n,) int16: the utterances that they end."""
        found: list[Heard] = []
        # A second at a time: what is held must stay bounded however much comes at once.
        for first in range(0, len(samples), 16000):
            self._take(samples[first : first + 16000], found)
        return found

    def _take(self, samples: np.ndarray, found: list[Heard]) -> None:
        self.held, self.read = np.concatenate((self.held, samples)), self.read + len(samples)
        for level in levels(self.held[len(self.levels) * FRAME :]).tolist():
            self.levels.append(level)
            self._frame(level, found)
        if self.speaking and len(self.held) >= self.longest:
            self._cut(found)

    def _frame(self, level: float, found: list[Heard]) -> None:
        self.noise = max(min(level, self.noise + self.RISE), self.least - self.above)
        voice = level > max(self.noise + self.above, self.least)
        self.loud, self.quiet = (self.loud + 1, 0) if voice else (0, self.quiet + 1)
        if not self.speaking and self.loud >= BURST:
            self.speaking = True
        elif self.speaking and self.quiet >= self.pause:
            end = (len(self.levels) - self.quiet + HANGOVER) * FRAME
            self._end(end, found)
        elif not self.speaking and len(self.levels) > HANGOVER + BURST:
            self._forget(len(self.levels) - HANGOVER - BURST)

    def _forget(self, frames: int) -> None:
        del self.levels[:frames]
        self.held = self.held[frames * FRAME :]

    def _end(self, end: int, found: list[Heard]) -> None:
        found.append(Heard(self.held[:end].copy(), self.read - len(self.held), True))
        self._forget(len(self.levels))
        self.speaking, self.loud, self.quiet = False, 0, 0

    def _cut(self, found: list[Heard]) -> None:
        """End an utterance that goes on, at its quietest fifth of a second late in it."""
        first = len(self.levels) * 3 // 4
        at = first + quietest(np.array(self.levels[first:]))
        found.append(Heard(self.held[: at * FRAME].copy(), self.read - len(self.held), True))
        self._forget(at)

    @property
    def current(self) -> Heard | None:
        """What is being said; None in silence."""
        if not self.speaking:
            return None
        return Heard(self.held.copy(), self.read - len(self.held), False)

    def finish(self) -> list[Heard]:
        """No more samples: what was not ended by a pause."""
        return [Heard(self.held, self.read - len(self.held), True)] if self.speaking else []


__all__ = ["Heard", "Listener", "active", "joined", "levels", "original", "pieces", "quietest", "spoken",
           "stretches"]
