"""The networks of the tables, by their shapes: what a layer multiplies, and what autograd saves of it.

A unit is what layers treat alike: a token, a position of an image, a row. Bytes are of bfloat16 activations, with fused
attention (no score is stored), a fused gated activation, and a norm that saves its input.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """One kind of layer, many times, all on a residual stream of one width."""

    name: str
    unit: str
    layers: int
    width: int
    """Values of the state, a unit."""
    layer_parameters: int
    inner_values: int
    """Values that autograd saves of a layer, a unit; its input is among them."""
    gradient_values: int
    """Values of the gradients that exist at a time while a layer is differentiated, a unit."""
    units: int
    """A replica's microbatch, in the tables that need one."""
    attention_flops: float = 0.0
    """Products without parameters in a layer's forward pass, a unit."""
    head_parameters: int = 0
    """The output layer's; an embedding has as many."""
    vocabulary: int = 0
    exchanges: int = 1
    """Gathers, each with a scatter, that tensor parallelism takes a layer and pass."""
    key_value_width: int = 0
    """Values of keys and values, a token: what context parallelism sends."""

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.head_parameters

    @property
    def state_bytes(self) -> int:
        """A state in bfloat16, a unit."""
        return 2 * self.width

    @property
    def inner_bytes(self) -> int:
        return 2 * self.inner_values

    @property
    def ratio(self) -> float:
        """Bytes that autograd saves of a layer, in states."""
        return self.inner_values / self.width

    @property
    def layer_flops(self) -> float:
        """A layer's forward pass, a unit."""
        return 2 * self.layer_parameters + self.attention_flops

    @property
    def forward_flops(self) -> float:
        """A forward pass of all layers and the output layer, a unit."""
        return self.layers * self.layer_flops + 2 * self.head_parameters


def decoder(name: str, shape: tuple[int, int, int, int, int], context: int) -> Network:
    """As Llama: causal attention and a gated MLP.

    A layer saves its two norms' inputs and outputs, queries, keys, values, attention's output, and three tensors of the
    MLP: the gate, what it gates, and their product.

    Args:
        shape: layers, width, hidden width, width of the keys, entries of the vocabulary.
        context: tokens of a sequence, which is a microbatch.
    """
    layers, width, hidden, keys, vocabulary = shape
    return Network(
        name,
        "token",
        layers,
        width,
        layer_parameters=2 * width * (width + keys) + 3 * width * hidden,
        inner_values=6 * width + 2 * keys + 3 * hidden,
        gradient_values=2 * width + 2 * hidden,
        units=context,
        attention_flops=2 * width * context,
        head_parameters=vocabulary * width,
        vocabulary=vocabulary,
        exchanges=2,
        key_value_width=2 * keys,
    )


def perceptrons(name: str, shape: tuple[int, int, int], units: int, norm: bool) -> Network:
    """x + W2 σ(W1 norm(x)): the input, the norm's output, and the hidden units before and after σ are saved."""
    layers, width, hidden = shape
    saved = (1 + norm) * width + 2 * hidden
    return Network(name, "row", layers, width, 2 * width * hidden, saved, 2 * width + hidden, units)


RESNET_1000 = Network(
    # Norm, ReLU, 3x3 convolution, twice: inputs of both norms and of both convolutions are saved. 32 images of 56x56.
    "ResNet-1000 stage",
    "position",
    layers=1000,
    width=256,
    layer_parameters=2 * 9 * 256**2,
    inner_values=4 * 256,
    gradient_values=3 * 256,
    units=32 * 56**2,
)
CONVNEXT = Network(
    # Stage 3 of ConvNeXt-L: 7x7 depthwise, norm, 768 to 3072, GELU, 3072 to 768, scale, whose inputs are saved.
    # 8 images of 2048x2048, at 1/16 of their resolution.
    "ConvNeXt stage",
    "position",
    layers=27,
    width=768,
    layer_parameters=49 * 768 + 2 * 768 * 3072,
    inner_values=4 * 768 + 2 * 3072,
    gradient_values=2 * 768 + 3072,
    units=8 * 128**2,
)
MLP_1000 = perceptrons("MLP-1000", (1000, 4096, 4096), units=8192, norm=True)
NARROW = perceptrons("narrow MLP", (256, 64, 128), units=2**18, norm=False)
SHAPE_7B, SHAPE_8B = (32, 4096, 11008, 4096, 32000), (32, 4096, 14336, 1024, 128256)
DECODER_7B = decoder("7B, 8k", SHAPE_7B, 2**13)
DECODER_7B_LONG = decoder("7B, 128k", SHAPE_7B, 2**17)
DECODER_405B = decoder("405B, 128k", (126, 16384, 53248, 1024, 128256), 2**17)
NETWORKS = (RESNET_1000, MLP_1000, DECODER_7B, DECODER_7B_LONG, DECODER_405B, CONVNEXT, NARROW)


@dataclass(frozen=True)
class Offloaded:
    """A network whose layers' inputs go to the host, with a rate that has been named for it."""

    name: str
    state_bytes: float
    """All layers' inputs in bfloat16, a sample."""
    flops: float
    """A sample's forward pass."""
    rates: tuple[float, ...] = ()
    """Bytes a second."""


def offloaded(network: Network, *rates: float) -> Offloaded:
    return Offloaded(network.name, network.layers * network.state_bytes, network.forward_flops, rates)


RESNET_50_STATES = 2 * sum(blocks * channels * side**2 for blocks, channels, side in
                           ((3, 256, 56), (4, 512, 28), (6, 1024, 14), (3, 2048, 7)))  # fmt: skip
OFFLOADED = (
    offloaded(decoder("8B, 8k", SHAPE_8B, 2**13), 3.8e9),
    Offloaded("ViT-B/16, an image", 12 * 197 * 768 * 2, 2 * 17.6e9, (16e9,)),
    Offloaded("ResNet-50, an image", RESNET_50_STATES, 2 * 4.1e9, (46e9, 184e9)),
    offloaded(NARROW, 586e9),
    *(offloaded(network) for network in NETWORKS if network is not NARROW),
)
