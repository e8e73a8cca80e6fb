"""The depth-fused Triton kernels; `triton_backend.py` launches them. Importing this module needs Triton.

    forward_kernel          x_N from x_0, the last increments, the anchored states
    adjoint_kernel          from x_last and g_last to x_first and g_first over a range of steps, rebuilding the states
    exact_kernel            the same from the exact x_first: forward over the range, keeping u, and back
    weight_gradient_kernel  the gradients of the parameters from what the last two have left of each layer's use

A program of the first three takes a tile of ROWS rows through all steps. x, g and the increments stay in registers, the
latter in the parameters' dtype: they predict the point y, which is rounded to that anyway. Weights come in chunks, as
`triton_layer.py` says. Formulas and names are those of `torch_backend.py`, which these must match; a Heun step is
written by its middle, x + h k1.

What a layer's gradients need of a row are its u and the cotangent c of its output, less the factor h or h/2. Split, the
default, they go to scratch memory in the parameters' dtype, [uses, scratch_rows, D], and weight_gradient_kernel adds up
products over ranges of rows in registers. FUSED, the tile's own products are added to the gradients by reductions in
memory, and no scratch is needed. A use is a step's only layer, or with Heun its first (2 i) or second (2 i + 1).

Memory: states [rows, DIM] float32, increments [2, rows, DIM] in the parameters' dtype, schedule [steps, 3] float32 with
h, a, b, such that y = x - (a d1 - b d2), d1 and d2 being the increments of the two steps behind; gradients of W1
(transposed) and W2 [layers D, HIDDEN] float32; norms [tiles, steps, 2], each tile's |y - x_n|^2 and |x_n|^2. The last
two steps are predicted by the increments that the forward pass has kept: d2, with a = 0 and b = -1.
"""

import triton
import triton.language as tl

from .triton_layer import activate, add_layer, hidden, normalize, pull_layer


