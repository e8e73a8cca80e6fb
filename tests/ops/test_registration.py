"""What users of torch expect of ops: opcheck, fakes, gradients, compilation and vmap."""

import pytest
import torch
from torch.autograd import forward_ad

from resode_cuda import ops
from tests.support.kernel_cases import DTYPE_PAIRS, pair_id
from tests.support.op_cases import FUNCTIONAL, LAYOUTS, NAMES, VARIANTS, mapped, operands, random, tensors_of


@pytest.mark.parametrize("name", NAMES)
def test_operands_are_the_arguments_of_the_schema(name):
    arguments = getattr(torch.ops.resode, name).default._schema.arguments
    fields = getattr(ops, name).operands.__annotations__
    kinds = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor | None", "float": "float"}
    assert list(fields) == [argument.name for argument in arguments]
    assert [field.__forward_arg__ for field in fields.values()] == [kinds[str(argument.type)] for argument in arguments]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "stages", "products"), VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_opcheck(name, stages, products, dtypes, where):
    values = operands(name, (4, 3), dtypes, where, stages, products)
    for wants in (False, True) if name in FUNCTIONAL else (False,):
        for tensor in tensors_of(values):
            tensor.requires_grad_(wants)
        torch.library.opcheck(getattr(torch.ops.resode, name), tuple(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_fake_has_the_real_layout(name, layout):
    values = mapped(LAYOUTS[layout], operands(name, (4, 4)))
    torch.library.opcheck(getattr(torch.ops.resode, name), tuple(values), test_utils="test_faketensor")


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_first_and_second_gradients(name):
    *tensors, h = operands(name, (3, 2), (torch.float64, torch.float64))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    function = lambda *tensors: getattr(torch.ops.resode, name)(*tensors, h)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=pair_id)
def test_gradients_have_their_inputs_dtype(dtypes):
    *tensors, h = (
        value.requires_grad_() if isinstance(value, torch.Tensor) else value
        for value in operands("heun_step", (5, 3), dtypes)
    )
    g = random((5, 3), dtypes[0], 3)
    torch.ops.resode.heun_step(*tensors, h).backward(g)
    assert torch.equal(tensors[0].grad, g)
    for stage in tensors[1:]:
        assert torch.equal(stage.grad, (h / 2 * g).to(stage.dtype))


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_compiles_whole(name):
    *tensors, h = operands(name)
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def loss(*tensors):
        return (getattr(torch.ops.resode, name)(tensors[0].sin(), *tensors[1:], h) ** 2).sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled_loss(*tensors), tensors), expected)


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


FORWARD_MODES = {
    "torch.func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap of jvp": lambda f, x: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x,)))(x),
    "dual tensors": dual,
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("mode", FORWARD_MODES.values(), ids=FORWARD_MODES)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_no_tangent_is_lost_in_silence(name, place, mode):
    *tensors, h = operands(name)

    def with_one(tensor):
        return getattr(torch.ops.resode, name)(*tensors[:place], tensor, *tensors[place + 1 :], h)

    tensors = [tensor[0] for tensor in tensors] if mode is FORWARD_MODES["vmap of jvp"] else tensors
    expected = f"^{name}: derivatives must be those of reverse mode, .*; write the step with torch's own additions$"
    with pytest.raises(RuntimeError, match=expected):
        mode(with_one, operands(name)[place])


def test_what_is_constant_for_forward_mode_is_computed():
    x, f, h = operands("forward_step")
    x.requires_grad_()
    expected = x + h * f
    with forward_ad.dual_level():
        out = torch.ops.resode.forward_step(x, f, h)
        torch.testing.assert_close(out, expected)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_vmap():
    x, k1, k2, h = operands("heun_step", (4, 3))
    got = torch.vmap(lambda x, k1: torch.ops.resode.heun_step(x, k1, k2[0], h), in_dims=(0, 1))(x, k1.t().contiguous())
    torch.testing.assert_close(got, x + h / 2 * (k1 + k2[0]))
    with pytest.raises(NotImplementedError, match=r"^adjoint_update_: torch\.vmap must not reach"):
        torch.vmap(lambda g, v: torch.ops.resode.adjoint_update_(g, v, None, 1.0, 1.0))(x, k1)


def test_more_than_2_to_the_31_values_are_a_matter_of_shape():
    x = torch.empty(2**16 + 1, 2**16, device="meta", dtype=torch.float16)
    assert torch.ops.resode.forward_step(x, x, 0.1).shape == x.shape
