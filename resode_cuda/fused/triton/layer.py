"""One layer on a tile of rows, for the depth-fused Triton kernels. Importing this module needs Triton.

    f(x) = W2 s(W1 u + b1) + b2,  u = norm(x)

Capital letters are as in `memory.py`: a tile has ROWS rows. States x, adjoints g and sums of products are float32 in
registers, [ROWS, D]; operands of matrix products are rounded to the parameters' dtype. The hidden dimension is walked
through in chunks of C: a chunk of W1, [C, D], and one of W2, [D, C], come by descriptor, on GPUs before 9.0 by pointer,
and the compiler runs these loads ahead of the products. D is dim, padded to a power of two, hidden is padded to a
multiple of C, both with zeros, which every activation maps to zero.

Activations are scaled by h before they are rounded, so that the state is the accumulator of the matrix product. So is
the cotangent of a layer's output, by h or h/2, once a row: those of hidden units and of x, and the parameters'
gradients, have the factor from there. Float16 would lose small numbers: there products are scaled, as
CONFIG.scales_first says.

Must match `RowTile` of `reference/tile.py`.
"""

import triton
import triton.language as tl

from .arguments import Activated, Gradients, Weights

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(z) is 2 to the power of so many z; formulas have it in their constants."""


# By the special function units alone; tl.exp2 and the division spend twice as much on denormal numbers, here flushed to
# zero. Relative errors are below 1e-6 up to |z| = 10, and grow with |z|, where sigmoids differ less and less.
@triton.jit
def power_of_two(z: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return tl.exp2(z)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)


@triton.jit
def reciprocal(z: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return 1 / z
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)


@triton.jit
def sigmoid(log2_z: tl.tensor) -> tl.tensor:
    """The sigmoid of z, given as LOG2_E z."""
    return reciprocal(1 + power_of_two(-log2_z))


@triton.jit
def plain_tanh(z: tl.tensor) -> tl.tensor:
    # Near zero 1 - e cancels; the next term of the series is below 1e-8 of z there.
    square = z * z
    series = z * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    e = power_of_two((-2 * LOG2_E) * tl.abs(z))
    quotient = (1 - e) * reciprocal(1 + e)
    return tl.where(tl.abs(z) < 0.15, series, tl.where(z < 0, -quotient, quotient))


# One special function where plain_tanh and sigmoid take two. Its relative error is below 2^-11: a sigmoid by it is off
# by 2^-12, a sixteenth of what bfloat16 rounds off values near 1, but small sigmoids are lost in that.
@triton.jit
def approximate_tanh(z: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return plain_tanh(z)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)


@triton.jit
def gated(z: tl.tensor, first: tl.constexpr, third: tl.constexpr, square: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """(z p, p) with p = sigmoid(first z + third z^3); square is z^2, and not used where there is no third."""
    if CONFIG.approximates:
        t = approximate_tanh(z * polynomial(0.5 * first, 0.5 * third, square))
        half_z = 0.5 * z
        return half_z * t + half_z, 0.5 * t + 0.5
    else:
        p = sigmoid(z * polynomial(LOG2_E * first, LOG2_E * third, square))
        return z * p, p


@triton.jit
def polynomial(constant: tl.constexpr, linear: tl.constexpr, x: tl.tensor) -> tl.tensor:
    if linear == 0:
        return constant
    else:
        return constant + linear * x


@triton.jit
def activate(z: tl.tensor, CONFIG: tl.constexpr) -> Activated:
    """s(z) and s'(z) of CONFIG.activation, one of `arguments.ACTIVATIONS`; the compiler drops what is not used.

    Both are finite wherever z is.
    """
    if CONFIG.activation == "identity":
        return Activated(z, tl.full(z.shape, 1, z.dtype))
    elif CONFIG.activation == "relu":
        # NaN goes through.
        return Activated(tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(z <= 0, 0.0, 1.0))
    elif CONFIG.activation == "gelu":
        probability = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        density = 0.3989422804014327 * power_of_two((-0.5 * LOG2_E) * z * z)
        return Activated(z * probability, probability + z * density)
    elif CONFIG.activation == "gelu_tanh":
        # (1 + tanh(v / 2)) / 2 = sigmoid(v),  v = 2 sqrt(2 / pi) (z + 0.044715 z^3). From |z| = 10 on it is 0 or 1 to
        # 37 digits; a square that grew further would overflow, and the slope be 0 times infinity.
        square = tl.minimum(z * z, 100.0)
        value, p = gated(z, 1.5957691216057308, 0.07135481627260025, square, CONFIG)
        return Activated(value, p + (value - value * p) * (1.5957691216057308 + 0.21406444881780076 * square))
    elif CONFIG.activation == "silu":
        value, p = gated(z, 1.0, 0.0, z, CONFIG)
        return Activated(value, p + (value - value * p))
    else:
        tl.static_assert(CONFIG.activation == "tanh", "activate lacks a name of arguments.ACTIVATIONS; add its formula")
        if CONFIG.approximates:
            a = approximate_tanh(z)
        else:
            a = plain_tanh(z)
        return Activated(a, 1 - a * a)


@triton.jit
def normalize(x: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """(u, r) of `norms.py`, r of shape [ROWS]; without a norm (x, 0). Padding stays zero."""
    if CONFIG.norm is None:
        return x, tl.zeros([x.shape[0]], tl.float32)
    else:
        if CONFIG.norm == "layer":
            x = without_mean(x, CONFIG)
        r = tl.rsqrt(tl.sum(x * x, 1) / CONFIG.dim + CONFIG.epsilon)
        return x * r[:, None], r


@triton.jit
def norm_vjp(c: tl.tensor, u: tl.tensor, r: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """The cotangent of x from c, that of u. Padding of c is zero, and stays so."""
    along = tl.sum(c * u, 1) / CONFIG.dim
    if CONFIG.norm == "layer":
        c = without_mean(c, CONFIG)
    return (c - u * along[:, None]) * r[:, None]


@triton.jit
def without_mean(x: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """Each row less its mean. Padding stays zero."""
    x = x - (tl.sum(x, 1) / CONFIG.dim)[:, None]
    if CONFIG.dim < CONFIG.padded_dim:
        x = tl.where(tl.arange(0, CONFIG.padded_dim)[None, :] < CONFIG.dim, x, 0)
    return x


@triton.jit
def load_w1(weights: Weights, layer: tl.tensor, j: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """W1 [C, D] of a layer's chunk from j on."""
    if isinstance(weights.w1, tl.tensor_descriptor):
        return weights.w1.load([layer * weights.hidden + j, 0])
    else:
        D: tl.constexpr = CONFIG.padded_dim
        start = (tl.full([], layer, tl.int64) * weights.hidden + j) * D
        return tl.load(weights.w1 + start + (tl.arange(0, CONFIG.chunk)[:, None] * D + tl.arange(0, D)[None, :]))


