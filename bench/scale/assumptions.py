"""What the tables assume, in one place; `python -m bench.scale` has an option for each field."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Assumptions:
    """An H100 of 80 GB in a node of eight, and a training step by Adam in bfloat16."""

    memory_bytes: float = 80e9
    """What may be filled. The card has some 85e9; the rest is left to CUDA, NCCL and fragmentation."""
    peak_flops: float = 989e12
    """Dense matrix products in bfloat16, a second."""
    utilisation: float = 0.4
    """Share of the peak that all products reach together, re-evaluations among them."""
    hbm_rate: float = 3.0e12
    """Bytes a second between the GPU and its memory, read and written ones together."""
    nvlink_rate: float = 450e9
    """Bytes a second and direction, of a GPU to the others of its node."""
    network_rate: float = 50e9
    """Bytes a second and direction of each GPU's network card of 400 Gb/s."""
    pcie_rate: float = 50e9
    """Bytes a second and direction between a GPU and its host, PCIe 5 of 16 lanes."""
    node_gpus: int = 8
    weight_bytes: float = 2.0
    """A parameter, in bfloat16; what is gathered has as many."""
    gradient_bytes: float = 2.0
    """A parameter's gradient, in bfloat16; what is reduced has as many."""
    optimizer_bytes: float = 12.0
    """A parameter's float32 copy and Adam's two moments."""
    logit_bytes: float = 6.0
    """An entry of the vocabulary: the logit in bfloat16 and, as probability and then as gradient, in float32."""
    loss_chunk: float = 4096
    """Tokens whose logits exist at a time."""
    microbatches: int = 4
    """Microbatches of a step for each stage of a pipeline."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be a number above 0, got {value:g}")
        if self.utilisation > 1:
            raise ValueError(f"utilisation must be a share of the peak, at most 1, got {self.utilisation:g}")

    @property
    def flops(self) -> float:
        return self.peak_flops * self.utilisation
