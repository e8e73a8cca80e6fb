"""What may happen to a program between a network's forward and backward pass. Each is a function of the session."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

from resode_cuda import ResidualStack


def _nothing(session):
    pass


def _mode_toggled(session):
    session.model.train(not session.model.training)


def _one_mode_toggled(session):
    for n, module in enumerate(session.model.modules()):
        if n % 2:
            module.train(not module.training)


def _random_numbers_drawn(session):
    torch.rand(5)
    random.random()
    np.random.rand(2)


def _reseeded(session):
    torch.manual_seed(99)


def _autocast_entered(session):
    session.stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))


def _anomalies_detected(session):
    session.stack.enter_context(torch.autograd.set_detect_anomaly(True))


def _gradients_off(session):
    session.stack.enter_context(torch.no_grad())


def _default_dtype_changed(session):
    torch.set_default_dtype(torch.float32 if torch.get_default_dtype() == torch.float64 else torch.float64)


@torch.no_grad()
def _parameters_changed(session):
    for parameter in session.model.parameters():
        parameter.add_(0.5)


@torch.no_grad()
def _one_parameter_changed(session):
    for parameter in list(session.model.parameters())[-1:]:
        parameter.mul_(1.5)


def _optimizer_step(session):
    parameters = [p for p in session.model.parameters() if p.requires_grad]
    if parameters:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(parameters, 0.1).step()
        for parameter in parameters:
            parameter.grad = None


def _parameter_data_replaced(session):
    """The same values in other memory, which is harmless."""
    for parameter in session.model.parameters():
        parameter.data = parameter.data.clone()


def _parameter_objects_replaced(session):
    for module in session.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(2 * parameter.detach(), parameter.requires_grad)


def _state_loaded(session):
    session.model.load_state_dict(copy.deepcopy(session.model.state_dict()))


@torch.no_grad()
def _float_buffers_changed(session):
    for buffer in session.model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.5)


@torch.no_grad()
def _discrete_buffers_changed(session):
    """Integers rise by 2, truth values flip; permutations stay permutations."""
    for buffer in session.model.buffers():
        if buffer.dtype == torch.bool:
            buffer.logical_not_()
        elif not buffer.is_floating_point():
            buffer.copy_(buffer.flip(0) if buffer.ndim else buffer + 2)


def _buffers_replaced(session):
    for module in session.model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer + 0.5


def _gradient_flags_off(session):
    for parameter in session.model.parameters():
        parameter.requires_grad_(False)


def _gradient_flags_toggled(session):
    for n, parameter in enumerate(session.model.parameters()):
        if n % 2:
            parameter.requires_grad_(not parameter.requires_grad)


def _attributes_changed(session):
    for module in session.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        if hasattr(module, "offsets"):
            module.scale = 0.2
            module.offsets.append(0.5)


def _argument_changed(session):
    with torch.no_grad():
        for leaf in session.argument_tensors():
            if leaf.is_floating_point() and not any(leaf is x for x in session.inputs):
                leaf.add_(0.5)


def _list_argument_changed(session):
    for given in (*session.given.args, *session.given.kwargs.values()):
        for held in (given, given.get("list") if isinstance(given, dict) else None):
            if isinstance(held, list):
                held.append(0.5)
        if isinstance(given, dict):
            given["late"] = 0.5


def _argument_object_changed(session):
    for given in session.given.args:
        if hasattr(given, "__dict__") and not isinstance(given, torch.Tensor):
            given.tensor = given.tensor * 2


def _input_changed(session):
    with torch.no_grad():
        session.inputs[0].add_(0.5)


def _output_changed(session):
    with torch.no_grad():
        for out in session.outputs:
            out.add_(0.5)


def _run_without_gradients(session):
    with torch.no_grad():
        session.model(session.inputs[1], *session.given.args, **session.given.kwargs)


def _run_with_gradients(session):
    session.model(session.inputs[1], *session.given.args, **session.given.kwargs)


def _run_in_eval_mode(session):
    """Evaluation in the middle of a training step."""
    was_training = session.model.training
    session.model.eval()
    with torch.no_grad():
        session.model(session.inputs[1], *session.given.args, **session.given.kwargs)
    session.model.train(was_training)


def _run_in_training_mode(session):
    """Running statistics move, of which torch's norms count no version."""
    was_training = session.model.training
    session.model.train()
    with torch.no_grad():
        session.model(session.inputs[1], *session.given.args, **session.given.kwargs)
    session.model.train(was_training)


def _cast(session):
    session.model.to(torch.float32 if session.recipe.input_dtype == torch.float64 else torch.float64)


def _cast_back(session):
    """There and back; float64 there, so that no value is rounded."""
    session.model.double().to(session.recipe.input_dtype)


def _copied(session):
    session.kept = copy.deepcopy(session.model)


def _pickled(session):
    session.kept = pickle.loads(pickle.dumps(session.model.state_dict()))


def _settings_changed(session):
    if isinstance(session.model, ResidualStack):
        session.model.gradient = "backprop" if session.model.gradient != "backprop" else "adjoint"
        session.model.reverse, session.model.anchors = "paper", None
        session.model.stream_dtype = None


def _reparametrized(session):
    for module in session.model.modules():
        if type(module) is nn.Linear:
            parametrizations.weight_norm(module)
            break


def _hooked_late(session):
    """A hook that only watches, on parameters that had none."""
    for parameter in session.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: None)


def _module_hooked_late(session):
    for module in session.model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, given, out: 2 * out)


def _submodule_replaced(session):
    for module in session.model.modules():
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Tanh):
                module._modules[name] = nn.Sigmoid()


def _blocks_removed(session):
    session.model._modules.pop("0")


def _gradients_cleared(session):
    session.model.zero_grad()


EVENTS = {
    "nothing": _nothing,
    "mode_toggled": _mode_toggled,
    "one_mode_toggled": _one_mode_toggled,
    "random_numbers_drawn": _random_numbers_drawn,
    "reseeded": _reseeded,
    "autocast_entered": _autocast_entered,
    "anomalies_detected": _anomalies_detected,
    "gradients_off": _gradients_off,
    "default_dtype_changed": _default_dtype_changed,
    "parameters_changed": _parameters_changed,
    "one_parameter_changed": _one_parameter_changed,
    "optimizer_step": _optimizer_step,
    "parameter_data_replaced": _parameter_data_replaced,
    "parameter_objects_replaced": _parameter_objects_replaced,
    "state_loaded": _state_loaded,
    "float_buffers_changed": _float_buffers_changed,
    "discrete_buffers_changed": _discrete_buffers_changed,
    "buffers_replaced": _buffers_replaced,
    "gradient_flags_off": _gradient_flags_off,
    "gradient_flags_toggled": _gradient_flags_toggled,
    "attributes_changed": _attributes_changed,
    "argument_changed": _argument_changed,
    "list_argument_changed": _list_argument_changed,
    "argument_object_changed": _argument_object_changed,
    "input_changed": _input_changed,
    "output_changed": _output_changed,
    "run_without_gradients": _run_without_gradients,
    "run_with_gradients": _run_with_gradients,
    "run_in_eval_mode": _run_in_eval_mode,
    "run_in_training_mode": _run_in_training_mode,
    "cast": _cast,
    "cast_back": _cast_back,
    "copied": _copied,
    "state_pickled": _pickled,
    "settings_changed": _settings_changed,
    "reparametrized": _reparametrized,
    "hooked_late": _hooked_late,
    "module_hooked_late": _module_hooked_late,
    "submodule_replaced": _submodule_replaced,
    "block_removed": _blocks_removed,
    "gradients_cleared": _gradients_cleared,
}
