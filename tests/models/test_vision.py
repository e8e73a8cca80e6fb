"""Models of timm, converted."""

from functools import partial

import pytest
import torch

from bench.harness.foreign import define_torchvision_operators
from resode_cuda import conversion, convert
from tests.support.networks import relative_error
from tests.support.vision import CLASSES, DTYPES, Case, check_gradients, check_outputs, check_stages, passes, step

define_torchvision_operators()
models = pytest.importorskip("timm.models", reason="needs timm")

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # autocast's own

LAYERS = 5
TOKENS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_classes": CLASSES}
transformer = partial(models.vision_transformer.VisionTransformer, **TOKENS, depth=LAYERS, num_heads=4)
mixer = partial(models.mlp_mixer.MlpMixer, **TOKENS, num_blocks=LAYERS)
convnext = partial(
    models.convnext.ConvNeXt, num_classes=CLASSES, depths=(1, LAYERS, 1, 1), dims=(8, 16, 16, 16), ls_init_value=0.5
)
WINDOWS = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": (2, 6),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": CLASSES,
}
resnet = partial(models.resnet.ResNet, num_classes=CLASSES, layers=(1, 1 + LAYERS, 1, 1), channels=(8, 8, 8, 8))
cait = partial(models.cait.Cait, **TOKENS, depth=LAYERS, num_heads=4, init_values=0.1)


def regnet():
    sizes = models.regnet.RegNetCfg(depth=12, w0=8, wa=8.0, wm=2.5, group_size=8)
    return models.regnet.RegNet(sizes, num_classes=CLASSES)


BLOCKS = {"blocks.0 to 4": LAYERS}

CASES = {
    "vit": Case(transformer, 16, BLOCKS, 0.003),
    "vit, stochastic depth, layer scale": Case(
        partial(transformer, drop_path_rate=0.3, init_values=0.1, proj_drop_rate=0.1), 16, BLOCKS, 0.003
    ),
    "vit, parallel, differential": Case(
        partial(transformer, block_fn=models.vision_transformer.DiffParallelScalingBlock), 16, BLOCKS, 0.003
    ),
    "cait": Case(cait, 16, BLOCKS, 0.0001),
    "convnext": Case(partial(convnext, drop_path_rate=0.2), 32, {"stages.1.blocks.0 to 4": LAYERS}, 0.0001),
    "convnext v2": Case(partial(convnext, use_grn=True, conv_mlp=True), 32, {"stages.1.blocks.0 to 4": LAYERS}, 0.0001),
    "resmlp": Case(
        partial(mixer, block_layer=models.mlp_mixer.ResBlock, mlp_ratio=4, norm_layer=models.mlp_mixer.Affine),
        16,
        BLOCKS,
        0.001,
    ),
    "mixer": Case(partial(mixer, drop_path_rate=0.2), 16, BLOCKS, 0.003),
    "swin": Case(
        partial(models.swin_transformer.SwinTransformer, **WINDOWS, drop_path_rate=0.2),
        32,
        {"layers.1.blocks.0 to 5": 6},
        0.001,
    ),
    "swin v2": Case(
        partial(models.swin_transformer_v2.SwinTransformerV2, **WINDOWS), 32, {"layers.1.blocks.0 to 5": 6}, 0.002
    ),
    "resnet, basic": Case(
        partial(resnet, models.resnet.BasicBlock),
        32,
        {"layer2.1 to 5": LAYERS},
        0.05,
        left=("layer1.0", "layer2.0", "layer3.0", "layer4.0"),
    ),
    "resnet, bottleneck": Case(
        partial(resnet, models.resnet.Bottleneck, drop_path_rate=0.2),
        32,
        {"layer2.1 to 5": LAYERS},
        0.05,
        left=("layer1.0", "layer2.0", "layer3.0", "layer4.0"),
    ),
    "regnet": Case(regnet, 32, {"s3.b2 to b6": LAYERS}, 3e-2, ("s1.b1", "s2.b1", "s3.b1", "s4.b1")),
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


def test_stages_of_blocks_are_not_told_of_as_layers():
    """ConvNeXt's list of stages is no stage: its layers are the blocks within."""
    told = conversion(convert(CASES["convnext"].model()))
    assert not any("not known" in place.reason for place in told.left_alone)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["convnext", "resnet, bottleneck"])
def test_layouts_of_images(name, layout):
    converted, plain = (model.to(memory_format=layout) for model in CASES[name].pair())
    x, strides = CASES[name].images().to(memory_format=layout), []
    for model in (converted, plain):
        head = model.head if hasattr(model, "head") else model.layer3
        head.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    outs, grads = zip(*(step(model, x) for model in (converted, plain)), strict=True)
    assert torch.equal(*outs)
    assert strides[0] == strides[1]
    assert [g.stride() for g in grads[0]] == [g.stride() for g in grads[1]]
    assert set(passes(converted)) == {"as a stack"}