@triton.jit
def _place(start: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Where a tile's values are: from its row on, which is an int64, with 32 bits."""
    return start * DIM + ((tl.arange(0, ROWS) * DIM)[:, None] + tl.arange(0, D)[None, :])


@triton.jit
def _inside(row: tl.tensor, rows: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    return (row + tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, D) < DIM)[None, :]


@triton.jit
def _load(
    states: tl.tensor, start: tl.tensor, inside: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    return tl.load(states + _place(start, DIM, ROWS, D), mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(
    states: tl.tensor,
    values: tl.tensor,
    start: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    tl.store(states + _place(start, DIM, ROWS, D), values.to(states.dtype.element_ty), mask=inside)


@triton.jit
def _add_increment(
    acc: tl.tensor,
    x: tl.tensor,
    h: tl.tensor,
    SIGN: tl.constexpr,
    first: tl.tensor,
    second: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    HIDDEN: tl.tensor,
    HEUN: tl.constexpr,
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
    """acc + SIGN Phi(x), of a step h whose layers are these."""
    if HEUN:
        middle = add_layer(
            *(x, x, h, first, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
        return add_layer(
            *(acc + SIGN * 0.5 * (middle - x), middle, SIGN * 0.5 * h, second, w1, b1, w2, b2, HIDDEN),
            *(ACTIVATION, NORM, EPSILON, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    else:
        return add_layer(
            *(acc, x, SIGN * h, first, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )


@triton.jit(do_not_specialize=["count", "rows", "steps", "anchors"])
def forward_kernel(
    x_first: tl.tensor,
    x_last: tl.tensor,
    increments: tl.tensor,
    anchored: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    steps: tl.int32,
    anchors: tl.int32,
    HIDDEN: tl.int32,
    KEPT: tl.constexpr,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> None:
    """A tile per program, of `count` rows. The last KEPT steps form their increment apart, all others add to the state
    itself. increments and anchored: each state is `rows` rows behind the last one."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    inside = _inside(row, count, DIM, ROWS, D)
    x = _load(x_first, row, inside, DIM, ROWS, D)
    for n in range(steps - KEPT):
        if anchored is not None:
            if n % anchors == 0:
                _store(anchored + (n // anchors) * rows * DIM, x, row, inside, DIM, ROWS, D)
        h = tl.load(schedule + 3 * n)
        x = _add_increment(
            *(x, x, h, 1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
            *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    if KEPT > 0:
        for n in range(steps - KEPT, steps):
            if anchored is not None:
                if n % anchors == 0:
                    _store(anchored + (n // anchors) * rows * DIM, x, row, inside, DIM, ROWS, D)
            h = tl.load(schedule + 3 * n)
            d = _add_increment(
                *(tl.zeros_like(x), x, h, 1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            x += d
            _store(increments + (steps - 1 - n) * rows * DIM, d, row, inside, DIM, ROWS, D)
    if x_last is not None:
        _store(x_last, x, row, inside, DIM, ROWS, D)


@triton.jit
def _keep(
    scratch: tl.tensor,
    values: tl.tensor,
    use: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """A whole tile of u or c for the gradients of the use's layer."""
    tl.store(scratch + use * rows * D + _place(row, D, ROWS, D), values.to(scratch.dtype.element_ty))


@triton.jit
def _kept(
    scratch: tl.tensor, use: tl.tensor, row: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    return tl.load(scratch + use * rows * D + _place(row, D, ROWS, D))


@triton.jit(
    do_not_specialize=["count", "rows", "d_last_rows", "scratch_rows", "first", "last", "steps", "anchors"],
)
def adjoint_kernel(
    x_last: tl.tensor,
    g_last: tl.tensor,
    d_last: tl.tensor,
    x_first: tl.tensor,
    g_first: tl.tensor,
    d_first: tl.tensor,
    anchored: tl.tensor,
    norms: tl.tensor,
    us: tl.tensor,
    cs: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    d_last_rows: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    steps: tl.int32,
    anchors: tl.int32,
    HIDDEN: tl.int32,
    EXTRAPOLATES: tl.constexpr,
    CORRECTIONS: tl.constexpr,
    REUSES: tl.constexpr,
    FUSED: tl.constexpr,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> None:
    """A tile per program, of `count` rows, over the steps from last - 1 down to first.

    d_last, d_first: d2 and d1 before and after the range, d_last_rows and count rows apart; those that the forward pass
    has kept stand newest first. anchored: its states are `rows` apart. x_first, d_first: None where nobody goes on from
    there.
    """
    tile = tl.program_id(0).to(tl.int64)
    row = tile * ROWS
    inside = _inside(row, count, DIM, ROWS, D)
    x = _load(x_last, row, inside, DIM, ROWS, D)
    g = _load(g_last, row, inside, DIM, ROWS, D)
    if EXTRAPOLATES:
        d2 = _load(d_last, row, inside, DIM, ROWS, D).to(w1.dtype)
        d1 = _load(d_last + d_last_rows * DIM, row, inside, DIM, ROWS, D).to(w1.dtype)
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 3 * n)
        if EXTRAPOLATES:
            a, b = tl.load(schedule + 3 * n + 1), tl.load(schedule + 3 * n + 2)
            y = x - (a * d1.to(tl.float32) - b * d2.to(tl.float32))
        elif HEUN:
            y = _add_increment(
                *(x, x, -h, 1, n + 1, n, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            y = add_layer(
                *(x, x, -h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        for _ in range(CORRECTIONS):
            y = _add_increment(
                *(x, y, h, -1, n, n + 1, w1, b1, w2, b2, HIDDEN, HEUN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        if anchored is not None:
            is_anchored = n % anchors == 0
            exact = _load(anchored + (n // anchors) * rows * DIM, row, inside & is_anchored, DIM, ROWS, D)
            y = tl.where(is_anchored, exact, y)
        # Rows beyond the end must stay finite: their cotangents are zero.
        y = tl.where(inside, y, 0)

        p = tl.zeros_like(x)
        if HEUN:
            middle = add_layer(
                *(y, y, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            if REUSES:
                p = 0.5 * (middle - y)
            u, r = normalize(middle, NORM, DIM, D, EPSILON)
            u, c = u.to(w1.dtype), g.to(w1.dtype)
            if us is not None:
                _keep(us, u, 2 * (n - first) + 1, row, scratch_rows, ROWS, D)
                _keep(cs, c, 2 * (n - first) + 1, row, scratch_rows, ROWS, D)
            # (h/2) (df_{n+1}/dx)^T g
            through, p = pull_layer(
                *(tl.zeros_like(g), p, u, r, c, 0.5 * h, n + 1, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(REUSES, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            u, r = normalize(y, NORM, DIM, D, EPSILON)
            u, c = u.to(w1.dtype), (g + 2 * through).to(w1.dtype)
            if us is not None:
                _keep(us, u, 2 * (n - first), row, scratch_rows, ROWS, D)
                _keep(cs, c, 2 * (n - first), row, scratch_rows, ROWS, D)
            g, p = pull_layer(
                *(g + through, p, u, r, c, 0.5 * h, n, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(False, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            u, r = normalize(y, NORM, DIM, D, EPSILON)
            u, c = u.to(w1.dtype), g.to(w1.dtype)
            if us is not None:
                _keep(us, u, n - first, row, scratch_rows, ROWS, D)
                _keep(cs, c, n - first, row, scratch_rows, ROWS, D)
            g, p = pull_layer(
                *(g, p, u, r, c, h, n, w1, b1, w2, b2, dw1, db1, dw2, db2, HIDDEN),
                *(REUSES, FUSED, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )

        if REUSES:
            x = x - p
        else:
            x = y
        measured = inside
        if anchored is not None:
            x = tl.where(is_anchored, y, x)
            measured = inside & (n % anchors != 0)
        if REUSES and EXTRAPOLATES:
            d2 = d1
            d1 = p.to(w1.dtype)
        place = norms + (tile * steps + n) * 2
        if REUSES:
            e = tl.where(measured, y - x, 0)
            tl.store(place, tl.sum(e * e))
        x_measured = tl.where(measured, x, 0)
        tl.store(place + 1, tl.sum(x_measured * x_measured))
    _store(g_first, g, row, inside, DIM, ROWS, D)
    if x_first is not None:
        _store(x_first, x, row, inside, DIM, ROWS, D)
    if EXTRAPOLATES:
        if d_first is not None:
            _store(d_first, d2, row, inside, DIM, ROWS, D)
            _store(d_first + count * DIM, d1, row, inside, DIM, ROWS, D)


@triton.jit(do_not_specialize=["count", "scratch_rows", "first", "last"])
def exact_kernel(
    x_first: tl.tensor,
    g_last: tl.tensor,
    g_first: tl.tensor,
    us: tl.tensor,
    rs: tl.tensor,
    cs: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    b2: tl.tensor,
    count: tl.int64,
    scratch_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    HIDDEN: tl.int32,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
) -> None:
    """A tile per program, of `count` rows: forward over the steps from first to last - 1, and back.

    u of each use goes to us and, with a norm, r to rs, [uses, scratch_rows] float32; they are read again on the way
    back, when c goes to cs.
    """
    start = tl.program_id(0).to(tl.int64) * ROWS
    inside = _inside(start, count, DIM, ROWS, D)
    x = _load(x_first, start, inside, DIM, ROWS, D)
    for i in range(last - first):
        n = first + i
        h = tl.load(schedule + 3 * n)
        u, r = normalize(x, NORM, DIM, D, EPSILON)
        use = 2 * i if HEUN else i
        _keep(us, u, use, start, scratch_rows, ROWS, D)
        if rs is not None:
            tl.store(rs + use * scratch_rows + start + tl.arange(0, ROWS), r)
        if HEUN:
            middle = add_layer(
                *(x, x, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            u, r = normalize(middle, NORM, DIM, D, EPSILON)
            _keep(us, u, use + 1, start, scratch_rows, ROWS, D)
            if rs is not None:
                tl.store(rs + (use + 1) * scratch_rows + start + tl.arange(0, ROWS), r)
            x = add_layer(
                *(0.5 * (x + middle), middle, 0.5 * h, n + 1, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        else:
            x = add_layer(
                *(x, x, h, n, w1, b1, w2, b2, HIDDEN, ACTIVATION, NORM, EPSILON),
                *(DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
        x = tl.where(inside, x, 0)
    # What this program's threads have written is read by others of them.
    tl.debug_barrier()
    g = _load(g_last, start, inside, DIM, ROWS, D)
    for i in range(last - first):
        n = last - 1 - i
        h = tl.load(schedule + 3 * n)
        if HEUN:
            use = 2 * (n - first)
            u = _kept(us, use + 1, start, scratch_rows, ROWS, D)
            if rs is not None:
                r = tl.load(rs + (use + 1) * scratch_rows + start + tl.arange(0, ROWS))
            else:
                r = tl.zeros([ROWS], tl.float32)
            c = g.to(w1.dtype)
            _keep(cs, c, use + 1, start, scratch_rows, ROWS, D)
            through, _ = pull_layer(
                *(tl.zeros_like(g), g, u, r, c, 0.5 * h, n + 1, w1, b1, w2, b2, None, None, None, None, HIDDEN),
                *(False, False, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
            )
            c = (g + 2 * through).to(w1.dtype)
            g += through
        else:
            use = n - first
            c = g.to(w1.dtype)
        u = _kept(us, use, start, scratch_rows, ROWS, D)
        if rs is not None:
            r = tl.load(rs + use * scratch_rows + start + tl.arange(0, ROWS))
        else:
            r = tl.zeros([ROWS], tl.float32)
        _keep(cs, c, use, start, scratch_rows, ROWS, D)
        g, _ = pull_layer(
            *(g, g, u, r, c, 0.5 * h if HEUN else h, n, w1, b1, w2, b2, None, None, None, None, HIDDEN),
            *(False, False, ACTIVATION, NORM, DIM, D, C, STAGES, PRECISION, SCALE_FIRST),
        )
    _store(g_first, g, start, inside, DIM, ROWS, D)


@triton.jit(do_not_specialize=["scratch_rows", "written", "range_rows", "first", "last"])
def weight_gradient_kernel(
    us: tl.tensor,
    cs: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    schedule: tl.tensor,
    w1: tl.tensor_descriptor,
    b1: tl.tensor,
    w2: tl.tensor_descriptor,
    scratch_rows: tl.int64,
    written: tl.int64,
    range_rows: tl.int64,
    first: tl.int32,
    last: tl.int32,
    HIDDEN: tl.int32,
    ATOMIC: tl.constexpr,
    HEUN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A chunk of a layer's hidden dimension per program, over a range of the rows that were written.

    z and the cotangent are computed again from u and c. With one range nobody else adds to the same gradients, and the
    order of the sums is fixed; with several the additions are ATOMIC.
    """
    chunks = HIDDEN // C
    layer = first + tl.program_id(0) // chunks
    j = tl.program_id(0) % chunks * C
    start = tl.program_id(1).to(tl.int64) * range_rows
    stop = tl.minimum(start + range_rows, written)
    w1_chunk = w1.load([layer * HIDDEN + j, 0])
    w2_chunk = w2.load([layer * D, j])
    sum1 = tl.zeros([D, C], tl.float32)
    sum2 = tl.zeros([D, C], tl.float32)
    bias1 = tl.zeros([C], tl.float32)
    bias2 = tl.zeros([D], tl.float32)
    for k in tl.static_range(2 if HEUN else 1):
        # With Heun a layer is the first of its own step, and the second of the one before.
        n = layer - k
        use = 2 * (n - first) + k if HEUN else n - first
        is_there = (n >= first) & (n < last)
        scale = tl.load(schedule + 3 * n, mask=is_there, other=0)
        if HEUN:
            scale = 0.5 * scale
        part1 = tl.zeros([D, C], tl.float32)
        part2 = tl.zeros([D, C], tl.float32)
        for at in tl.range(start, tl.where(is_there, stop, start), ROWS, num_stages=STAGES):
            u = _kept(us, use, at, scratch_rows, ROWS, D)
            c = _kept(cs, use, at, scratch_rows, ROWS, D)
            a, slope = activate(hidden(u, w1_chunk, b1, layer * HIDDEN + j, C, PRECISION), ACTIVATION)
            dz = tl.dot(c, w2_chunk, input_precision=PRECISION) * slope
            part1 = tl.dot(u.T, dz.to(u.dtype), part1, input_precision=PRECISION)
            part2 = tl.dot(c.T, a.to(c.dtype), part2, input_precision=PRECISION)
            if db1 is not None:
                bias1 += scale * tl.sum(dz, 0)
            if db2 is not None:
                bias2 += scale * tl.sum(c.to(tl.float32), 0)
        sum1 += scale * part1
        sum2 += scale * part2
    place = (
        tl.full([], layer, tl.int64) * D * HIDDEN + j + ((tl.arange(0, D) * HIDDEN)[:, None] + tl.arange(0, C)[None, :])
    )
    _add(dw1 + place, sum1, ATOMIC)
    _add(dw2 + place, sum2, ATOMIC)
    if db1 is not None:
        _add(db1 + layer * HIDDEN + j + tl.arange(0, C), bias1, ATOMIC)
    if db2 is not None:
        if j == 0:
            _add(db2 + layer * D + tl.arange(0, D), bias2, ATOMIC)


@triton.jit
def _add(out: tl.tensor, values: tl.tensor, ATOMIC: tl.constexpr) -> None:
    if ATOMIC:
        tl.atomic_add(out, values, sem="relaxed")
    else:
        tl.store(out, tl.load(out) + values)
