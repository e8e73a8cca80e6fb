"""What layers may return, what may hang on them, and the passes in which they run by themselves."""

import copy
import warnings

import pytest
import torch

from resode_cuda import conversion, convert
from tests.models.layers import Layer, Model
from tests.support.loops import BY_LAYER, STACKED, check, rows


class Tupled(Layer):
    def forward(self, x, scale=None):
        return (super().forward(x, scale),)


class Talkative(Layer):
    def forward(self, x, scale=None):
        out = super().forward(x, scale)
        return out, out.mean()


class Changing(Layer):
    """With a scale it returns a tuple."""

    def forward(self, x, scale=None):
        out = super().forward(x, scale)
        return out if scale is None else (out, None)


def of_tuples(layers, x):
    for layer in layers:
        x = layer(x)[0]
    return x


def of_changing_kinds(layers, x):
    for n, layer in enumerate(layers):
        x = layer(x) if n % 2 else layer(x, scale=torch.ones((), dtype=x.dtype))[0]
    return x


QUIET = pytest.mark.filterwarnings("ignore:converted layers of layers ran by themselves:RuntimeWarning")


@QUIET
def test_layers_that_return_tuples():
    check(of_tuples, layer=Tupled)
    check(of_changing_kinds, layer=Changing)
    model = check(of_tuples, BY_LAYER, layer=Talkative)
    assert "layers return a tuple of Tensor, Tensor" in conversion(model).stages[0].last_pass


def test_it_is_said_once_where_activations_are_kept():
    torch.manual_seed(0)
    model = convert(Model(6, loop=of_tuples, layer=Talkative).double(), ["layers"])
    with pytest.warns(RuntimeWarning, match=r"layers ran by themselves in a training pass.*a tuple of Tensor, Tensor"):
        model(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(rows())


def by_keyword(layers, x):
    for layer in layers:
        x = layer(x=x, scale=None)
    return x


def test_the_state_may_be_given_by_keyword():
    check(by_keyword)


def test_hooks_on_layers_see_tensors():
    seen = []

    def hooked(layers, x):
        handles = [
            layers[2].register_forward_hook(lambda layer, given, out: seen.append(out.detach().clone())),
            layers[3].register_forward_hook(lambda layer, given, out: out * 1.5),
            layers[4].register_full_backward_hook(lambda layer, given, out: (given[0] * 0.5,)),
        ]
        for layer in layers:
            x = layer(x)
        for handle in handles[:2]:
            handle.remove()
        return x

    check(hooked, "", within=1e-2)
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_a_gradient_that_does_not_come_through_later_layers():
    """The state that it begins with is known as long as somebody holds it."""
    torch.manual_seed(0)
    twin = Model(6, loop=lambda layers, x: x).double()
    model, found = convert(copy.deepcopy(twin), ["layers"]), []
    for each in (model, twin):
        states = [each.embedding(rows())]
        for layer in each.layers:
            states.append(layer(states[-1]))
        loss = states[3].square().sum()
        found.append(torch.autograd.grad(loss, list(each.layers[:3].parameters())))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


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
