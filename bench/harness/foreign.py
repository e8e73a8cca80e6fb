"""Models of transformers and timm, with random weights, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # defined for as long as this lives


@dataclass(frozen=True)
class Job:
    """A model, and a batch for its training step."""

    name: str
    container: str
    """The name of the layers' container, which is converted."""
    depths: tuple[int, ...]
    make: Callable[[int], nn.Module]
    """From the number of layers."""
    batch: Callable[[], Tensor]
    loss: Callable[[nn.Module, Tensor], Tensor]


def jobs(quick: bool) -> list[Job]:
    """GPT-2 of dim 256 with a text of 512 tokens, a ViT of dim 192, and one stage of a ConvNeXt of width 96."""
    define_torchvision_operators()
    dim, tokens, rows, size = (32, 64, 1, 32) if quick else (256, 512, 8, 64)
    shallow, deep = (4, 6) if quick else (4, 12)

    def gpt(layers: int) -> nn.Module:
        import transformers

        sizes = {
            "vocab_size": 256,
            "n_embd": dim,
            "n_layer": layers,
            "n_head": max(1, dim // 32),
            "n_positions": tokens,
        }
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
        return transformers.GPT2LMHeadModel(config)

    def vit(layers: int) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        width = 32 if quick else 192
        return VisionTransformer(
            img_size=size, patch_size=8, embed_dim=width, depth=layers, num_heads=width // 16, num_classes=10
        )

    def convnext(layers: int) -> nn.Module:
        from timm.models.convnext import ConvNeXt

        width = 16 if quick else 96
        return ConvNeXt(depths=(1, layers, 1, 1), dims=(width,) * 4, num_classes=10, ls_init_value=0.1)

    def images() -> Tensor:
        return torch.randn(rows, 3, size, size)

    return [
        Job("GPT-2", "transformer.h", (shallow, deep), gpt, lambda: torch.randint(256, (1, tokens)), _of_text),
        Job("ViT", "blocks", (shallow, deep), vit, images, _of_images),
        Job("ConvNeXt", "stages.1.blocks", (shallow, deep), convnext, images, _of_images),
    ]


def _of_text(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=x, labels=x).loss
    return loss


def _of_images(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def without_layers(model: nn.Module, container: str) -> nn.Module:
    """The same model, in place, with an empty container."""
    layers = model.get_submodule(container)
    for name in list(layers._modules):
        del layers._modules[name]
    return model


def own_checkpointing(model: Any) -> nn.Module:
    """The model's own checkpointing of each layer, in place: `torch.utils.checkpoint`, not reentrant."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    elif hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed: nn.Module = model
    return checkpointed


def define_torchvision_operators() -> None:
    """timm imports torchvision, which has no operators of its own beside some builds of torch, and needs two."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
