"""What the ops refuse, and what the errors say."""

import pytest
import torch

from resode_cuda import ops

X = torch.zeros(8, 64)
SQUARES = torch.zeros(2, dtype=torch.float64)
ADJOINT = (None, None, None, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        (
            "forward_step",
            (X, X[:4], 1.0),
            ValueError,
            r"f must have x's shape, got \[4, 64\] with x \[8, 64\]; nothing is",
        ),
        (
            "forward_step",
            (X, X[0], 1.0),
            ValueError,
            r"f must have x's shape, got \[64\] with x \[8, 64\]; nothing is broad",
        ),
        (
            "forward_step",
            (X, X.to("meta"), 1.0),
            ValueError,
            "f must be on x's device, got meta with x on cpu; move f there$",
        ),
        (
            "forward_step",
            (X.int(), X, 1.0),
            TypeError,
            r"x must be one of float64, .*, bfloat16, got int32; convert x$",
        ),
        ("forward_step", (X, X.double(), 1.0), TypeError, r"f must have x's dtype or .*, got float64 with x float32"),
        (
            "heun_step",
            (X.half(), X.half(), X.bfloat16(), 1.0),
            TypeError,
            "k2 must .* got bfloat16 with x float16; convert k2",
        ),
        (
            "reverse_update_",
            (X, X.half(), X, None, 1.0, SQUARES, *ADJOINT),
            TypeError,
            "y must have x's dtype, got float16",
        ),
        ("reverse_update_", (X, X[:4], X, None, 1.0, SQUARES, *ADJOINT), ValueError, "y must have x's shape"),
        (
            "reverse_update_",
            (X, X, X, None, 1.0, SQUARES.float(), *ADJOINT),
            TypeError,
            "squares must be float64 on cpu, got float32",
        ),
        (
            "reverse_update_",
            (X, X, X, None, 1.0, torch.zeros(3).double(), *ADJOINT),
            ValueError,
            "squares must be two contiguous values",
        ),
        (
            "adjoint_update_",
            (X, X.half(), None, 1.0, 1.0),
            TypeError,
            "v1 must have x's dtype, got float16 with x float32",
        ),
    ],
)
@pytest.mark.parametrize("implementation", ["real", "fake"])
def test_errors_say_what_must_hold(implementation, name, values, error, message):
    call = getattr(torch.ops.resode, name) if implementation == "real" else getattr(ops, name)._fake
    with pytest.raises(error, match=f"^{name}: {message}"):
        call(*values)
