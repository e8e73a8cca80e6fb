"""One layer on a tile of rows, for the depth-fused Triton kernels. Importing this module needs Triton.

    f(x) = W2 s(W1 u + b1) + b2,  u = norm(x)

A tile has ROWS rows. States x, adjoints g and sums of products are float32 in registers, [ROWS, D]; operands of matrix
products are rounded to the parameters' dtype. The hidden dimension is walked through in chunks of C: a chunk of W1,
[C, D], and one of W2, [D, C], come by descriptor, on GPUs before 9.0 by pointer, and the compiler runs these loads
ahead of the products. D is dim, padded to a power of two, hidden is padded to a multiple of C, both with zeros, which
every activation maps to zero.

Products are scaled by h before they are rounded, so that the residual update is the accumulator of the matrix product;
in float16, which would lose small ones, after it (SCALE_FIRST).

Must match `tile.Tile`.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _has_mean(NORM: str) -> bool:
    return NORM == "layer"


INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


# By the special function units alone; tl.exp and the division spend twice as much on denormal numbers, here flushed to
# zero. Relative errors are below 1e-6 up to |z| = 10, and grow with |z|, where sigmoids differ less and less.
@triton.jit
def exponential(z: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return tl.exp(z)
    else:
        power = z * 1.4426950408889634
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1)


@triton.jit
def reciprocal(z: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return 1 / z
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)


@triton.jit
def sigmoid(z: tl.tensor) -> tl.tensor:
    return reciprocal(1 + exponential(-z))


@triton.jit
def tanh(z: tl.tensor) -> tl.tensor:
    # Near zero 1 - e cancels; the next term of the series is below 1e-8 of z there.
    square = z * z
    series = z * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    e = exponential(-2 * tl.abs(z))
    quotient = (1 - e) * reciprocal(1 + e)
    return tl.where(tl.abs(z) < 0.15, series, tl.where(z < 0, -quotient, quotient))


@triton.jit
def activate(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """(s(z), s'(z)); the compiler drops what is not used."""
    if ACTIVATION == "identity":
        return z, tl.full(z.shape, 1, z.dtype)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(z <= 0, 0.0, 1.0)  # NaN goes through
    elif ACTIVATION == "gelu":
        probability = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        density = 0.3989422804014327 * exponential(-0.5 * z * z)
        return z * probability, probability + z * density
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(v)) / 2 = sigmoid(2 v),  v = sqrt(2 / pi) (z + 0.044715 z^3)
        square = z * z
        p = sigmoid(1.5957691216057308 * z * (1 + 0.044715 * square))
        return z * p, p + z * p * (1 - p) * (1.5957691216057308 * (1 + 0.134145 * square))
    elif ACTIVATION == "silu":
        p = sigmoid(z)
        return z * p, p + z * p * (1 - p)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        a = tanh(z)
        return a, 1 - a * a


@triton.jit
def normalize(x: tl.tensor, NORM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr) -> tl.tensor:
    """(u, r) of `norms.py`, r of shape [ROWS]; without a norm (x, 0). Padding stays zero."""
    if NORM is None:
        return x, tl.zeros([x.shape[0]], tl.float32)
    else:
        if NORM == "layer":
            x = x - (tl.sum(x, 1) / DIM)[:, None]
            if DIM < D:
                x = tl.where(tl.arange(0, D)[None, :] < DIM, x, 0)
        r = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPSILON)
        return x * r[:, None], r


