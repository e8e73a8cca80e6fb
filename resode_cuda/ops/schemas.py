"""The schemas of all ops of `torch.ops.resode`, and what each op computes.

Pointwise ops (`ops/`), whose formulas and names are those of `reference.py`, the specification:

| op | computes | passes over a state in memory |
|---|---|---|
| forward_step(x, f, h) | x + h f | 3 |
| heun_step(x, k1, k2, h) | x + h/2 (k1 + k2) | 4 |
| reverse_update_ | x <- x - w (k1 + k2) and the defect's squares; g <- s g + t (v1 + v2) | 4 and 3; Heun 5 and 4 |
| reverse_extrapolate_ | the same, y <- x - (a d' - b d), d <- d' = w (k1 + k2) | 7 and 3; Heun 8 and 4 |
| adjoint_update_ | g <- s g + t (v1 + v2) | 3; Heun 4 |
| start_companion(x, x') | x rounded to units of 2^-13 of each group's largest value in x and x', and these | 4 |
| store(x, c, unit, b) | c' = c + Q_b(x - c), and Q_b's integers and scales | 3 + b/32 |
| store_step | x' = x + w (k1 + k2), then as store with x' | 5 + b/32; Heun 6 + b/32 |
| stored_step(c', ...) | c = c' - q, with q as store has packed it | 2 + b/32 |

The first two are functional and differentiable, to any order. The last four, which `stored.py` specifies, are
functional and have no gradient; the first of these plain torch computes everywhere, in more passes. The others mutate,
have no gradient, and belong to the backward step. The defect's squares are |y - x|^2 and |x|^2, in float64: float32
would not hold those of all states.

A backward step outside its blocks, in passes, with k corrections:

| | predict | correct | update | in all |
|---|---|---|---|---|
| Euler, reverse step | 3 | 3 k | 7 | 10 + 3 k |
| Euler, extrapolation | 0: the step before did | 3 k | 10 | 10 + 3 k |
| Heun, reverse step | 3 + 4 | (3 + 4) k | 3 + 3 + 9 | 22 + 7 k |
| Heun, extrapolation | 0 | (3 + 4) k | 3 + 3 + 12 | 18 + 7 k |

Heun's 3 + 3 are x + h k1 and the cotangent of k1. A pass is one read or write of a tensor of the state's shape, in its
own dtype. No op reads or writes a buffer twice, which `tests/ops/test_passes.py` counts.

Depth-fused ops (`fused/`), each a whole stack of residual perceptrons:

| op | computes |
|---|---|
| mlp_stack | x_N, and what the way back starts from: the fields of `SavedStates` in `fused/signature.py` |
| mlp_stack_adjoint | from these and g_N, rebuilding states or taking them back: g_0, all gradients, `squares`, x_0 |
| mlp_stack_exact_adjoint | from x_0 and g_N, each tile of rows running forward again: g_0 and all gradients |

The first is differentiable, by one of the other two, which are not. All are functional; a backward pass of mlp_stack
fills its `squares`, if it has some, and nothing else is ever overwritten. `gradient` is "adjoint" or "checkpoint";
`anchors` are ascending step numbers; `bits` are one for all steps or one for each, and none where increments are not
stored; `squares` have shape [steps, 2], |y - x_n|^2 and |x_n|^2 of each step, in float64. States have shape [*, dim]
and the stream's dtype, float32 for 16-bit parameters, and results are contiguous. A result that is not asked for is
empty.
"""

FORWARD_STEP = "forward_step(Tensor x, Tensor f, float h) -> Tensor"
HEUN_STEP = "heun_step(Tensor x, Tensor k1, Tensor k2, float h) -> Tensor"

_ADJOINT = "Tensor? v1, Tensor? v2, float g_scale, float v_scale"
REVERSE_UPDATE_ = (
    "reverse_update_(Tensor(a!) x, Tensor y, Tensor k1, Tensor? k2, float weight, "
    f"Tensor(b!) squares, Tensor(c!)? g, {_ADJOINT}) -> ()"
)
REVERSE_EXTRAPOLATE_ = (
    "reverse_extrapolate_(Tensor(a!) x, Tensor(b!) y, Tensor(c!) d, Tensor k1, Tensor? k2, float weight, "
    f"float a, float b, Tensor(d!) squares, Tensor(e!)? g, {_ADJOINT}) -> ()"
)
START_COMPANION = "start_companion(Tensor x, Tensor? x_next=None) -> (Tensor companion, Tensor unit)"
STORE = "store(Tensor x, Tensor companion, Tensor unit, int bits) -> (Tensor companion, Tensor packed, Tensor scales)"
STORE_STEP = (
    "store_step(Tensor x, Tensor k1, Tensor? k2, float weight, Tensor companion, Tensor unit, int bits) -> "
    "(Tensor x, Tensor companion, Tensor packed, Tensor scales)"
)
STORED_STEP = "stored_step(Tensor companion, Tensor packed, Tensor scales, Tensor unit, int bits) -> Tensor"
ADJOINT_UPDATE_ = f"adjoint_update_(Tensor(a!) g, {_ADJOINT}) -> ()"

_NETWORK = "Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, str activation, str? norm"
_STEPS = "str scheme, float[] steps"
_SOLVER = "str predictor, int corrections, bool reuse, bool accelerate, int[] bits, bool rounded_forward, int[] anchors"
_STORED = "Tensor companions, Tensor units, Tensor scales, Tensor packed"
_GRADIENTS = "Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out"
MLP_STACK = (
    f"mlp_stack(Tensor x, {_NETWORK}, {_STEPS}, {_SOLVER}, str gradient, str backend, Tensor? squares) -> "
    f"(Tensor x_last, Tensor increments, Tensor anchored, {_STORED}, Tensor rounding)"
)
MLP_STACK_ADJOINT = (
    f"mlp_stack_adjoint(Tensor g, Tensor? x_last, Tensor increments, Tensor anchored, {_STORED}, "
    f"{_NETWORK}, {_STEPS}, {_SOLVER}, bool wants_parameters, bool wants_input, str backend) -> "
    f"(Tensor g, {_GRADIENTS}, Tensor squares, Tensor x)"
)
MLP_STACK_EXACT_ADJOINT = (
    f"mlp_stack_exact_adjoint(Tensor g, Tensor x, {_NETWORK}, {_STEPS}, bool wants_parameters, str backend) -> "
    f"(Tensor g, {_GRADIENTS})"
)
