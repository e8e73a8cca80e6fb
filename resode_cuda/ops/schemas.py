"""Every schema."""

_NETWORK = "Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, str activation, str? norm"
_STEPS = "str scheme, float[] steps"
_SOLVER = "str predictor, int corrections, bool reuse, bool accelerate, int[] anchors"
_GRADIENTS = "Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out"
MLP_STACK = (
    f"mlp_stack(Tensor x, {_NETWORK}, {_STEPS}, {_SOLVER}, str gradient, str backend, Tensor? squares) -> "
    "(Tensor x_last, Tensor increments, Tensor anchored)"
)
MLP_STACK_ADJOINT = (
    f"mlp_stack_adjoint(Tensor g, Tensor x_last, Tensor increments, Tensor anchored, {_NETWORK}, {_STEPS}, {_SOLVER}, "
    f"bool wants_parameters, bool wants_input, str backend) -> (Tensor g, {_GRADIENTS}, Tensor squares, Tensor x)"
)
MLP_STACK_EXACT_ADJOINT = (
    f"mlp_stack_exact_adjoint(Tensor g, Tensor x, {_NETWORK}, {_STEPS}, bool wants_parameters, str backend) -> "
    f"(Tensor g, {_GRADIENTS})"
)
