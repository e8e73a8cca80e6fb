"""How all stacks of a model train, kept in a checkpoint and loaded into the same model built anew."""

import copy
import json

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, convert, load_training_state, training_state
from tests.support.networks import mlps
from tests.support.small_transformers import batch_for, small


def converted():
    return convert(small("gpt2"))


def with_two_stacks():
    return nn.Sequential(ResidualStack(mlps("euler", 3)), nn.Tanh(), ResidualStack(mlps("heun", 4), "heun"))


def stage_of(model):
    (stage,) = {layer._stage for layer in model.transformer.h}
    return stage


def test_a_converted_model_goes_on_as_it_trained():
    model, other = converted(), converted()
    stage_of(model).stack.gradient = "checkpoint"
    model.activation_checkpointing_disable()
    model(**batch_for("gpt2")).loss.backward()
    state = json.loads(json.dumps(training_state(model)))
    load_training_state(other, state)
    assert stage_of(other).stack.gradient == "checkpoint"
    assert not stage_of(other).enabled
    assert training_state(other) == training_state(model)


def test_stacks_are_told_apart_by_name():
    model, other = with_two_stacks(), with_two_stacks()
    model[2].reverse = "extrapolated"
    model(torch.randn(2, 6)).sum().backward()
    load_training_state(other, training_state(model))
    assert other[2].reverse == model[2].reverse
    assert other[0].reverse == model[0].reverse != other[2].reverse
    assert [*training_state(model)] == ["0", "2"]


def test_the_state_of_another_model_changes_nothing():
    model = with_two_stacks()
    before = training_state(model)
    wrong = copy.deepcopy(before)
    wrong["0"]["gradient"], wrong["2"]["steps"] = "checkpoint", 7
    with pytest.raises(ValueError, match="steps must be 4, got 7"):
        load_training_state(model, wrong)
    assert training_state(model) == before
    with pytest.raises(ValueError, match=r"must have the keys \['0', '2'\]"):
        load_training_state(model, {"0": before["0"]})


def test_a_model_without_stacks_is_refused():
    with pytest.raises(ValueError, match="must hold a ResidualStack or a ResidualMLP, or be converted, got a Linear"):
        training_state(nn.Linear(2, 2))
