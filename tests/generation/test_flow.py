"""Samplers against a velocity field whose flow is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from multihead.errors import UserError
from multihead.generation import flow

MEAN, DEVIATION = 1.5, 0.4


def gaussian(x: Tensor, t_B: Tensor) -> Tensor:
    """E[x₁ − x₀ | x_t = x] where x₁ ~ N(MEAN, DEVIATION²) and x₀ ~ N(0, 1): its flow sends x to MEAN + DEVIATION·x."""
    t, var = t_B[:, None], DEVIATION**2
    return MEAN + (t * var - (1 - t)) / (t**2 * var + (1 - t) ** 2) * (x - t * MEAN)


def test_every_sampler_arrives_where_the_closed_form_says_at_its_own_order() -> None:
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    end = MEAN + DEVIATION * start
    for method, order in (("euler", 1), ("midpoint", 2), ("heun", 2)):
        errors = [float((flow.integrate(gaussian, start, n, method) - end).abs().max()) for n in (40, 80, 160)]
        found = np.log2(np.array(errors[:-1]) / errors[1:])
        # The symmetry of this field cancels more of a midpoint step than its order promises.
        assert errors[-1] < 0.02 and np.all(found > order - 0.35), (method, errors, found)


def test_a_path_begins_in_noise_ends_in_data_and_is_straight() -> None:
    noise, data = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x, velocity = flow.on_path(noise, data, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(x[0], noise[0])
    torch.testing.assert_close(x[2], data[2])
    torch.testing.assert_close(x[1] + 0.75 * velocity[1], data[1])


def test_guidance_of_one_is_what_was_told_and_of_zero_what_was_not() -> None:
    told, free = torch.randn(2, 3), torch.randn(2, 3)
    for scale, expected in ((1.0, told), (0.0, free), (3.0, free + 3 * (told - free))):
        torch.testing.assert_close(flow.guided(lambda x, t: (told, free), scale)(told, told), expected)


def test_the_noise_of_a_seed_does_not_depend_on_its_company() -> None:
    together = flow.noise_of([7, 8, 7], (1, 4, 4))
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(flow.noise_of([8], (1, 4, 4))[0], together[1])


def test_times_are_drawn_as_their_name_says() -> None:
    rng = np.random.default_rng(0)
    even, middle = (np.array([flow.draw_time(rng, kind) for _ in range(4000)]) for kind in ("uniform", "logit_normal"))
    assert abs(even.var() - 1 / 12) < 0.005 and abs(even.mean() - 0.5) < 0.02
    logit = np.log(middle / (1 - middle))
    assert abs(logit.mean()) < 0.06 and abs(logit.std() - 1) < 0.05


WRONG = [{"steps": 0}, {"steps": 10**9}, {"steps": "20"}, {"n": 11}, {"n": True}, {"guidance": float("nan")},
         {"guidance": -1}, {"method": "dopri5"}, {"seed": -1}, {"seed": 2**63}]  # fmt: skip


@pytest.mark.parametrize("ask", WRONG)
def test_wishes_that_cannot_be_granted_are_named(ask: dict) -> None:
    with pytest.raises(UserError, match=next(iter(ask))):
        flow.Drawing.of(ask, steps=20)


def test_all_wishes_at_fault_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        flow.Drawing.of({"steps": 0, "n": 99, "method": "x"})
    assert len(caught.value.problems) == 3
