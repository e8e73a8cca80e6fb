"""What is known of the layers of other libraries: which keep the shape of their state, so that they can be steps.

A layer of another class can be named by its container, `convert(model, stages=[...])`; it is looked at when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..stack import ResidualStack

AFTER_ADDITION = "a ReLU after the addition maps many states onto one: stored bits or checkpointing, never rebuilding"
NORM_AFTER = "a norm after the addition: its increments are as large as the state, stored bits or checkpointing"


class Facts(NamedTuple):
    """Of a class of layers."""

    keeps_shape: Callable[[nn.Module], bool] = lambda layer: True
    note: str = ""
    """Why such layers can't be rebuilt."""


def _has_no_downsampling(layer: nn.Module) -> bool:
    return getattr(layer, "downsample", None) is None and getattr(layer, "stride", 1) in (1, (1, 1))


def _has_identity_shortcut(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "shortcut", None), (nn.Identity, type(None)))


PLAIN, POST_NORM = Facts(), Facts(note=NORM_AFTER)
RESNET = Facts(_has_no_downsampling, AFTER_ADDITION)

FAMILIES: dict[str, dict[str, Facts]] = {
    "transformers": {
        **dict.fromkeys(
            (
                "GPT2Block",
                "GPTNeoXLayer",
                "LlamaDecoderLayer",
                "MistralDecoderLayer",
                "Qwen2DecoderLayer",
                "Qwen3DecoderLayer",
                "GemmaDecoderLayer",
                "Gemma2DecoderLayer",
                "PhiDecoderLayer",
                "Phi3DecoderLayer",
                "OPTDecoderLayer",
                "BloomBlock",
                "ViTLayer",
                "DeiTLayer",
                "Dinov2Layer",
                "SiglipEncoderLayer",
                "CLIPEncoderLayer",
                "ModernBertEncoderLayer",
                "MambaBlock",
                "Mamba2Block",
            ),
            PLAIN,
        ),
        **dict.fromkeys(("BertLayer", "RobertaLayer", "DistilBertTransformerBlock", "TransformerBlock"), POST_NORM),
    },
    "timm": {
        **dict.fromkeys(
            (
                "Block",
                "ResPostBlock",
                "ParallelScalingBlock",
                "MixerBlock",
                "ResBlock",
                "SpatialGatingBlock",
                "SwinTransformerBlock",
                "EvaBlock",
            ),
            PLAIN,
        ),
        "ConvNeXtBlock": Facts(_has_identity_shortcut),
        "BasicBlock": RESNET,
        "Bottleneck": RESNET,
    },
    "torchvision": {
        **dict.fromkeys(("CNBlock", "EncoderBlock", "SwinTransformerBlock", "SwinTransformerBlockV2"), PLAIN),
        "BasicBlock": RESNET,
        "Bottleneck": RESNET,
    },
}


def facts_of(layer: nn.Module) -> Facts | None:
    """What is known of a layer's class; None of one that is not in the table."""
    package = type(layer).__module__.partition(".")[0]
    return FAMILIES.get(package, {}).get(type(layer).__name__)


def is_container(module: nn.Module) -> bool:
    """Whether the children are what the module is made of, one after the other."""
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(module, ResidualStack)
