"""Operands of the ops as users call them, their formulas in float64, and the layouts that they may have."""

import itertools

import torch

from resode_cuda import ops
from tests.support.kernel_cases import WRITTEN

NAMES = ("forward_step", "heun_step", "reverse_update_", "reverse_extrapolate_", "adjoint_update_")
FUNCTIONAL, MUTATING = NAMES[:2], NAMES[2:]
VARIANTS = [
    (name, stages, products)
    for name, stages, products in itertools.product(NAMES, (1, 2), (0, 1, 2))
    if (stages == 2 or name not in FUNCTIONAL or name == "forward_step")
    and (name != "forward_step" or stages == 1)
    and (products == 0 or name not in FUNCTIONAL)
    and (name != "adjoint_update_" or (stages == 1 and products))
    and not (name == "heun_step" and stages == 1)
]
"""Each op, with so many stages and products."""
LAYOUTS = {
    "transposed": lambda t: t.t(),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def random(shape, dtype, seed, device="cpu"):
    """Normal values, the same on every device."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def operands(name, shape=(5, 3), dtypes=(torch.float32, torch.float32), device="cpu", stages=2, products=2):
    """The op's operands; `stages` and `products` of 1 and 2, products also of 0, leave out what may be."""
    x, y, d, g, v1, v2 = (random(shape, dtypes[0], seed, device) for seed in range(6))
    k1, k2 = (random(shape, dtypes[1], seed, device) for seed in (6, 7))
    v2 = v2 if products == 2 else None
    values = {
        **{"x": x, "y": y, "d": d, "f": k1, "k1": k1, "k2": k2 if stages == 2 else None},
        **({"g": g, "v1": v1, "v2": v2} if products or name == "adjoint_update_" else dict.fromkeys(("g", "v1", "v2"))),
        **{"h": 0.1, "weight": 0.1, "a": 1.9, "b": 0.8, "g_scale": 0.9, "v_scale": 0.3},
        "squares": torch.tensor([0.5, 0.25], dtype=torch.float64, device=device),
    }
    structure = getattr(ops, name).operands
    return structure(**{field: values[field] for field in structure._fields})


def mapped(function, values):
    """The operands with the function applied to their tensors."""
    return values._make(function(value) if isinstance(value, torch.Tensor) else value for value in values)


def tensors_of(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


def formula(name, values):
    """What the op returns or leaves in its operands, written once more and out of place."""
    if name == "forward_step":
        return [values.x + values.h * values.f]
    if name == "heun_step":
        return [values.x + values.h / 2 * (values.k1 + values.k2)]
    new_g = None
    if values.g is not None:
        products = sum(v for v in (values.v1, values.v2) if v is not None)
        new_g = values.g_scale * values.g + values.v_scale * products
    if name == "adjoint_update_":
        return [new_g]
    increment = values.weight * (values.k1 if values.k2 is None else values.k1 + values.k2)
    new_x = values.x - increment
    squares = values.squares + torch.stack([(values.y - new_x).square().sum(), new_x.square().sum()])
    if name == "reverse_update_":
        return [new_x, squares, new_g]
    return [new_x, new_x - (values.a * increment - values.b * values.d), increment, squares, new_g]


def run(name, values):
    """What the op returns or leaves in its operands."""
    result = getattr(torch.ops.resode, name)(*values)
    return [result] if name in FUNCTIONAL else [getattr(values, written) for written in WRITTEN[name]]
