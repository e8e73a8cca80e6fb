"""Cuts of a network and its batch over GPUs, and what each leaves on one GPU: parameters, activations, links, time."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .assumptions import Assumptions
from .methods import Method
from .networks import Network


@dataclass(frozen=True)
class Plan:
    """Neighbouring GPUs share a layer (tensor), then a sequence (context), then have other samples (data), then other
    layers (pipeline, 1F1B). Tensor parallelism is with sequence parallelism: all activations are split."""

    name: str
    data: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    shards: str = "none"
    """What GPUs with the same part of the network share: "none" (DDP), "optimizer" (ZeRO-1) or "all" (FSDP2)."""

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.context * self.pipeline

    @property
    def replicas(self) -> int:
        """GPUs with the same part of the network."""
        return self.data * self.context

    @property
    def split(self) -> int:
        """GPUs that share a unit's activations or a sequence's units."""
        return self.tensor * self.context

    def layers(self, network: Network) -> int:
        """How many the largest stage has."""
        return ceil(network.layers / self.pipeline)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.gpus:,}"

    def serves(self, network: Network) -> bool:
        """Whether there is a context to share."""
        return self.context == 1 or network.key_value_width > 0


def plans(gpus: int) -> list[Plan]:
    found = [
        Plan("DDP", gpus),
        Plan("FSDP2", gpus, shards="all"),
        Plan("tensor 8 × FSDP2", gpus // 8, tensor=8, shards="all"),
        Plan("pipeline 8 × ZeRO-1", gpus // 8, pipeline=8, shards="optimizer"),
    ]
    if gpus >= 1024:
        rest = gpus // 1024
        found.append(Plan("tensor 8 × context 16 × pipeline 8", rest, 8, 16, 8, "optimizer"))
    return found


def own_parameters(plan: Plan, network: Network) -> float:
    """How many a GPU's part has; the largest stage of a pipeline has the embedding or the output layer."""
    ends = network.head_parameters * (2 if plan.pipeline == 1 else 1)
    return (plan.layers(network) * network.layer_parameters + ends) / plan.tensor


def parameter_bytes(plan: Plan, network: Network, given: Assumptions) -> tuple[float, float, float]:
    """Weights, gradients and the optimizer's state on a GPU."""
    own = own_parameters(plan, network)
    held = own / plan.replicas if plan.shards == "all" else own
    updated = own if plan.shards == "none" else own / plan.replicas
    return held * given.weight_bytes, held * given.gradient_bytes, updated * given.optimizer_bytes


def fixed_bytes(plan: Plan, network: Network, given: Assumptions) -> float:
    """What no batch changes: parameters, what FSDP2 gathers (this layer and the next, a layer's gradients), logits."""
    gathered = 0.0
    if plan.shards == "all" and plan.replicas > 1:
        layer = network.layer_parameters * (2 * given.weight_bytes + given.gradient_bytes)
        head = network.head_parameters * (given.weight_bytes + given.gradient_bytes)
        gathered = max(layer, head) / plan.tensor
    logits = given.loss_chunk * network.vocabulary * given.logit_bytes / plan.tensor
    return sum(parameter_bytes(plan, network, given)) + gathered + logits


def kept_bytes(plan: Plan, network: Network, method: Method) -> float:
    """A unit on a GPU: of P microbatches in flight on the first of P stages."""
    return method.kept(network, plan.layers(network), plan.pipeline)


def at_work(plan: Plan, network: Network, method: Method) -> float:
    """A unit on a GPU, of the layer that is differentiated. Tensor parallelism has its input and output whole."""
    whole = 2 * network.state_bytes * (plan.tensor - 1)
    return network.inner_bytes + 2 * network.gradient_values + method.work * network.width + whole


def largest_units(plan: Plan, network: Network, method: Method, given: Assumptions) -> int:
    """Units of a microbatch, on a GPU, that fill its memory; 0 where the parameters do."""
    free = given.memory_bytes - fixed_bytes(plan, network, given)
    return max(0, int(free / (kept_bytes(plan, network, method) + at_work(plan, network, method))))


