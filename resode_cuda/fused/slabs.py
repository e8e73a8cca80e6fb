"""How much of a batch, and of the depth, a backward pass takes at a time, so that its scratch memory is bounded.

A slab has as many rows as scratch memory holds all steps of, in whole waves of programs: all processors begin and end
with it. Where a stack is so deep that slabs would be too thin for a GPU, they are taken through the depth in ranges of
it, each with launches of its own.
"""

SCRATCH_BYTES = 2**29
THINNEST_SLAB = 2**14
"""Rows of a slab, where there are as many, that keep a large GPU busy."""


def slabs(rows: int, steps: int, step_bytes: int, start_bytes: int, unit: int, wave: int) -> tuple[int, int]:
    """Rows of a slab, a multiple of the unit or all, and of how many steps a range of the depth is.

    Args:
        step_bytes: of scratch memory for a row and step.
        start_bytes: for a row and the state at which a range starts, unless there is only one.
        wave: rows that a GPU takes at once, a multiple of the unit. Fewer are taken where no more fit.
    """
    everything = max(unit, -(-rows // unit) * unit)
    if not step_bytes:
        return everything, steps
    fitting = SCRATCH_BYTES // (steps * step_bytes)
    thinnest = min(everything, _whole(THINNEST_SLAB, unit, wave))
    if fitting >= thinnest:
        # All of about as many waves: a short last one would leave most of a GPU idle.
        fitting = _whole(fitting, unit, wave)
        part = wave if fitting >= wave else unit
        count = -(-everything // fitting)
        return min(everything, -(-everything // (count * part)) * part), steps
    size = thinnest
    while True:
        # Ranges whose states take three quarters; their starts are to fit in the rest.
        length = max(1, min(steps, 3 * SCRATCH_BYTES // 4 // (size * step_bytes)))
        if size == unit or size * (length * step_bytes + -(-steps // length) * start_bytes) <= SCRATCH_BYTES:
            return size, length
        size = max(unit, size // 2 // unit * unit)


def _whole(rows: int, unit: int, wave: int) -> int:
    """So many rows or fewer, in whole waves if there is one, else in units, of which there is one."""
    return rows // wave * wave or max(unit, rows // unit * unit)
