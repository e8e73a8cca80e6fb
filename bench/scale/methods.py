"""The ways to come by a layer's input in the backward pass, and what each keeps, computes and moves for it.

"Kept" is what lies between a layer's forward and its backward pass. The layer that is being differentiated has its own
saved tensors and gradients besides, whatever the method (`parallelism.at_work`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from .networks import Network

SCALE_BITS = 0.25
"""An 8-bit scale for 32 values."""
FLOAT32 = 4

Kept = Callable[[Network, int, int], float]
"""Bytes a unit of so many layers, for so many microbatches that are between their forward and their backward pass."""


@dataclass(frozen=True)
class Method:
    name: str
    kept: Kept
    evaluations: int
    """How often a step evaluates a layer, the forward pass counted."""
    work: float = 0
    """Bytes a value of the state while a layer is differentiated, more than checkpointing's. On a CPU, in float32, they
    were 2.24 states with stored increments and 3.04 with rebuilding (bench/results/paper/memory.json, 151 layers)."""
    traffic: float = 0
    """Bytes a value of the state and layer that go to the GPU's memory or come from it, more than checkpointing's."""
    gathers: int = 0
    """Times that sharded parameters are gathered for it alone; a re-evaluation just before the product needs none."""
    to_host: bool = False

    @property
    def time(self) -> float:
        """By products alone, of plain backprop's: a backward pass costs two evaluations."""
        return (self.evaluations + 2) / 3


def plain(network: Network, layers: int, in_flight: int) -> float:
    return (in_flight * layers - 1) * network.inner_bytes


def layer_inputs(bits: float) -> Kept:
    return lambda network, layers, in_flight: in_flight * layers * network.width * bits / 8


def segments(network: Network, layers: int, in_flight: int) -> float:
    """Inputs of segments, and all that autograd saves of one segment, of the length that takes the least memory."""
    return min(
        in_flight * ceil(layers / length) * network.state_bytes + (length - 1) * network.inner_bytes
        for length in range(1, layers + 1)
    )


def nested(network: Network, layers: int, in_flight: int) -> float:
    """Inputs of segments, and the inputs of the layers of one segment: 2 √N states at best."""
    counts = (in_flight * ceil(layers / length) + length for length in range(1, layers + 1))
    return min(counts) * network.state_bytes


def stored(bits: int) -> Method:
    """Packed increments, and the companion where they end, in float32.

    Traffic: store reads x and the companion and writes the companion and the bits, in the backward pass they are read,
    the companion is written, and the point of the product is made in bfloat16.
    """
    kept = layer_inputs(bits + SCALE_BITS)
    return Method(
        f"{bits} bits",
        lambda network, layers, in_flight: kept(network, layers, in_flight) + in_flight * FLOAT32 * network.width,
        evaluations=2,
        work=2.24 * FLOAT32,
        traffic=(2 + 4 + 4) + (4 + 4 + 2) + 2 * (bits + SCALE_BITS) / 8,
    )


PLAIN = Method("plain", plain, evaluations=1)
CHECKPOINT = Method("checkpoint", layer_inputs(16), evaluations=2)
SEGMENTS = Method("segments", segments, evaluations=2, gathers=1)
NESTED = Method("nested √N", nested, evaluations=3, gathers=1)
OFFLOAD = Method(
    # Two layers' inputs on the GPU: one that comes or goes, and one in use.
    "offload",
    lambda network, layers, in_flight: 2 * network.state_bytes,
    evaluations=2,
    to_host=True,
)
# Reads a state and writes 8.25 bits a value of it; later the other way round.
FP8 = Method("FP8", layer_inputs(8 + SCALE_BITS), evaluations=2, traffic=2 * (2 + (8 + SCALE_BITS) / 8))
STORED = {bits: stored(bits) for bits in (8, 4, 2)}
REBUILD = Method(
    # "corrected": x_N in float32; the reverse step reads x and f and writes y, the update reads x, y, f and writes x,
    # and the forward pass has states of four bytes where two would do.
    "rebuilt",
    lambda network, layers, in_flight: in_flight * FLOAT32 * network.width,
    evaluations=3,
    work=3.04 * FLOAT32,
    traffic=(4 + 2 + 4) + (4 + 4 + 2 + 4) + 4,
)
METHODS = (PLAIN, CHECKPOINT, SEGMENTS, NESTED, OFFLOAD, FP8, *STORED.values(), REBUILD)


def depth_where_segments_win(network: Network, bits: int) -> float:
    """N at which 2 √(N r) states of segments are as many bytes as N (b + 1/4) / 16 states of stored increments."""
    return 4 * network.ratio * (16 / (bits + SCALE_BITS)) ** 2
