"""What the depth-fused Triton kernels have in common: how memory is laid out, and tiles of it.

A program of a state pass (`forward`, `adjoint`, `exact`) takes a tile of ROWS rows through all steps. x, g and
increments stay in registers; weights come in chunks, as `layer.py` says. Formulas and names are those of
`reference/passes.py`; a Heun step is written by its middle, x + h k1.

What a layer's gradients need of a row are its u and the cotangent c of its output, with the factor h or h/2 except in
float16. In the gradient form "two_pass", the default, they go to scratch memory in the parameters' dtype, [layer calls,
scratch_rows, D], and `gradients.py` adds up products over ranges of rows in registers. In the form "one_pass" the
tile's own products are added to the gradients by reductions in memory, and no scratch is needed. A layer call is a
step's only layer, or with Heun its first (2 i) or second (2 i + 1).

Memory: states [rows, DIM] float32, increments [2, rows, DIM] in the parameters' dtype; schedule [steps, 4] float32 with
h, a, b of each step and the place of its starting state among the anchored ones, -1 where it is not kept; gradients of
W1 (transposed) and W2 [layers D, HIDDEN] float32; squares [tiles, steps, 2] float32, each tile's |y - x_n|^2 and
|x_n|^2. Where increments are stored, `schedule.py` says what a and b are, and `storage.py` how they lie in memory; all
steps have as many bits. Addresses are int64 up to a tile's first row, with 32 bits within the tile. Capital letters are
of a `KernelConfig`: ROWS its rows, DIM its dim, D its padded_dim, C its chunk.

Importing these modules needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(start: tl.tensor, WIDTH: tl.constexpr, CONFIG: tl.constexpr) -> tl.tensor:
    """Offsets of a tile's values among rows of WIDTH values: from its first row on, an int64, with 32 bits."""
    return start * WIDTH + ((tl.arange(0, CONFIG.rows) * WIDTH)[:, None] + tl.arange(0, CONFIG.padded_dim)[None, :])


@triton.jit
def inside_of(start: tl.tensor, count: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    """Which of a tile's values belong to the first `count` rows and are no padding."""
    is_row = start + tl.arange(0, CONFIG.rows) < count
    return is_row[:, None] & (tl.arange(0, CONFIG.padded_dim) < CONFIG.dim)[None, :]


@triton.jit
def anchor_place(schedule: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Place of step n's starting state among the anchored ones; -1 where it is not kept."""
    return tl.load(schedule + 4 * n + 3).to(tl.int32)


@triton.jit
def segment_of(schedule: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Segment of step n, or the one that begins after it where its starting state is kept; -1 if none does."""
    return tl.load(schedule + 4 * n + 1).to(tl.int32)


@triton.jit
def stored_place(schedule: tl.tensor, n: tl.tensor) -> tl.tensor:
    """Place of step n among those whose increments are stored; -1 where its starting state is kept."""
    return tl.load(schedule + 4 * n + 2).to(tl.int32)


@triton.jit
def ends_segment(schedule: tl.tensor, n: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """Whether step n is the last, or the next one's starting state is kept."""
    return tl.load(schedule + 4 * (n + 1) + 3, mask=n + 1 < steps, other=0) >= 0


@triton.jit
def load_tile(states: tl.tensor, start: tl.tensor, inside: tl.tensor, CONFIG: tl.constexpr) -> tl.tensor:
    return tl.load(states + offsets(start, CONFIG.dim, CONFIG), mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(states: tl.tensor, values: tl.tensor, start: tl.tensor, inside: tl.tensor, CONFIG: tl.constexpr) -> None:
    tl.store(states + offsets(start, CONFIG.dim, CONFIG), values.to(states.dtype.element_ty), mask=inside)


@triton.jit
def square_of_rows(values: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """The square of a tile's first rows."""
    of_rows = tl.sum(values * values, 1)
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) < rows, of_rows, 0))


@triton.jit
def store_scratch(
    scratch: tl.tensor,
    values: tl.tensor,
    layer_call: tl.tensor,
    start: tl.tensor,
    scratch_rows: tl.tensor,
    CONFIG: tl.constexpr,
) -> None:
    """Store a whole tile of u or c for the gradients of the called layer."""
    at = scratch + layer_call * scratch_rows * CONFIG.padded_dim
    tl.store(at + offsets(start, CONFIG.padded_dim, CONFIG), values.to(scratch.dtype.element_ty))


@triton.jit
def load_scratch(
    scratch: tl.tensor, layer_call: tl.tensor, start: tl.tensor, scratch_rows: tl.tensor, CONFIG: tl.constexpr
) -> tl.tensor:
    """Load what `store_scratch` has stored."""
    at = scratch + layer_call * scratch_rows * CONFIG.padded_dim
    return tl.load(at + offsets(start, CONFIG.padded_dim, CONFIG))