def rate(size: int, stride: int, given: Assumptions) -> float:
    """Bytes a second and GPU in a group whose neighbours are `stride` GPUs apart.

    Where a group has several GPUs of each node, every one of them brings in a part of what the others get by NVLink.
    """
    of_node = max(1, min(size, given.node_gpus // stride))
    return given.nvlink_rate if of_node == size else min(given.nvlink_rate, of_node * given.network_rate)


@dataclass(frozen=True)
class Links:
    """Seconds a step of each GPU's links, one kind after the other."""

    replicas: float
    """Gathers and reductions of parameters and gradients."""
    layers: float
    """Tensor and context parallelism."""
    stages: float

    @property
    def total(self) -> float:
        return self.replicas + self.layers + self.stages


def microbatches(plan: Plan, given: Assumptions) -> int:
    return given.microbatches * plan.pipeline if plan.pipeline > 1 else 1


def links(plan: Plan, network: Network, method: Method, given: Assumptions) -> Links:
    count, own = microbatches(plan, given), own_parameters(plan, network)
    ring, others = rate(plan.replicas, plan.tensor, given), (plan.replicas - 1) / plan.replicas
    gathered, reduced = own * given.weight_bytes * others / ring, own * given.gradient_bytes * others / ring
    if plan.shards == "all":
        replicas = count * ((2 + method.gathers) * gathered + reduced)
    else:
        # A ring reduces and scatters, then gathers: gradients, or the weights that each GPU has updated its part of.
        replicas = reduced + (gathered if plan.shards == "optimizer" else reduced)
    passes, units = method.evaluations + 1, count * network.units / plan.context
    tensor = 2 * network.exchanges * network.state_bytes * (plan.tensor - 1) / plan.tensor
    tensor *= passes * units / rate(plan.tensor, 1, given)
    # Keys and values of the whole sequence, once an evaluation, and in the backward pass again, and their gradients.
    sent = 2 * network.key_value_width / plan.tensor * count * network.units * (plan.context - 1) / plan.context
    context = sent * (method.evaluations + 2) / rate(plan.context, plan.tensor, given)
    stages = 0.0
    if plan.pipeline > 1:
        stages = 2 * units * network.state_bytes / plan.tensor / given.network_rate
    return Links(replicas, plan.layers(network) * (tensor + context), stages)


def forward_seconds(plan: Plan, network: Network, given: Assumptions) -> float:
    """A unit's forward pass on its share of GPUs: products, or what they read and write where that takes longer."""
    layer = max(network.layer_flops / given.flops, 2 * network.inner_bytes / given.hbm_rate)
    head = 2 * network.head_parameters / plan.pipeline / given.flops
    return (plan.layers(network) * layer + head) / plan.split


def gpu_seconds(plan: Plan, network: Network, method: Method, given: Assumptions) -> float:
    """A step without links: products, what the method moves in memory, and waiting for the host."""
    forward, states = forward_seconds(plan, network, given), plan.layers(network) / plan.split
    moved = states * network.width * method.traffic / given.hbm_rate
    copied = states * network.state_bytes / given.pcie_rate if method.to_host else 0.0
    back = (method.evaluations + 1) * forward
    waited = max(0.0, copied - forward) + max(0.0, copied - back)
    return microbatches(plan, given) * network.units * (forward + back + moved + waited)


def step_seconds(plan: Plan, network: Network, method: Method, given: Assumptions) -> tuple[float, float]:
    """A step if links are used beside computing, and if one waits for the other; both with a pipeline's bubble."""
    used = links(plan, network, method, given).total
    computed = gpu_seconds(plan, network, method, given)
    bubble = 1 + (plan.pipeline - 1) / microbatches(plan, given)
    return max(computed, used) * bubble, (computed + used) * bubble