@pytest.fixture
def evaluations(monkeypatch):
    """Counts how often blocks of a class are evaluated in a training step."""

    def counted(model, x, kind):
        count = 0

        def forward(self, *args):
            nonlocal count
            count += 1
            return own(self, *args)

        own = kind.forward
        with monkeypatch.context() as context:
            context.setattr(kind, "forward", forward)
            step(model, x)
        return count

    return counted


def test_timms_own_switch_turns_the_stacks_on_and_off(evaluations):
    case, block = CASES["vit"], models.vision_transformer.Block
    converted, plain = case.pair()
    x = case.images()
    step(converted, x)  # the first pass of all looks at the first layer
    assert evaluations(plain, x, block) == LAYERS
    assert evaluations(converted, x, block) == 2 * LAYERS
    converted.set_grad_checkpointing(False)
    assert evaluations(converted, x, block) == LAYERS
    assert passes(converted) == ["layer by layer: switched off"]
    for switched_on in ((), (True,)):
        converted.set_grad_checkpointing(*switched_on)
        assert not converted.grad_checkpointing
        assert evaluations(converted, x, block) == 2 * LAYERS
        assert passes(converted) == ["as a stack"]
    assert torch.equal(step(converted, x)[0], step(plain, x)[0])


def test_timms_own_switch_by_stage(evaluations):
    """The stages that are not converted keep timm's checkpointing."""
    case, block = CASES["convnext"], models.convnext.ConvNeXtBlock
    converted, _ = case.pair()
    x = case.images()
    step(converted, x)
    assert evaluations(converted, x, block) == 2 * LAYERS + 3
    converted.set_grad_checkpointing()
    assert [stage.grad_checkpointing for stage in converted.stages] == [True, False, True, True]
    assert evaluations(converted, x, block) == 2 * LAYERS + 2 * 3
    converted.set_grad_checkpointing(False)
    assert evaluations(converted, x, block) == LAYERS + 3


def test_a_model_that_checkpoints_already(evaluations):
    case, block = CASES["vit"], models.vision_transformer.Block
    model, x = case.model(), case.images()
    model.set_grad_checkpointing()
    assert evaluations(model, x, block) == 2 * LAYERS
    step(convert(model), x)
    assert evaluations(model, x, block) == 2 * LAYERS


def total(intermediates):
    last, states = intermediates
    return last.square().mean() + sum(state.square().mean() for state in states)


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        ({}, "as a stack"),
        ({"indices": [1, 3]}, "as a stack"),
        ({"indices": 1}, "as a stack"),
        ({"indices": [-2]}, "as a stack"),
        ({"norm": True}, "as a stack"),
        ({"indices": [1, 3], "stop_early": True}, "4 of 5 layers as a stack"),
    ],
    ids=str,
)
def test_intermediates(options, ran):
    (converted, plain), x = CASES["vit"].pair(torch.float64), CASES["vit"].images(torch.float64)
    outs, grads = [], []
    for model in (converted, plain):
        model.forward = lambda x, model=model: model.forward_intermediates(x, **options)
        out, found = step(model, x, total)
        outs.append([out[0], *out[1]])
        grads.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))
    assert all(isinstance(one, torch.Tensor) for one in outs[0])
    assert passes(converted) == [ran]
    assert relative_error(*grads) < 1e-3


def test_features_and_slices():
    (converted, plain), x = CASES["vit"].pair(), CASES["vit"].images()
    assert torch.equal(converted.forward_features(x), plain.forward_features(x))
    assert passes(converted) == ["as a stack"]
    tokens = torch.randn(2, 17, 32, requires_grad=True)
    for part in (slice(2, 4), slice(0, 3), slice(3, None), slice(None)):
        one, other = converted.blocks[part](tokens), plain.blocks[part](tokens)
        assert torch.equal(one, other)
        gradients = (torch.autograd.grad(out.square().sum(), tokens) for out in (one, other))
        assert relative_error(*gradients) < 1e-2


def test_layers_that_are_pruned():
    """timm takes the layers after the last wanted one away: the others go on, one by one."""
    (converted, plain), x = CASES["vit"].pair(), CASES["vit"].images()
    for model in (converted, plain):
        model.prune_intermediate_layers([1, 2], prune_norm=False, prune_head=False)
    assert len(converted.blocks) == 3
    assert torch.equal(step(converted, x)[0], step(plain, x)[0])