@triton.jit
def load_w2(weights: Weights, layer: tl.tensor, j: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """W2 [D, C] of a layer's chunk from j on."""
    if isinstance(weights.w2, tl.tensor_descriptor):
        return weights.w2.load([layer * CONFIG.padded_dim, j])
    else:
        D: tl.constexpr = CONFIG.padded_dim
        start = tl.full([], layer, tl.int64) * D * weights.hidden + j
        C: tl.constexpr = CONFIG.chunk
        return tl.load(weights.w2 + start + (tl.arange(0, D)[:, None] * weights.hidden + tl.arange(0, C)[None, :]))


@triton.jit
def rounded(x: tl.tensor, weights: Weights) -> tl.tensor:
    """x in the dtype of the weights."""
    if isinstance(weights.w1, tl.tensor_descriptor):
        return x.to(weights.w1.dtype)
    else:
        return x.to(weights.w1.dtype.element_ty)


@triton.jit
def preactivation(
    u: tl.tensor, w1_chunk: tl.tensor, weights: Weights, layer: tl.tensor, j: tl.tensor, CONFIG: tl.constexpr
) -> tl.tensor:
    """z = W1 u + b1 of a layer's chunk from j on."""
    unit = layer * weights.hidden + j
    z = tl.dot(u, w1_chunk.T, input_precision=CONFIG.precision)
    if weights.b1 is not None:
        z += tl.load(weights.b1 + unit + tl.arange(0, CONFIG.chunk)).to(tl.float32)[None, :]
    return z


@triton.jit
def hidden_units(
    u: tl.tensor, w1_chunk: tl.tensor, weights: Weights, layer: tl.tensor, j: tl.tensor, CONFIG: tl.constexpr
) -> Activated:
    """s(z) and s'(z) of a layer's chunk from j on."""
    return activate(preactivation(u, w1_chunk, weights, layer, j, CONFIG), CONFIG)


@triton.jit
def add_layer(
    acc: tl.tensor, x: tl.tensor, scale: tl.tensor, layer: tl.tensor, weights: Weights, CONFIG: tl.constexpr
) -> tl.tensor:
    """acc + scale f(x)."""
    u = rounded(normalize(x, CONFIG)[0], weights)
    if CONFIG.scales_first:
        # The state is where products are added up: a sum beside it would take as many registers again.
        total = acc
    else:
        total = tl.zeros_like(acc)
    for j in tl.range(0, weights.hidden, CONFIG.chunk, num_stages=CONFIG.stages):
        w1_chunk = load_w1(weights, layer, j, CONFIG)
        w2_chunk = load_w2(weights, layer, j, CONFIG)
        a = hidden_units(u, w1_chunk, weights, layer, j, CONFIG).value
        if CONFIG.scales_first:
            a = a * scale
        total = tl.dot(rounded(a, weights), w2_chunk.T, total, input_precision=CONFIG.precision)
    if CONFIG.scales_first:
        return total + scale * output_bias(layer, weights, CONFIG)
    else:
        return acc + scale * (total + output_bias(layer, weights, CONFIG))


@triton.jit
def output_bias(layer: tl.tensor, weights: Weights, CONFIG: tl.constexpr) -> tl.tensor:
    """b2 [1, D]; zero without biases."""
    D: tl.constexpr = CONFIG.padded_dim
    if weights.b2 is not None:
        return tl.load(weights.b2 + layer * D + tl.arange(0, D)).to(tl.float32)[None, :]
    else:
        return tl.zeros([1, D], tl.float32)


@triton.jit
def output_cotangent(g: tl.tensor, scale: tl.tensor, weights: Weights, CONFIG: tl.constexpr) -> tl.tensor:
    """The cotangent of a layer's output in the parameters' dtype: scale g, in float16 g."""
    if CONFIG.scales_first:
        g = g * scale
    return rounded(g, weights)


@triton.jit
def layer_vjp(
    g: tl.tensor,
    p: tl.tensor,
    u: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    weights: Weights,
    gradients: Gradients,
    WITH_P: tl.constexpr,
    CONFIG: tl.constexpr,
) -> tl.tensor:
    """(g + (df/dx)^T c, p + scale f(x)), given u and r of x, sharing what they compute.

    u is in the parameters' dtype, and c from `output_cotangent`. p is returned as it is unless WITH_P. If gradients are
    there, the layer's products are added to memory, those of W1 and W2 by the copy engine, chunk by chunk.
    """
    D: tl.constexpr = CONFIG.padded_dim
    ADDS_GRADIENTS: tl.constexpr = gradients.dw1 is not None
    total = tl.zeros_like(p)
    if CONFIG.scales_first and CONFIG.norm is None:
        du = g
    else:
        du = tl.zeros_like(g)
    if CONFIG.scales_first:
        last_scale = 1.0
    else:
        last_scale = scale
    for j in tl.range(0, weights.hidden, CONFIG.chunk, num_stages=CONFIG.stages):
        w1_chunk = load_w1(weights, layer, j, CONFIG)
        w2_chunk = load_w2(weights, layer, j, CONFIG)
        activated = hidden_units(u, w1_chunk, weights, layer, j, CONFIG)
        dz = tl.dot(c, w2_chunk, input_precision=CONFIG.precision) * activated.slope
        if WITH_P:
            # Rounded as `add_layer` rounds it: what is taken back from a state is what the forward pass has added.
            if CONFIG.scales_first:
                a = rounded(activated.value * scale, weights)
            else:
                a = rounded(activated.value, weights)
            total = tl.dot(a, w2_chunk.T, total, input_precision=CONFIG.precision)
        if ADDS_GRADIENTS:
            a = rounded(activated.value, weights)
            product = tl.dot(c.T, a, input_precision=CONFIG.precision)
            gradients.dw2.atomic_add([layer * D, j], product * last_scale)
        if ADDS_GRADIENTS and gradients.db1 is not None:
            units = layer * weights.hidden + j + tl.arange(0, CONFIG.chunk)
            tl.atomic_add(gradients.db1 + units, last_scale * tl.sum(dz, 0), sem="relaxed")
        dz = rounded(dz, weights)
        du = tl.dot(dz, w1_chunk, du, input_precision=CONFIG.precision)
        if ADDS_GRADIENTS:
            product = tl.dot(u.T, dz, input_precision=CONFIG.precision)
            gradients.dw1.atomic_add([layer * D, j], product * last_scale)
    if WITH_P:
        if CONFIG.scales_first:
            p += total + scale * output_bias(layer, weights, CONFIG)
        else:
            p += scale * (total + output_bias(layer, weights, CONFIG))
    if ADDS_GRADIENTS and gradients.db2 is not None:
        sums = last_scale * tl.sum(c.to(tl.float32), 0)
        tl.atomic_add(gradients.db2 + layer * D + tl.arange(0, D), sums, sem="relaxed")
    if CONFIG.norm is None:
        g = du if CONFIG.scales_first else g + scale * du
    else:
        g = g + norm_vjp(last_scale * du, u.to(tl.float32), r, CONFIG)
    return g, p
