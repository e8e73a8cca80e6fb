"""The tables of docs/scale.md, by the names that their places there have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..harness.tables import Table
from .assumptions import Assumptions
from .methods import (
    CHECKPOINT,
    FP8,
    METHODS,
    NESTED,
    OFFLOAD,
    PLAIN,
    REBUILD,
    STORED,
    Method,
    depth_where_segments_win,
)
from .networks import NETWORKS, OFFLOADED, Network
from .parallelism import (
    Plan,
    at_work,
    fixed_bytes,
    gpu_seconds,
    kept_bytes,
    largest_units,
    links,
    parameter_bytes,
    plans,
    step_seconds,
)

GPUS = (8, 64, 1024)
STORED_NAMES = [f"{bits} bits" for bits in STORED]


def short(value: float) -> str:
    """Three digits: 0.62, 14.9, 142k, 1.24M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{value:.3g}") >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def gib(count: float) -> str:
    value = count / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def names(methods: Sequence[Method]) -> list[str]:
    return [method.name for method in methods]


def gains(networks: Sequence[Network], given: Assumptions) -> Table:
    """How much larger a microbatch can be than under checkpointing of each layer."""
    table = Table(
        "Largest microbatch on 1,024 GPUs of FSDP2, over that of checkpointing", ["network", *names(METHODS)], 1
    )
    plan = plans(1024)[1]
    for network in networks:
        base = largest_units(plan, network, CHECKPOINT, given)
        if base:
            found = (largest_units(plan, network, method, given) / base for method in METHODS)
            table.rows.append([network.name, *(f"{gain:.2f}" if gain < 10 else f"{gain:.0f}" for gain in found)])
    table.rows.append(["time by products, of plain", *(f"{method.time:.2f}" for method in METHODS)])
    return table


def shapes(networks: Sequence[Network], given: Assumptions) -> Table:
    """What the networks are, a layer and unit."""
    table = Table("Networks", ["network", "unit", "N", "parameters", "state", "saved", "r", "FLOPs"])
    for network in networks:
        counts = network.parameters, network.state_bytes, network.inner_bytes
        row = [network.name, network.unit, f"{network.layers:,}", *(short(count) for count in counts)]
        table.rows.append([*row, f"{network.ratio:.1f}", short(network.layer_flops)])
    table.note = (
        "A layer and unit: bytes of its input in bfloat16 (state), bytes that autograd saves, the input among them, "
        "r = saved / state, and FLOPs of a forward pass."
    )
    return table


def states(networks: Sequence[Network], given: Assumptions) -> Table:
    """What each method keeps of all layers, in states of one layer."""
    table = Table("Kept of all layers, in bfloat16 states of one", ["network", *names(METHODS)], 1)
    for network in networks:
        kept = (method.kept(network, network.layers, 1) / network.state_bytes for method in METHODS)
        table.rows.append([network.name, *(short(count) for count in kept)])
    table.rows.append(["evaluations of a layer in a step", *(str(method.evaluations) for method in METHODS)])
    return table


def segments(networks: Sequence[Network], given: Assumptions) -> Table:
    """From which depth on exact segments take less memory than stored increments at the same number of evaluations."""
    table = Table(
        "N from which on segments keep less", ["network", "N", "r", *(f"than {name}" for name in STORED_NAMES)], 1
    )
    for network in networks:
        depths = (f"{depth_where_segments_win(network, bits):,.0f}" for bits in STORED)
        table.rows.append([network.name, f"{network.layers:,}", f"{network.ratio:.1f}", *depths])
    return table


def parameters(networks: Sequence[Network], given: Assumptions) -> Table:
    """Weights, gradients and optimizer on a GPU, in total and by their kinds."""
    columns = ["network", "plan", *(f"{gpus:,} GPUs" for gpus in GPUS), "of these: weights", "gradients", "Adam"]
    table = Table("Weights, gradients and Adam on a GPU, GiB", columns)
    for network in different(networks):
        for name in [plan.name for plan in plans(GPUS[-1]) if plan.serves(network)]:
            cells = []
            kinds: tuple[float, ...] = ()
            for gpus in GPUS:
                plan = next((plan for plan in plans(gpus) if plan.name == name), None)
                kinds = kinds if plan is None or kinds else parameter_bytes(plan, network, given)
                cells.append("–" if plan is None else gib(sum(parameter_bytes(plan, network, given))))
            table.rows.append([network.name, name, *cells, *(gib(kind) for kind in kinds)])
    table.note = "Kinds: on the fewest of these GPUs."
    return table


