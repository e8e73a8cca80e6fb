"""Models of torchvision, converted."""

from functools import partial

import pytest

from bench.harness.foreign import define_torchvision_operators
from tests.support.vision import CLASSES, DTYPES, Case, check_gradients, check_outputs, check_stages

define_torchvision_operators()
models = pytest.importorskip("torchvision.models", reason="needs torchvision")

LAYERS = 5
resnet = partial(models.resnet.ResNet, layers=[1, 1 + LAYERS, 1, 1], num_classes=CLASSES, width_per_group=64)


def convnext():
    return models.convnext.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, LAYERS)],
        stochastic_depth_prob=0.2,
        layer_scale=0.5,
        num_classes=CLASSES,
    )


def transformer():
    return models.vision_transformer.VisionTransformer(16, 4, LAYERS, 4, 32, 64, num_classes=CLASSES, dropout=0.1)


def swin(**options):
    return models.swin_transformer.SwinTransformer([4, 4], 16, [2, 6], [2, 4], [4, 4], num_classes=CLASSES, **options)


CASES = {
    "resnet, basic": Case(
        partial(resnet, models.resnet.BasicBlock),
        32,
        {"layer2.1 to 5": LAYERS},
        0.15,
        left=("layer2.0", "layer3.0", "layer4.0"),
    ),
    "resnet, bottleneck": Case(
        partial(resnet, models.resnet.Bottleneck, width_per_group=16),
        32,
        {"layer2.1 to 5": LAYERS},
        0.25,
        left=("layer1.0", "layer2.0", "layer3.0", "layer4.0"),
    ),
    "convnext": Case(convnext, 32, {"features.3.0 to 4": LAYERS}, 0.0002),
    "vit": Case(transformer, 16, {"encoder.layers.encoder_layer_0 to encoder_layer_4": LAYERS}, 0.006),
    "swin": Case(partial(swin, stochastic_depth_prob=0.2), 32, {"features.3.0 to 5": 6}, 0.001),
    "swin v2": Case(
        partial(
            swin,
            block=models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=models.swin_transformer.PatchMergingV2,
        ),
        32,
        {"features.3.0 to 5": 6},
        0.01,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_computes_what_it_did(name, dtype):
    check_outputs(CASES[name], dtype)


@pytest.mark.parametrize("name", CASES)
def test_which_stages_are_found(name):
    check_stages(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_gradients_after_training(name):
    check_gradients(CASES[name])
