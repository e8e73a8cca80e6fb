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
    """What is known of a class of layers."""

    keeps_shape: Callable[[nn.Module], bool] = lambda layer: True
    note: str = ""
    """Why such layers can't be rebuilt."""


def _has_identity_shortcut(layer: nn.Module) -> bool:
    shortcuts = (getattr(layer, name, None) for name in ("downsample", "shortcut", "proj"))
    is_identity = all(isinstance(shortcut, (nn.Identity, type(None))) for shortcut in shortcuts)
    return is_identity and getattr(layer, "stride", 1) in (1, (1, 1))


def _adds_its_input(layer: nn.Module) -> bool:
    return bool(getattr(layer, "has_skip", False) or getattr(layer, "use_res_connect", False))


def _has_one_width(layer: nn.Module) -> bool:
    return not getattr(layer, "do_expand", False)


PLAIN, POST_NORM = Facts(), Facts(note=NORM_AFTER)
CONVOLUTIONS = Facts(_has_identity_shortcut)
RESNET = Facts(_has_identity_shortcut, AFTER_ADDITION)
INVERTED = Facts(_adds_its_input)

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
                "DiffParallelScalingBlock",
                "ParallelThingsBlock",
                "RelPosBlock",
                "ResPostRelPosBlock",
                "EvaBlock",
                "EvaBlockPostNorm",
                "LayerScaleBlock",
                "XCABlock",
                "MixerBlock",
                "ResBlock",
                "SpatialGatingBlock",
                "SwinTransformerBlock",
                "SwinTransformerV2Block",
                "SwinTransformerV2CrBlock",
                "MetaFormerBlock",
                "MetaNeXtBlock",
                "FocalNetBlock",
                "GatedConvBlock",
                "TransformerLayer",
            ),
            PLAIN,
        ),
        "HieraBlock": Facts(_has_one_width),
        **dict.fromkeys(("ConvNeXtBlock", "PreActBasic", "PreActBottleneck", "NormFreeBlock"), CONVOLUTIONS),
        **dict.fromkeys(("BasicBlock", "Bottleneck", "Bottle2neck", "SelectiveKernelBasic"), RESNET),
        **dict.fromkeys(("InvertedResidual", "EdgeResidual", "UniversalInvertedResidual"), INVERTED),
    },
    "torchvision": {
        **dict.fromkeys(("CNBlock", "EncoderBlock", "SwinTransformerBlock", "SwinTransformerBlockV2"), PLAIN),
        **dict.fromkeys(("BasicBlock", "Bottleneck", "ResBottleneckBlock"), RESNET),
        **dict.fromkeys(("InvertedResidual", "MBConv", "FusedMBConv"), INVERTED),
    },
}
CONTAINERS = {"timm": ("RegStage",)}
"""Classes of modules that call their children one after the other."""


def facts_of(layer: nn.Module) -> Facts | None:
    """What is known of a layer's class; None of one that is not in the table."""
    return FAMILIES.get(_package(layer), {}).get(type(layer).__name__)


def is_container(module: nn.Module) -> bool:
    """Whether the children are what the module is made of, one after the other."""
    if type(module).__name__ in CONTAINERS.get(_package(module), ()):
        return True
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(module, ResidualStack)


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
