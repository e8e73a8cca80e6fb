"""What the depth-fused Triton kernels have in common: how memory is laid out, and tiles of it.

A program of a state pass (`triton_forward`, `triton_adjoint`, `triton_exact`) takes a tile of ROWS rows through all
steps. x, g and increments stay in registers; weights come in chunks, as `triton_layer.py` says. Formulas and names are
those of `torch_backend.py`; a Heun step is written by its middle, x + h k1.

What a layer's gradients need of a row are its u and the cotangent c of its output, less the factor h or h/2. Split, the
default, they go to scratch memory in the parameters' dtype, [uses, scratch_rows, D], and `triton_gradients` adds up
products over ranges of rows in registers. FUSED, the tile's own products are added to the gradients by reductions in
memory, and no scratch is needed. A use is a step's only layer, or with Heun its first (2 i) or second (2 i + 1).

Memory: states [rows, DIM] float32, increments [2, rows, DIM] in the parameters' dtype, schedule [steps, 3] float32 with
h, a, b of each step; gradients of W1 (transposed) and W2 [layers D, HIDDEN] float32; norms [tiles, steps, 2] float32,
each tile's |y - x_n|^2 and |x_n|^2. Addresses are int64 up to a tile's first row, with 32 bits within the tile.

Importing these modules needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def place(start: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Where a tile's values are: from its row on, which is an int64, with 32 bits."""
    return start * DIM + ((tl.arange(0, ROWS) * DIM)[:, None] + tl.arange(0, D)[None, :])


@triton.jit
def inside_of(row: tl.tensor, rows: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    return (row + tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, D) < DIM)[None, :]


@triton.jit
def load_tile(
    states: tl.tensor, start: tl.tensor, inside: tl.tensor, DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    return tl.load(states + place(start, DIM, ROWS, D), mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(
    states: tl.tensor,
    values: tl.tensor,
    start: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    tl.store(states + place(start, DIM, ROWS, D), values.to(states.dtype.element_ty), mask=inside)


@triton.jit
def keep(
    scratch: tl.tensor,
    values: tl.tensor,
    use: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """A whole tile of u or c for the gradients of the use's layer."""
    tl.store(scratch + use * rows * D + place(row, D, ROWS, D), values.to(scratch.dtype.element_ty))


@triton.jit
def kept(
    scratch: tl.tensor, use: tl.tensor, row: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr
) -> tl.tensor:
    return tl.load(scratch + use * rows * D + place(row, D, ROWS, D))
