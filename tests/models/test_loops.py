"""What a model's own loop may do with the states between converted layers: it gets what the layers alone give."""

import copy
import warnings

import pytest
import torch
from torch import nn

from resode_cuda import conversion, convert
from tests.models.layers import DIM, Layer, Model

STACKED, BY_LAYER = "as a stack", "layer by layer"


def rows(count=4):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model, x):
    """Output, and the gradients of all parameters."""
    torch.manual_seed(2)
    out = model(x)
    out.square().sum().backward()
    return out, [parameter.grad for parameter in model.parameters()]


def check(loop, last_pass=STACKED, dropout=0.2, layer=Layer, exact=1e-12):
    """A converted model beside its twin: the output to the last bit, the gradients with every state kept."""
    torch.manual_seed(0)
    twin = Model(6, dropout=dropout, loop=loop, layer=layer).double()
    model = convert(copy.deepcopy(twin), ["layers"], anchors=1)
    out, gradients = trained(model, rows())
    wanted, exact_gradients = trained(twin, rows())
    assert torch.equal(out, wanted)
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if other is not None:
            assert (gradient - other).norm() <= exact * other.norm().clamp_min(1e-12)
    assert conversion(model).stages[0].last_pass.startswith(last_pass)
    return model


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
            x = x.clone()
            x[0] = 0
    return x


def left_early(layers, x):
    for layer in layers[:4]:
        x = layer(x)
    return x


def one_left_out(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x) if n != 2 else x
    return x


def one_twice(layers, x):
    for n in (0, 1, 1, 2, 3, 4, 5):
        x = layers[n](x)
    return x


def backwards(layers, x):
    for layer in reversed(layers):
        x = layer(x)
    return x


def printed(layers, x):
    for layer in layers:
        x = layer(x)
        if x.mean() > 1e9:
            raise ValueError
    return x


def only_some(layers, x):
    return layers[3](x)


QUIET = pytest.mark.filterwarnings("ignore:converted layers of layers ran one by one:RuntimeWarning")


@QUIET
@pytest.mark.parametrize("loop", [scaled_between, normed_between, written_between, left_early, one_left_out, printed])
def test_loops_that_use_a_state_in_between_run_layer_by_layer(loop):
    check(loop, BY_LAYER, dropout=0.0 if loop is one_left_out else 0.2)


def test_it_is_said_once_where_activations_are_kept():
    torch.manual_seed(0)
    model = convert(Model(6, loop=scaled_between).double(), ["layers"])
    with pytest.warns(RuntimeWarning, match=r"layers ran one by one in a training pass.*: something uses a state"):
        model(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(rows())


@QUIET
@pytest.mark.parametrize("loop", [one_twice, backwards, only_some])
def test_loops_in_another_order(loop):
    check(loop, "", dropout=0.0)


class Tupled(Layer):
    def forward(self, x, scale=None):
        return (super().forward(x, scale),)


class Talkative(Layer):
    def forward(self, x, scale=None):
        out = super().forward(x, scale)
        return out, out.mean()


def of_tuples(layers, x):
    for layer in layers:
        x = layer(x)[0]
    return x


@QUIET
def test_layers_that_return_tuples():
    check(of_tuples, layer=Tupled)
    model = check(of_tuples, BY_LAYER, layer=Talkative)
    assert "layers return a tuple of Tensor, Tensor" in conversion(model).stages[0].last_pass


def by_keyword(layers, x):
    for layer in layers:
        x = layer(x=x, scale=None)
    return x


def test_the_state_may_be_given_by_keyword():
    check(by_keyword)


@QUIET
def test_hooks_on_layers_see_single_layers():
    seen = []

    def hooked(layers, x):
        handle = layers[2].register_forward_hook(lambda layer, given, out: seen.append(out.detach().clone()))
        for layer in layers:
            x = layer(x)
        handle.remove()
        return x

    model = check(hooked, BY_LAYER)
    assert "forward hooks" in conversion(model).stages[0].last_pass
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_a_state_that_is_used_after_the_stack_has_run_is_refused():
    def late(layers, x):
        for n, layer in enumerate(layers):
            if n == 5:
                before = x
            x = layer(x)
        return x + before

    torch.manual_seed(0)
    model = convert(Model(6, loop=late).double(), ["layers"])
    with pytest.raises(RuntimeError, match=r"layers: the state after layer 4 was used after .*unconvert\(model\)"):
        model(rows())


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "func"])
def test_passes_that_do_not_train_run_the_layers_themselves(mode):
    torch.manual_seed(0)
    twin = Model(6, dropout=0.3).double()
    model = convert(copy.deepcopy(twin), ["layers"])
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        each.train(mode != "eval")
        if mode == "func":
            vjp = torch.func.vjp(each.eval(), rows())
            found.append(vjp[1](torch.ones_like(vjp[0]))[0])
        else:
            grad = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
            with grad():
                found.append(each(rows()))
    assert torch.equal(*found)
    assert conversion(model).stages[0].last_pass == "none yet"


def test_under_autocast():
    torch.manual_seed(0)
    twin = Model(6)
    model = convert(copy.deepcopy(twin), ["layers"], anchors=1)
    found = []
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = each(rows().float())
        out.float().square().sum().backward()
        found.append((out, each.layers[2].body[0].weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-4)
    assert conversion(model).stages[0].last_pass == STACKED
