"""What `ResidualMLP` and `residual_mlp` refuse: each error names the argument, what it got, and the way out."""

import pytest
import torch

from resode_cuda import ResidualMLP, ResidualStack
from resode_cuda.functional import residual_mlp

W1, B1, W2, B2 = torch.zeros(5, 10, 6), torch.zeros(5, 10), torch.zeros(5, 6, 10), torch.zeros(5, 6)
GOOD = {"x": torch.zeros(7, 6), "weight_in": W1, "bias_in": B1, "weight_out": W2, "bias_out": B2}
JAGGED = torch.nested.nested_tensor([torch.zeros(2, 6), torch.zeros(3, 6)], layout=torch.jagged)
BAD_OPERANDS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(7, 6, dtype=torch.int64)}, TypeError, "x must have the parameters' dtype, float32, got int64"),
    (
        {"x": torch.zeros(7, 6, dtype=torch.float64)},
        TypeError,
        "x must .*, got float64; convert x or the parameters, or",
    ),
    ({"x": torch.zeros(7, 6, dtype=torch.bfloat16)}, TypeError, "x must .*, got bfloat16; .* or use torch.autocast"),
    (
        {"x": torch.zeros(7, 5)},
        ValueError,
        r"x must have shape \[\*, 6\], as weight_in \[5, 10, 6\] says, got \[7, 5\]",
    ),
    ({"x": torch.zeros(())}, ValueError, r"x must have shape \[\*, 6\], .*, got \[\]"),
    ({"x": torch.zeros(7, 6).to_sparse()}, TypeError, r"x must be dense, got layout torch\.sparse_coo; use x\.to"),
    ({"x": JAGGED}, TypeError, r"x must be dense, got a nested tensor; rows are independent, so pass its values\(\)"),
    ({"x": torch.zeros(7, 6, device="meta")}, ValueError, "x must be on the parameters' device, cpu, got meta; move x"),
]
BAD_PARAMETERS = [
    ({"step": 1e300}, ValueError, r"step must be positive and finite in float32, got 1e\+300; leave it out for 1/5"),
    ({"weight_out": W2.to_sparse()}, TypeError, r"weight_out must be dense, got layout torch\.sparse_coo; use"),
    ({"weight_in": None}, TypeError, "weight_in must be a tensor, got NoneType"),
    ({"weight_out": 1.0}, TypeError, "weight_out must be a tensor, got float"),
    ({"bias_in": 1.0}, TypeError, "bias_in must be a tensor or None, got float"),
    (
        {"weight_in": W1[0]},
        ValueError,
        r"weight_in must have shape \[layers, hidden, dim\], none of them 0, got \[10, 6\]",
    ),
    ({"weight_in": torch.tensor(1.0)}, ValueError, r"weight_in must have shape .*, got \[\]"),
    ({"weight_in": W1[:0]}, ValueError, r"weight_in must have shape .*, got \[0, 10, 6\]"),
    ({"weight_in": W1[:, :0]}, ValueError, r"weight_in must have shape .*, got \[5, 0, 6\]"),
    (
        {"weight_out": W2.mT},
        ValueError,
        r"weight_out must have shape \[5, 6, 10\] with weight_in \[5, 10, 6\], got \[5, 10, 6\]",
    ),
    ({"bias_in": B1[:4]}, ValueError, r"bias_in must have shape \[5, 10\] with weight_in .*, got \[4, 10\]"),
    ({"bias_out": B2[0]}, ValueError, r"bias_out must have shape \[5, 6\] with weight_in .*, got \[6\]"),
    ({"weight_in": W1.long()}, TypeError, "weight_in must be one of float64, .*, got int64; convert it"),
    ({"weight_out": W2.double()}, TypeError, "weight_out must have weight_in's dtype, float32, got float64; convert"),
    ({"bias_out": B2.bfloat16()}, TypeError, "bias_out must have weight_in's dtype, float32, got bfloat16"),
    (
        {"bias_in": B1.to("meta")},
        ValueError,
        "bias_in must be on weight_in's device, cpu, got meta; move bias_in there",
    ),
]
BAD_NAMES = [
    ({"scheme": "midpoint"}, ValueError, r"scheme must be one of \('euler', 'heun'\), got 'midpoint'"),
    ({"activation": "swish"}, ValueError, "activation must be one of .*'silu'.*, got 'swish'"),
    ({"norm": "batch"}, ValueError, r"norm must be one of \(None, 'rms', 'layer'\), got 'batch'"),
    ({"gradient": "exact"}, ValueError, "gradient must be one of .*'checkpoint'.*, got 'exact'"),
    ({"reverse": "best"}, ValueError, "reverse must be one of .*'corrected'.* or a Reverse, got 'best'"),
    ({"anchors": 0}, ValueError, "anchors must be >= 1, got 0; use None for no anchors"),
    ({"anchors": 1.5}, TypeError, "anchors must be an integer, a collection of step numbers or None, got 1.5"),
    ({"step": float("nan")}, ValueError, "step must be positive and finite, got nan; leave it out for 1/5"),
    ({"step": [0.1, 0.1, 0.0, 0.1, 0.1]}, ValueError, "step must be positive and finite, got 0.0"),
    ({"step": [0.1] * 4}, ValueError, "step must be one number or 5, one for each step, got 4"),
    ({"step": "small"}, TypeError, "step must be a number, one for each step, or None, got 'small'"),
]
BAD_BACKENDS = [
    ({"backend": "numpy"}, "backend must be one of .*, got 'numpy'"),
    ({"backend": "triton"}, "backend='triton' can't compute this: .*CUDA devices, got tensors on cpu; use \"auto\" or"),
    (
        {"backend": "cuda"},
        "backend='cuda' can't compute this: kernels in CUDA C.* run on CUDA devices, .*; use \"auto\" or",
    ),
    (
        {"backend": "triton", "gradient": "backprop"},
        'gradient="backprop" is computed by plain torch, got backend=\'triton\'; use backend="torch"',
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_OPERANDS + BAD_PARAMETERS + BAD_NAMES)
def test_bad_arguments_of_the_function(bad, error, message):
    with pytest.raises(error, match=f"^residual_mlp: {message}"):
        residual_mlp(**{**GOOD, **bad})


def test_one_layer_is_too_few_for_heun():
    with pytest.raises(ValueError, match=r"^residual_mlp: scheme='heun' needs at least 2 layers, got 1; stack"):
        residual_mlp(GOOD["x"], W1[:1], None, W2[:1], None, "heun")


@pytest.mark.parametrize(("bad", "error", "message"), BAD_OPERANDS)
def test_bad_inputs_of_the_module(bad, error, message):
    with pytest.raises(error, match=f"^ResidualMLP: {message}"):
        ResidualMLP(6, 10, 5)(bad["x"])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        *BAD_NAMES,
        *(({name: 0}, ValueError, f"{name} must be >= 1, got 0") for name in ("dim", "hidden", "depth")),
        *(({name: 2.0}, TypeError, f"{name} must be an integer, got 2.0") for name in ("dim", "hidden", "depth")),
        ({"depth": True}, TypeError, "depth must be an integer, got True"),
        ({"backend": "numpy"}, ValueError, "backend must be one of .*, got 'numpy'"),
        ({"dtype": torch.int64}, TypeError, r"dtype must be one of float64, .* or None, got torch\.int64"),
        ({"dtype": torch.complex64}, TypeError, r"dtype must be one of float64, .* or None, got torch\.complex64"),
        ({"max_drift": 0}, ValueError, 'max_drift must be > 0, got 0; use on_drift="ignore"'),
        ({"on_drift": "stop"}, ValueError, "on_drift must be one of .*, got 'stop'"),
    ],
)
def test_bad_arguments_of_the_module(bad, error, message):
    with pytest.raises(error, match=f"^ResidualMLP: {message}"):
        ResidualMLP(**{"dim": 6, "hidden": 10, "depth": 5, **bad})


@pytest.mark.parametrize(("bad", "message"), BAD_BACKENDS)
@pytest.mark.parametrize("is_module", [False, True], ids=["function", "module"])
def test_a_backend_that_was_asked_for_runs_or_says_why_not(bad, message, is_module):
    run = (lambda: ResidualMLP(6, 10, 5, **bad)(GOOD["x"])) if is_module else (lambda: residual_mlp(**GOOD, **bad))
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("setting", "got"), [({"stream_dtype": torch.float64}, "float64"), ({"keep_input": True}, "True")]
)
def test_from_blocks_drops_no_setting_in_silence(setting, got):
    blocks = [block.to(torch.float64) for block in ResidualMLP(6, 10, 5).to_blocks()]
    with pytest.raises(ValueError, match=f"needs a stack with stream_dtype=None, keep_input=False.*{got}"):
        ResidualMLP.from_blocks(ResidualStack(blocks, **setting))
