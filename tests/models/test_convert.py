"""`convert`, `unconvert` and `conversion` on a small model: what they keep, what they refuse, how plans are made."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from resode_cuda import Reverse, conversion, convert, unconvert
from tests.models.layers import DIM, Layer, Model


def rows(count=4):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def model(count=6, **settings):
    torch.manual_seed(0)
    return Model(count, **settings)


def loss(out):
    return out.square().mean()


def test_nothing_of_the_model_changes():
    plain = model()
    layers, parameters, modules = plain.layers, list(plain.parameters()), list(plain.modules())
    keys, names = list(plain.state_dict()), [name for name, _ in plain.named_modules()]
    assert convert(plain, ["layers"]) is plain
    assert plain.layers is layers
    assert type(plain.layers) is nn.ModuleList
    assert len(plain.layers) == 6
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))
    assert list(plain.modules()) == modules
    assert list(plain.state_dict()) == keys
    assert [name for name, _ in plain.named_modules()] == names
    unconvert(plain)
    assert not any("forward" in layer.__dict__ for layer in plain.layers)
    assert "_left_by_convert" not in plain.__dict__


def test_a_stage_holds_stored_increments_in_place_of_activations():
    held = []
    for wanted in (model(), convert(model(), ["layers"])):
        bytes_held = 0

        def keep(tensor):
            nonlocal bytes_held
            bytes_held += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = wanted(rows(256))
        out.sum().backward()
        held.append(bytes_held)
    assert held[1] < held[0] / 4


def test_training_goes_on_from_convert_to_unconvert():
    plain, converted = model().double(), convert(model().double(), ["layers"], anchors=1)
    ends = []
    for each in (plain, converted):
        optimizer = torch.optim.Adam(each.parameters(), 1e-2)
        for step in range(6):
            if step == 3 and each is converted:
                unconvert(each)
            optimizer.zero_grad()
            loss(each(rows().double())).backward()
            optimizer.step()
        ends.append(each.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-12)
    model().load_state_dict(ends[1])


def saved_and_loaded(given):
    buffer = io.BytesIO()
    torch.save(given, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_are_converted_models_of_their_own(copied):
    given = convert(model(), ["layers"], reverse=Reverse("stored", bits=4), anchors={0})
    twin = copied(given)
    with torch.no_grad():
        twin.layers[0].body[0].weight.zero_()
    loss(twin(rows())).backward()
    assert conversion(twin).stages[0].last_pass == "as a stack"
    assert conversion(twin).stages[0].plan == "stored, 4 bits, anchors {0}"
    assert conversion(given).stages[0].last_pass == "none yet"
    assert given.layers[0].body[0].weight.grad is None
    unconvert(twin)
    loss(given(rows())).backward()
    assert conversion(given).stages[0].last_pass == "as a stack"


@pytest.mark.parametrize(
    "batch",
    [rows(), (rows(),), {"x": rows()}],
    ids=["tensor", "tuple", "mapping"],
)
def test_a_batch_chooses_a_plan_and_leaves_no_trace(batch):
    given = model(dropout=0.1).train()
    before, state = copy.deepcopy(given.state_dict()), torch.get_rng_state()
    convert(given, ["layers"], batch=batch, loss=loss, tolerance=1e-3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert all(parameter.grad is None for parameter in given.parameters())
    (stage,) = conversion(given).stages
    assert 0 < stage.bytes_after < stage.bytes_before
    assert stage.plan != "stored, 8 bits"


def test_a_plan_holds_what_the_tolerance_says_of_the_whole_model():
    given, exact = model().double().train(), model().double()
    convert(given, ["layers"], batch=rows().double(), loss=loss, tolerance=1e-3)
    gradients = [
        torch.autograd.grad(loss(each(rows().double())), list(each.layers.parameters())) for each in (given, exact)
    ]
    off = sum((a - b).square().sum() for a, b in zip(*gradients, strict=True)).sqrt()
    assert off <= 1.05e-3 * sum(b.square().sum() for b in gradients[1]).sqrt()


def test_a_batch_beside_a_solver_of_the_users_measures_alone():
    given = convert(model().train(), ["layers"], batch=rows(), reverse=Reverse("stored", bits=6))
    (stage,) = conversion(given).stages
    assert stage.plan == "stored, 6 bits"
    assert 0 < stage.bytes_after < stage.bytes_before


class Two(nn.Module):
    """Two stages, one of a wider state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*(Layer() for _ in range(4)))
        self.between = nn.Linear(DIM, 2 * DIM)
        self.second = nn.Sequential(*(Layer(2 * DIM) for _ in range(5)))

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def test_several_stages():
    torch.manual_seed(0)
    twin = Two()
    given = convert(copy.deepcopy(twin).train(), ["first", "second"], batch=torch.randn(3, DIM), tolerance=1e-2)
    assert [stage.steps for stage in conversion(given).stages] == [4, 5]
    x = torch.randn(3, DIM)
    assert torch.equal(given(x), twin(x))
    loss(given(x)).backward()
    assert [stage.last_pass for stage in conversion(given).stages] == ["as a stack"] * 2
    assert given.first[0].norm.weight.grad is not None


