"""A machine that executes, on a CPU, the PTX that Triton compiles for GPUs that are not there.

`launching.py` puts it in the place of a launch: a kernel is compiled for sm_80 or sm_90 as it would be there, and its
programs run on the memory of CPU tensors. All of a program's threads, and several programs, go in lockstep, each
register an array of [programs, threads] (`machine.py`). What is checked on the way: bounds and alignment of each
access, registers that are read before they are written or while a product is still to be added to them, barriers that
some threads miss, copies whose bytes were not announced, threads at odds over shared memory (`shared_memory.py`).

Two schedules bracket the hardware's: in the one, copies land and products are added at once; in the other (`late`) only
when they are waited for. Code that is right gives the same under both.

What it does not show: races over global memory, a missing wgmma.fence, how long anything takes, what ptxas makes of the
PTX. Operands of late products count as read where these are waited for: that they were there in time shows in the other
schedule. Approximate instructions are off by as much as the PTX ISA allows (`arithmetic.py`); a matrix product is
summed in float64 and rounded once, where hardware rounds in an order, and to a width, that nobody states.
"""
