"""How far one spectrogram is from another of the same words: mel-cepstral distance along the best path of time.

Legend: N, M frames of either, B bands, C coefficients.
"""

from __future__ import annotations

import math

import numpy as np

COEFFICIENTS = 13


def cepstra(log_mel_NB: np.ndarray, coefficients: int = COEFFICIENTS) -> np.ndarray:
    """Natural logarithms of amplitudes in mel bands → coefficients 1 to C of their orthonormal cosine transform (the
    0th, loudness, left out): (N, C)."""
    B = log_mel_NB.shape[1]
    angle_CB = np.pi * np.arange(1, coefficients + 1)[:, None] * (np.arange(B) + 0.5) / B
    return log_mel_NB @ (math.sqrt(2 / B) * np.cos(angle_CB)).T


def warped(cost_NM: np.ndarray) -> list[tuple[int, int]]:
    """The path from the first pair of frames to the last with the least sum of costs, each step going on by one frame
    in either or both (Sakoe & Chiba 1978, without slope constraint)."""
    N, M = cost_NM.shape
    total = np.full((N + 1, M + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(2, N + M + 1):
        i = np.arange(max(1, diagonal - M), min(N, diagonal - 1) + 1)
        j = diagonal - i
        before = np.minimum(total[i - 1, j - 1], np.minimum(total[i - 1, j], total[i, j - 1]))
        total[i, j] = cost_NM[i - 1, j - 1] + before
    path, i, j = [], N, M
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        steps = ((total[i - 1, j - 1], i - 1, j - 1), (total[i - 1, j], i - 1, j), (total[i, j - 1], i, j - 1))
        _, i, j = min(steps, key=lambda step: step[0])
    return path[::-1]


def distortion(a_NB: np.ndarray, b_MB: np.ndarray) -> float:
    """Mel-cepstral distance in decibels, 10 / ln 10 · √(2 Σ (c − c')²), its mean over the best path (Kubichek 1993; the
    path as in Weiss et al. 2021): of smoothed log spectra the root mean square difference. It depends on bands and
    coefficients: compare figures of one kind only."""
    a_NC, b_MC = cepstra(a_NB), cepstra(b_MB)
    square_NM = (a_NC**2).sum(1)[:, None] + (b_MC**2).sum(1) - 2 * a_NC @ b_MC.T
    # The orthonormal transform over c of ln |S(ω)| = Σ c_n cos(n ω) is √(B / 2).
    scale = 2 / a_NB.shape[1]
    cost_NM = 10 / math.log(10) * np.sqrt(2 * np.maximum(square_NM, 0) * scale)
    return float(np.mean([cost_NM[i, j] for i, j in warped(cost_NM)]))