@triton.jit
def pull_back(
    c: tl.tensor, u: tl.tensor, r: tl.tensor, NORM: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    """The cotangent of x from c, that of u. Padding of c is zero, and stays so."""
    along = tl.sum(c * u, 1) / DIM
    if NORM == "layer":
        c = c - (tl.sum(c, 1) / DIM)[:, None]
        if DIM < D:
            c = tl.where(tl.arange(0, D)[None, :] < DIM, c, 0)
    return (c - u * along[:, None]) * r[:, None]


@triton.jit
def load_w1(
    w1: tl.tensor_descriptor, layer: tl.tensor, j: tl.tensor, HIDDEN: tl.tensor, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """W1 [C, D] of a chunk; w1 is a descriptor, or a pointer where there is no copy engine to use it."""
    if isinstance(w1, tl.tensor_descriptor):
        return w1.load([layer * HIDDEN + j, 0])
    else:
        start = (tl.full([], layer, tl.int64) * HIDDEN + j) * D
        return tl.load(w1 + start + (tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]))


@triton.jit
def load_w2(
    w2: tl.tensor_descriptor, layer: tl.tensor, j: tl.tensor, HIDDEN: tl.tensor, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """W2 [D, C] of a chunk, as `load_w1`."""
    if isinstance(w2, tl.tensor_descriptor):
        return w2.load([layer * D, j])
    else:
        start = tl.full([], layer, tl.int64) * D * HIDDEN + j
        return tl.load(w2 + start + (tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, C)[None, :]))


@triton.jit
def rounded(x: tl.tensor, w: tl.tensor_descriptor) -> tl.tensor:
    """In the dtype of weights."""
    if isinstance(w, tl.tensor_descriptor):
        return x.to(w.dtype)
    else:
        return x.to(w.dtype.element_ty)


@triton.jit
def hidden(
    u: tl.tensor, w1: tl.tensor, b1: tl.tensor, at: tl.tensor, C: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    """z of a chunk, W1 u + b1."""
    z = tl.dot(u, w1.T, input_precision=PRECISION)
    if b1 is not None:
        z += tl.load(b1 + at + tl.arange(0, C)).to(tl.float32)[None, :]
    return z


@triton.jit
def add_layer(
    acc: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    HIDDEN: tl.tensor,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> tl.tensor:
    """acc + scale f(x)."""
    u = rounded(normalize(x, NORM, DIM, D, EPSILON)[0], w1)
    return add_layer_at(acc, u, scale, layer, w1, b1, w2, b2, HIDDEN, ACTIVATION, D, C, STAGES, PRECISION, SCALE_FIRST)


@triton.jit
def add_layer_at(
    acc: tl.tensor,
    u: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    HIDDEN: tl.tensor,
    ACTIVATION: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> tl.tensor:
    """acc + scale f(x), given u."""
    if SCALE_FIRST:
        total = acc
    else:
        total = tl.zeros_like(acc)
    for c in tl.range(0, HIDDEN, C, num_stages=STAGES):
        w1_chunk = load_w1(w1, layer, c, HIDDEN, D, C)
        w2_chunk = load_w2(w2, layer, c, HIDDEN, D, C)
        a = activate(hidden(u, w1_chunk, b1, layer * HIDDEN + c, C, PRECISION), ACTIVATION)[0]
        if SCALE_FIRST:
            a = a * scale
        total = tl.dot(rounded(a, w2), w2_chunk.T, total, input_precision=PRECISION)
    if b2 is not None:
        bias = tl.load(b2 + layer * D + tl.arange(0, D)).to(tl.float32)[None, :]
        total += scale * bias if SCALE_FIRST else bias
    return total if SCALE_FIRST else acc + scale * total


@triton.jit
def pull_layer(
    g: tl.tensor,
    p: tl.tensor,
    u: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    scale: tl.tensor,
    layer: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    HIDDEN: tl.tensor,
    WITH_P: tl.constexpr,
    FUSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> tl.tensor:
    """(g + scale (df/dx)^T c, p + scale f(x)), given u and r of x, sharing what they compute.

    u and c are in the parameters' dtype. p is returned as it is unless WITH_P. With FUSED the layer's gradients, times
    scale, are added to memory, those of W1 (transposed) and W2 by the copy engine, chunk by chunk.
    """
    if SCALE_FIRST:
        total = p
    else:
        total = tl.zeros_like(p)
    if SCALE_FIRST and NORM is None:
        du = g
    else:
        du = tl.zeros_like(g)
    for j in tl.range(0, HIDDEN, C, num_stages=STAGES):
        w1_chunk = load_w1(w1, layer, j, HIDDEN, D, C)
        w2_chunk = load_w2(w2, layer, j, HIDDEN, D, C)
        a, slope = activate(hidden(u, w1_chunk, b1, layer * HIDDEN + j, C, PRECISION), ACTIVATION)
        if SCALE_FIRST:
            a = a * scale
        a = rounded(a, w2)
        if WITH_P:
            total = tl.dot(a, w2_chunk.T, total, input_precision=PRECISION)
        if FUSED:
            gradient = tl.dot(c.T, a, input_precision=PRECISION)
            dw2.atomic_add([layer * D, j], gradient if SCALE_FIRST else gradient * scale)
        dz = tl.dot(c, w2_chunk, input_precision=PRECISION) * slope
        if SCALE_FIRST:
            dz = dz * scale
        if FUSED and db1 is not None:
            sums = tl.sum(dz, 0)
            place = layer * HIDDEN + j + tl.arange(0, C)
            tl.atomic_add(db1 + place, sums if SCALE_FIRST else sums * scale, sem="relaxed")
        dz = rounded(dz, w1)
        du = tl.dot(dz, w1_chunk, du, input_precision=PRECISION)
        if FUSED:
            gradient = tl.dot(u.T, dz, input_precision=PRECISION)
            dw1.atomic_add([layer * D, j], gradient if SCALE_FIRST else gradient * scale)
    if WITH_P:
        if b2 is not None:
            bias = tl.load(b2 + layer * D + tl.arange(0, D)).to(tl.float32)[None, :]
            total += scale * bias if SCALE_FIRST else bias
        p = total if SCALE_FIRST else p + scale * total
    if FUSED and db2 is not None:
        tl.atomic_add(db2 + layer * D + tl.arange(0, D), scale * tl.sum(c.to(tl.float32), 0), sem="relaxed")
    if NORM is None:
        g = du if SCALE_FIRST else g + scale * du
    else:
        du = du if SCALE_FIRST else scale * du
        g = g + pull_back(du, u.to(tl.float32), r, NORM, DIM, D)
    return g, p