def activations(networks: Sequence[Network], given: Assumptions) -> Table:
    """What each method keeps of a microbatch on a GPU."""
    table = Table("Activations of a microbatch on a GPU, GiB", ["network", "cut", "units", "at work", *names(METHODS)])
    data, _, tensor, pipeline = plans(8)
    for network in networks:
        cuts = {"data": data, "tensor 8": tensor, "pipeline 8": pipeline}
        if network.key_value_width:
            cuts["tensor 8, context 16, pipeline 8"] = plans(1024)[-1]
        for cut, plan in cuts.items():
            units = network.units / plan.split
            kept = (gib(units * kept_bytes(plan, network, method)) for method in METHODS)
            work = gib(units * at_work(plan, network, CHECKPOINT))
            table.rows.append([network.name, cut, short(units), work, *kept])
    table.note = (
        "Units: of a microbatch, on a GPU. At work: the layer that is being differentiated, under checkpointing, "
        f"beside what is kept; stored increments need {STORED[4].work:.0f} bytes a value of the state more, rebuilding "
        f"{REBUILD.work:.0f}."
    )
    return table


def largest(networks: Sequence[Network], given: Assumptions) -> Table:
    """How large a microbatch can be."""
    title = f"Units of the largest microbatch, on each GPU of {given.memory_bytes / 1e9:.0f} GB"
    table = Table(title, ["network", "plan, GPUs", *names(METHODS)])
    for network in different(networks):
        for plan in _plans_that_fit(network, given):
            found = (short(largest_units(plan, network, method, given)) for method in METHODS)
            table.rows.append([network.name, plan.label, *found])
    table.note = (
        "Plans are left out whose parameters do not fit. A replica's microbatch is the figure times the GPUs that "
        "share it (tensor, context)."
    )
    return table


def times(networks: Sequence[Network], given: Assumptions) -> Table:
    """A step's seconds of computing and of links, and each method's time relative to plain."""
    shown = (CHECKPOINT, NESTED, OFFLOAD, FP8, STORED[4], REBUILD)
    columns = ["network", "plan, GPUs", "plain, s", "links, s", "again, s", "rounding", *names(shown)]
    table = Table("A step, and each method's time relative to plain", columns)
    for network in networks:
        for plan in _plans_that_fit(network, given):
            plain = step_seconds(plan, network, PLAIN, given)
            linked = links(plan, network, PLAIN, given).total
            again = links(plan, network, CHECKPOINT, given).total - linked
            computed = gpu_seconds(plan, network, PLAIN, given)
            rounding = gpu_seconds(plan, network, STORED[4], given) - gpu_seconds(plan, network, CHECKPOINT, given)
            row = [
                network.name,
                plan.label,
                short(computed),
                f"{linked:.2g}",
                f"{again:.2g}",
                f"{rounding / computed:.1%}",
            ]
            for method in shown:
                pairs = zip(step_seconds(plan, network, method, given), plain, strict=True)
                low, high = sorted(f"{mine / its:.2f}" for mine, its in pairs)
                row.append(low if low == high else f"{low}–{high}")
            table.rows.append(row)
    table.note = (
        "Plain: computing on a GPU. Links: all of plain's, one after the other; again: what a re-evaluation adds to "
        "them. Rounding: what 4 bits move through memory, of plain. Relative: with links beside computing, and with "
        "one waiting for the other, the smaller first."
    )
    return table


def offloading(networks: Sequence[Network], given: Assumptions) -> Table:
    """What the link to the host must carry while the forward pass runs."""
    columns = ["a sample of", "layers' inputs, bytes", "forward FLOPs", "GB/s", "of 4 bits", "at other rates"]
    table = Table("What the link to the host must carry", columns, 1)
    for one in OFFLOADED:
        needed = one.state_bytes / one.flops * given.flops / 1e9
        others = [f"{rate / 1e9:.3g} at {rate / one.state_bytes * one.flops / 1e12:.0f}" for rate in one.rates]
        row = [one.name, short(one.state_bytes), short(one.flops), short(needed), short(needed * 4.25 / 16)]
        table.rows.append([*row, f"{', '.join(others)} TFLOP/s" if others else "–"])
    table.note = (
        "GB/s: layers' inputs in bfloat16 over the time of the forward pass at "
        f"{given.flops / 1e12:.0f} TFLOP/s. Of 4 bits: if packed increments went there instead."
    )
    return table


def different(networks: Sequence[Network]) -> Iterator[Network]:
    """Without networks that differ from an earlier one in their context alone, which no such table shows."""
    seen = set()
    for network in networks:
        shape = (network.layers, network.width, network.layer_parameters)
        if shape not in seen:
            seen.add(shape)
            yield network


def _plans_that_fit(network: Network, given: Assumptions) -> Iterator[Plan]:
    """FSDP2 on the fewest and on the most GPUs, the others on the most; three kinds together for decoders alone."""
    most = plans(GPUS[-1])
    for plan in (most[0], plans(GPUS[0])[1], *most[1:]):
        if plan.serves(network) and fixed_bytes(plan, network, given) < given.memory_bytes:
            yield plan


TABLES: dict[str, Callable[[Sequence[Network], Assumptions], Table]] = {
    make.__name__: make
    for make in (gains, shapes, states, segments, parameters, activations, largest, times, offloading)
}


def all_tables(networks: Sequence[Network] = NETWORKS, given: Assumptions | None = None) -> dict[str, str]:
    """The tables in Markdown, by name."""
    return {name: make(networks, given or Assumptions()).markdown() for name, make in TABLES.items()}
