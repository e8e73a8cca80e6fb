"""What a model's own loop may do between converted layers: it gets what the layers alone give, and their gradients."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from tests.models.layers import DIM
from tests.support.loops import check


def collected(layers, x):
    states = []
    for layer in layers:
        states.append(x)
        x = layer(x)
    return x + sum(state.sin() for state in states[1:])


def one_kept(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x)
        if n == 2:
            kept = x
    return x * kept


def arguments_by_layer(layers, x):
    scales = torch.linspace(0.5, 2, len(layers), dtype=x.dtype)
    for layer, scale in zip(layers, scales, strict=True):
        x = layer(x, scale=scale)
    return x


def two_kinds_of_arguments(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x, torch.tensor(0.5, dtype=x.dtype)) if n % 2 else layer(x)
    return x


def sliced(layers, x):
    for layer in layers[: len(layers)]:
        x = layer(x)
    return x


def looked_at(layers, x):
    for layer in layers:
        x = layer(x)
        assert x.shape[0] == len(x) == 4
        assert x.dtype == torch.float64
        assert x.dim() == x.ndim == 2
        assert x.size(-1) == x.size()[1] == DIM
        assert x.to(x.device) is x
    return x


@pytest.mark.parametrize("loop", [collected, one_kept, arguments_by_layer, two_kinds_of_arguments, sliced, looked_at])
def test_loops_that_run_as_a_stack(loop):
    check(loop)


def measured(layers, x):
    for layer in layers:
        x = layer(x)
        with torch.no_grad():
            assert x.norm() > 0
        with torch.inference_mode():
            assert x.norm() > 0
    return x


def told_apart(layers, x):
    for layer in layers:
        out = layer(x)
        x = out if torch.is_tensor(out) else out[0]
    return x


def state_before_used(layers, x):
    extra = 0
    for n, layer in enumerate(layers):
        new = layer(x)
        if n in (2, 3):
            extra = extra + x.mean()
        x = new
    return x + extra


def arguments_written(layers, x):
    scale = torch.ones((), dtype=x.dtype)
    for layer in layers:
        scale = scale.clone()
        scale.mul_(0.9)
        x = layer(x, scale=scale)
    return x


def last_input_kept(layers, x):
    for n, layer in enumerate(layers):
        if n == 5:
            before = x
        x = layer(x)
    return x + before


def kept_and_random(layers, x):
    for layer in layers:
        x = layer(x) if torch.rand(()) < 2 else x
    return x


def with_seeds_of_their_own(layers, x):
    for n, layer in enumerate(layers):
        with torch.random.fork_rng():
            torch.manual_seed(n)
            x = layer(x)
    return x


def skips(layers, x):
    states = []
    for n, layer in enumerate(layers):
        states.append(x)
        x = layer(x, scale=states[n - 2].mean() if n > 2 else None)
    return x


@pytest.mark.parametrize(
    "loop",
    [
        measured,
        told_apart,
        state_before_used,
        arguments_written,
        last_input_kept,
        kept_and_random,
        with_seeds_of_their_own,
        skips,
    ],
)
def test_loops_that_do_more_than_call(loop):
    check(loop)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def through_a_function(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x)
        x = Reversed.apply(x) if n == 2 else x
    return x


def scaled_between(layers, x):
    for n, layer in enumerate(layers):
        x = layer(2 * x if n == 3 else x)
    return x


def normed_between(layers, x):
    for n, layer in enumerate(layers):
        x = layer(nn.functional.layer_norm(x, (DIM,)) if n == 3 else x)
    return x


def written_between(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x)
        if n == 2:
            x += 1
    return x


def one_left_out(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x) if n != 2 else x
    return x


@pytest.mark.parametrize("loop", [through_a_function, scaled_between, normed_between, written_between, one_left_out])
def test_where_a_state_is_another_a_chain_begins(loop):
    check(loop, "in 2 pieces")


def twins(layers, x):
    y = x.flip(0)
    for layer in layers:
        x, y = layer(x), layer(y)
    return x * y


def left_early(layers, x):
    for layer in layers[:4]:
        x = layer(x)
    return x


def one_twice(layers, x):
    for n in (0, 1, 1, 2, 3, 4, 5):
        x = layers[n](x)
    return x


def backwards(layers, x):
    for layer in reversed(layers):
        x = layer(x)
    return x


def only_one(layers, x):
    return layers[3](x)


def stopped_gradients(layers, x):
    for n, layer in enumerate(layers):
        with torch.set_grad_enabled(n not in (2, 3)):
            x = layer(x)
    return x


def precision_by_layer(layers, x):
    for n, layer in enumerate(layers):
        with torch.autocast("cpu", torch.bfloat16, enabled=n % 2 == 0):
            x = layer(x)
    return x


@pytest.mark.parametrize(
    "loop", [twins, left_early, one_twice, backwards, only_one, stopped_gradients, precision_by_layer]
)
def test_loops_in_another_order(loop):
    check(loop, "")


def by_checkpoint(layers, x):
    for layer in layers:
        x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    return x


def test_a_loop_that_checkpoints_its_layers():
    check(by_checkpoint, "")


def test_two_stages_that_call_each_other_in_turn():
    def in_turn(layers, x):
        y = x.flip(0)
        for n in range(0, 6, 2):
            x = layers[n](x)
            y = layers[n + 1](y, scale=x.mean())
        return y + x

    check(in_turn, "")