def test_the_table():
    shown = str(conversion(convert(model(), ["layers"])))
    head, row = shown.splitlines()
    assert head.split()[:4] == ["stage", "layers", "steps", "plan"]
    assert "layers.0 to 5" in row
    assert "stored, 8 bits" in row


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {},
            r"no stage was found in a Model: layers.0 to layers.5: .*not known, Layer; name them: stages=\['layers'\]",
        ),
        ({"stages": ["layer"]}, "name modules of the model, got 'layer'"),
        ({"stages": ["layers"], "min_depth": 7}, r"at least min_depth=7 layers, got 6 in 'layers'"),
        ({"stages": ["layers"], "form": "residual"}, 'form must be "block" or None'),
        ({"stages": ["layers"], "batch": rows()}, "must be in train mode"),
        ({"stages": ["layers"], "reverse": "best"}, "reverse must be one of"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(settings, told):
    given = model().eval()
    with pytest.raises(ValueError, match=told):
        convert(given, **settings)
    assert not any("forward" in layer.__dict__ for layer in given.layers)
    with pytest.raises(ValueError, match="must be converted"):
        conversion(given)
    assert unconvert(given) is given


def test_a_model_is_not_converted_twice():
    given = convert(model(), ["layers"])
    with pytest.raises(ValueError, match="must not be converted already"):
        convert(given, ["layers"])


def test_one_layer_at_several_places_is_refused():
    given = model()
    given.layers = nn.ModuleList([given.layers[0]] * 5)
    with pytest.raises(ValueError, match="must be different modules"):
        convert(given, ["layers"])


def test_a_forward_that_was_replaced_before_is_kept():
    given, twin = model(), model()
    for each in (given, twin):
        for layer in each.layers:
            layer.forward = lambda x, layer=layer: type(layer).forward(layer, x) * 1.01
    convert(given, ["layers"])
    assert torch.equal(given(rows()), twin(rows()))
    loss(given(rows())).backward()
    assert conversion(given).stages[0].last_pass == "as a stack"
    unconvert(given)
    assert torch.equal(given(rows()), twin(rows()))


def test_what_wrapped_a_layer_since_has_to_come_off_first():
    given = convert(model(), ["layers"])
    inner = given.layers[2].forward
    given.layers[2].forward = lambda x: inner(x)
    loss(given(rows())).backward()
    assert conversion(given).stages[0].last_pass == "as a stack"
    with pytest.raises(RuntimeError, match=r"forward of layers.2 must be as convert left it, .*by a function"):
        unconvert(given)
    given.layers[2].forward = inner
    assert "forward" not in unconvert(given).layers[2].__dict__


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend):
    given, twin = convert(model().double(), ["layers"], anchors=1), model().double()
    loss(given(rows().double())).backward()  # an uncompiled pass first, as stacks need it
    given.zero_grad()
    for each in (torch.compile(given, backend=backend), twin):
        loss(each(rows().double())).backward()
    for a, b in zip(given.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert conversion(given).stages[0].last_pass == "as a stack"


def test_an_exported_model():
    given = convert(model(), ["layers"]).eval()
    exported = torch.export.export(given, (rows(),)).module()
    torch.testing.assert_close(exported(rows()), given(rows()))
