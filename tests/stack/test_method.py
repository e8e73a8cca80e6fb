"""`Method`: what each step keeps, and what it is predicted from."""

import numpy as np
import pytest
import torch

from resode_cuda import ResidualMLP, ResidualStack, Reverse
from resode_cuda.method import Method, anchored_steps, checked_anchors
from resode_cuda.reverse import extrapolation_weights
from resode_cuda.schemes import Euler, Heun
from tests.support.networks import block_count, mlps


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_weights_extrapolate_all_steps_but_the_last_two_which_have_their_own_increments(steps):
    lengths = tuple(0.1 + 0.02 * n for n in range(steps))
    method = Method(Heun, lengths, Reverse("extrapolate"))
    assert len(method.weights) == len(method) == steps
    assert method.weights[-2:] == ((0.0, -1.0),) * min(2, steps)
    for n in range(steps - 2):
        assert method.weights[n] == extrapolation_weights(Heun, lengths, n)
    assert method.kept_increments == min(2, steps)


def test_a_solver_that_does_not_extrapolate_keeps_no_increments():
    method = Method(Euler, (0.1,) * 5)
    assert (method.weights, method.kept_increments, method.reuses) == ((), 0, True)
    assert not Method(Euler, (0.1,), Reverse(reuse=False)).reuses


def test_anchors_have_places_in_the_order_of_their_steps():
    method = Method(Euler, (0.1,) * 6, anchors=(0, 3, 4))
    assert method.anchor_count == 3
    assert [method.anchor_place(n) for n in range(6)] == [0, None, None, 1, 2, None]
    assert [n for n in range(6) if method.is_anchored(n)] == [0, 3, 4]


def test_blocks_of_a_step():
    assert Method(Euler, (0.1,) * 4).block_count == 4
    method = Method(Heun, (0.1,) * 4)
    assert method.block_count == 5
    assert list(range(5))[method.blocks_of(3)] == [3, 4]


def test_equal_methods_are_one_key():
    one, other = (Method(Heun, (0.1, 0.2), Reverse("extrapolate"), (1,)) for _ in range(2))
    assert one == other
    assert {one: 1}[other] == 1
    assert one != Method(Heun, (0.1, 0.2), Reverse("extrapolate"))


@pytest.mark.parametrize(
    ("anchors", "checked", "numbers"),
    [
        (None, None, ()),
        (2, 2, (0, 2, 4)),
        (9, 9, (0,)),
        ({4, 0}, (0, 4), (0, 4)),
        ([3, 1, 3], (1, 3), (1, 3)),
        (range(2), (0, 1), (0, 1)),
        ((), (), ()),
        (torch.tensor(2), 2, (0, 2, 4)),
        (torch.tensor([4, 0]), (0, 4), (0, 4)),
        (np.array([4, 0]), (0, 4), (0, 4)),
        (torch.tensor([2]), (2,), (2,)),
        (np.array([2]), (2,), (2,)),
        (np.int64(2), 2, (0, 2, 4)),
        ((n for n in (3, 1)), (1, 3), (1, 3)),
    ],
)
def test_anchors_as_a_number_or_as_a_set_of_steps(anchors, checked, numbers):
    assert checked_anchors("here", anchors, 5) == checked
    assert anchored_steps(checked, 5) == numbers


@pytest.mark.parametrize(
    "anchors",
    [
        True,
        torch.tensor(True),
        np.True_,
        torch.tensor([True, False]),
        np.array([True]),
        [np.True_],
        2.0,
        torch.tensor(2.0),
    ],
    ids=repr,
)
def test_truth_values_and_fractions_are_no_anchors(anchors):
    with pytest.raises(TypeError, match=r"^here: anchors must be "):
        checked_anchors("here", anchors, 5)


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_settings_are_what_makes_a_module_behave_alike(scheme):
    settings = {
        "step": (0.1, 0.2, 0.3),
        "gradient": "checkpoint",
        "reverse": Reverse("extrapolate", 1),
        "anchors": {0, 2},
        "max_drift": 0.2,
        "on_drift": "raise",
    }
    stack = ResidualStack(mlps(scheme, 3), scheme, keep_input=True, **settings)
    assert stack.scheme == scheme
    assert stack.settings() == {
        **settings,
        "scheme": scheme,
        "form": "residual",
        "anchors": (0, 2),
        "stream_dtype": None,
        "keep_input": True,
        "auxiliary": None,
    }
    other = ResidualStack(mlps(scheme, 3), **stack.settings())
    assert len(other) == block_count(scheme, 3)
    assert other.settings() == stack.settings()
    mlp = ResidualMLP(6, 10, 3, scheme, **settings)
    assert mlp.settings() == {**settings, "scheme": scheme, "anchors": (0, 2)}
    assert mlp.to_blocks().settings() == {
        **mlp.settings(),
        "form": "residual",
        "stream_dtype": None,
        "keep_input": False,
        "auxiliary": None,
    }
