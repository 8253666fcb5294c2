"""Which frames each token of a text is spoken in, found while learning: monotonic alignment search.

Legend: B recordings, S tokens, T frames, M mel bands.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPREAD = 0.2
"""How far from the straight line an alignment may stray before it costs anything, as a share of the whole."""
NEVER = np.float32(-1e30)


def likelihood(mean_BSM: Tensor, mel_BTM: Tensor) -> Tensor:
    """Log-likelihood of every frame under every token's normal distribution of deviation 1, but for a constant:
    (B, S, T)."""
    both_BST = mean_BSM @ mel_BTM.mT
    return both_BST - 0.5 * (mean_BSM.square().sum(2)[:, :, None] + mel_BTM.square().sum(2)[:, None])


def straight(tokens: np.ndarray, frames: np.ndarray, S: int, T: int) -> np.ndarray:
    """From 0 on the straight line to −1 far off it (Tachibana et al. 2018, section 3.3, the logarithm's place being
    taken by its complement): (B, S, T) float32."""
    along_BS = (np.arange(S) + 0.5) / tokens[:, None]
    past_BT = (np.arange(T) + 0.5) / frames[:, None]
    apart_BST = along_BS[:, :, None] - past_BT[:, None]
    return (np.exp(-(apart_BST**2) / (2 * SPREAD**2)) - 1).astype(np.float32)


def search(score_BST: np.ndarray, tokens: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Frames of each token (B, S), at least one each, whose path through the scores is the best of all that go through
    every token in order (Kim et al. 2020, "Glow-TTS", algorithm 1).

    Args:
        score_BST: with anything behind each of `tokens` and `frames` (B,); a row needs as many frames as tokens.
    """
    B, S, T = score_BST.shape
    best_BS = np.full((B, S), NEVER, np.float32)
    best_BS[:, 0] = score_BST[:, 0, 0]
    moved_TBS = np.zeros((T, B, S), bool)
    shifted_BS = np.full_like(best_BS, NEVER)
    for t in range(1, T):
        shifted_BS[:, 1:] = best_BS[:, :-1]
        moved_TBS[t] = shifted_BS > best_BS
        best_BS = np.maximum(best_BS, shifted_BS) + score_BST[:, :, t]
    found_BS, at_B, row_B = np.zeros((B, S), np.int64), tokens.astype(np.int64) - 1, np.arange(B)
    for t in range(T - 1, -1, -1):
        real_B = t < frames
        found_BS[row_B, at_B] += real_B
        # The path must be able to reach the first token at the first frame.
        at_B = at_B - (real_B & (at_B > 0) & (moved_TBS[t, row_B, at_B] | (at_B >= t)))
    return found_BS


def aligned(mean_BSM: Tensor, mel_BTM: Tensor, tokens_B: Tensor, frames_B: Tensor, pull: float) -> Tensor:
    """Frames of each token (B, S) by what the model says of them now.

    Args:
        pull: how much the straight line counts, in units of a frame's likelihood; it decides only while the model
            knows nothing yet.
    """
    with torch.no_grad(), torch.autocast(mel_BTM.device.type, enabled=False):
        score_BST = likelihood(mean_BSM.float(), mel_BTM.float()).cpu().numpy()
    tokens, frames = tokens_B.cpu().numpy(), frames_B.cpu().numpy()
    score_BST = score_BST + np.float32(pull) * straight(tokens, frames, *score_BST.shape[1:])
    return torch.from_numpy(search(score_BST, tokens, frames)).to(mel_BTM.device)


def spread(durations_BS: Tensor, T: int) -> Tensor:
    """Which token each of T frames belongs to, (B, T); frames behind the end belong to the last."""
    ends_BS = durations_BS.cumsum(1)
    frames_BT = torch.arange(T, device=ends_BS.device).expand(len(ends_BS), T).contiguous()
    return torch.searchsorted(ends_BS, frames_BT, right=True).clamp(max=durations_BS.shape[1] - 1)
