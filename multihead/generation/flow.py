"""Pictures out of noise along a velocity field: flow matching's paths, its samplers, and guidance.

A path leads straight from noise x₀ ~ N(0, I) at time 0 to data x₁ at time 1: x_t = (1 − t) x₀ + t x₁, and a model
learns its velocity x₁ − x₀ (Lipman et al. 2023, "Flow Matching for Generative Modeling", section 4.1; Liu et al. 2023,
"Flow Straight and Fast", section 2.1). A sampler follows dx/dt = v(x, t) from 0 to 1.

Legend: B pictures, … the axes of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from multihead.errors import Problem, UserError, tr

Method = Literal["euler", "midpoint", "heun"]
METHODS: tuple[str, ...] = get_args(Method)
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, …), t (B,)) → dx/dt (B, …)."""
MOST_STEPS, MOST_PICTURES, MOST_GUIDANCE = 100, 10, 20.0
SEEDS = 1 << 63


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. `seed`: of the first of `n` pictures; the others have the numbers behind it."""

    steps: int = 20
    guidance: float = 1.0
    method: Method = "heun"
    n: int = 1
    seed: int = 0

    @classmethod
    def of(cls, ask: dict[str, Any], **defaults: Any) -> Drawing:
        """What a caller asks for, over `defaults`; what is no wish of this kind is passed over.

        Raises:
            UserError: every wish that cannot be granted, with what is allowed; before anything is computed.
        """
        given = {**defaults, **{name: ask[name] for name in ASKS if ask.get(name) is not None}}
        problems = [*_whole("steps", given, 1, MOST_STEPS), *_whole("n", given, 1, MOST_PICTURES),
                    *_whole("seed", given, 0, SEEDS - MOST_PICTURES)]
        guidance = given.get("guidance", 1.0)
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 0 <= guidance <= MOST_GUIDANCE:
            problems.append(Problem(tr(f"guidance is {guidance!r}; it must be a number from 0 to {MOST_GUIDANCE:g}",
                                       f"guidance 是 {guidance!r}，应为 0 到 {MOST_GUIDANCE:g} 的数")))
        if given.get("method", "heun") not in METHODS:
            problems.append(Problem(tr(f"method is {given['method']!r}; it is one of: {', '.join(METHODS)}",
                                       f"method 是 {given['method']!r}，应为：{'、'.join(METHODS)}")))
        if problems:
            raise UserError.many(problems)
        return cls(**given)


ASKS = ("steps", "guidance", "method", "n", "seed")


def _whole(name: str, given: dict[str, Any], least: int, most: int) -> list[Problem]:
    value = given.get(name, least)
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    return [Problem(tr(f"{name} is {value!r}; it must be a whole number from {least} to {most}",
                       f"{name} 是 {value!r}，应为 {least} 到 {most} 的整数"))]


# -- the path ----------------------------------------------------------------------------------------------------------


def on_path(noise: Tensor, data: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the straight path from `noise` to `data` is at time t (B,), and its velocity there; each (B, …)."""
    t = t_B.view(-1, *[1] * (data.dim() - 1))
    return torch.lerp(noise, data, t), data - noise


def draw_time(rng: np.random.Generator, kind: str) -> float:
    """A time to learn at, from 0 to 1: "uniform", or "logit_normal", which is 1 / (1 + e⁻ᶻ) of a normal z: more often
    in the middle, where the velocity is hardest to tell (Esser et al. 2024, section 3.1)."""
    return float(rng.random()) if kind == "uniform" else float(1 / (1 + np.exp(-rng.standard_normal())))


def noise_of(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Normal noise (B, *shape), each picture's from a generator of its own: the same alone and in a batch, and drawn on
    the CPU, so the same on every device."""
    drawn = [torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(drawn).to(device)


# -- following it ------------------------------------------------------------------------------------------------------


def integrate(velocity: Velocity, x: Tensor, steps: int, method: Method = "heun") -> Tensor:
    """Follow dx/dt = velocity from time 0 to 1 in even steps: (B, …) → (B, …).

    "euler" asks once a step and errs by O(h); "midpoint" and "heun" (Hairer et al. 1993, section II.1) ask twice and
    err by O(h²). Heun's last step asks once: its second look would be at time 1 itself, where there is no noise left to
    tell from data (Karras et al. 2022, algorithm 1).
    """
    for i in range(steps):
        t, h = i / steps, 1 / steps
        here = velocity(x, x.new_full((len(x),), t))
        if method == "midpoint":
            x = x + h * velocity(x + 0.5 * h * here, x.new_full((len(x),), t + 0.5 * h))
        elif method == "heun" and i < steps - 1:
            there = velocity(x + h * here, x.new_full((len(x),), t + h))
            x = x + 0.5 * h * (here + there)
        else:
            x = x + h * here
    return x


def guided(both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], scale: float) -> Velocity:
    """Classifier-free guidance (Ho & Salimans 2022, section 3.2): v = v_free + scale · (v_told − v_free).

    Args:
        both: (x, t) → the velocities of a model that was told what to draw, and of the same one that was not.
    """

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        told, free = both(x, t_B)
        return torch.lerp(free, told, scale)

    return velocity
