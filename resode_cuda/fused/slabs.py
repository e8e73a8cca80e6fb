"""How much of a batch, and of the depth, a backward pass takes at a time, so that its scratch memory is bounded.

A slab has as many rows as scratch memory holds all steps of. Where a stack is so deep that slabs would be too thin for
a GPU, they are taken through the depth in ranges of it, each with launches of its own.
"""

SCRATCH_BYTES = 2**29
THINNEST_SLAB = 2**14
"""Rows of a slab, where there are as many, that keep a large GPU busy."""


def slabs(rows: int, steps: int, step_bytes: int, start_bytes: int, unit: int) -> tuple[int, int]:
    """Rows of a slab, a multiple of the unit, and of how many steps a range of the depth is.

    Args:
        step_bytes: of scratch memory for a row and step.
        start_bytes: for a row and the state at which a range starts, unless there is only one.
    """
    everything = max(unit, -(-rows // unit) * unit)
    if not step_bytes:
        return everything, steps
    fitting = SCRATCH_BYTES // (steps * step_bytes) // unit * unit
    thinnest = min(everything, max(unit, THINNEST_SLAB // unit * unit))
    if fitting >= thinnest:
        # All about equally large: a short last one would leave most of a GPU idle.
        count = -(-everything // fitting)
        return -(-everything // (count * unit)) * unit, steps
    size = thinnest
    while True:
        # Ranges whose states take three quarters; their starts are to fit in the rest.
        length = max(1, min(steps, 3 * SCRATCH_BYTES // 4 // (size * step_bytes)))
        if size == unit or size * (length * step_bytes + -(-steps // length) * start_bytes) <= SCRATCH_BYTES:
            return size, length
        size = max(unit, size // 2 // unit * unit)
