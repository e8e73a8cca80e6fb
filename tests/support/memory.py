"""Activation memory, from the allocator's own events."""

import gc

from torch.profiler import ProfilerActivity, profile


def allocations(run):
    """Bytes that each allocator event of run() adds or, below zero, gives back, in order."""
    gc.collect()  # or what earlier tests have left in cycles is given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del kept
    return changes


def held(stack, x):
    """Bytes held between forward and backward, the output among them."""
    stack(x)  # the signs of the re-evaluation check are made once
    return sum(allocations(lambda: stack(x)))


def peak(stack, x):
    """Peak of a training step over what was resident before, parameter gradients among that."""

    def step():
        stack.zero_grad(set_to_none=False)
        stack(x).square().mean().backward()

    step()
    now = highest = 0
    for change in allocations(step):
        now += change
        highest = max(highest, now)
    return highest
