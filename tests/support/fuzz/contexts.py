"""What a forward pass may stand in. Each is a function of the model, its input and its arguments, and runs it."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


def _plain(model, x, args, kwargs):
    return model(x, *args, **kwargs)


def _checkpoint(model, x, args, kwargs):
    return checkpoint(model, x, *args, use_reentrant=False, **kwargs)


def _save_on_cpu(model, x, args, kwargs):
    with torch.autograd.graph.save_on_cpu():
        return model(x, *args, **kwargs)


def _saved_tensor_hooks(model, x, args, kwargs):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return model(x, *args, **kwargs)


def _autocast(model, x, args, kwargs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x, *args, **kwargs)


def _cached_parametrizations(model, x, args, kwargs):
    with parametrize.cached():
        return model(x, *args, **kwargs)


def _functional_call(model, x, args, kwargs):
    made = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, made, (x, *args), kwargs)


def _functional_call_with_buffers(model, x, args, kwargs):
    made = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
    made |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, made, (x, *args), kwargs)


def _anomaly(model, x, args, kwargs):
    with torch.autograd.set_detect_anomaly(True):
        return model(x, *args, **kwargs)


def _within_a_graph(model, x, args, kwargs):
    """The state comes out of a graph, and goes on into one."""
    return model(torch.sin(2 * x), *args, **kwargs) * 0.5 + x


def _chained(model, x, args, kwargs):
    return model(model(x, *args, **kwargs), *args, **kwargs)


def _written_afterwards(model, x, args, kwargs):
    """The output is written in place by an operation that autograd records."""
    return model(x, *args, **kwargs).mul_(2)


def _view_of_the_input(model, x, args, kwargs):
    return model(x.transpose(0, -1).contiguous().transpose(0, -1), *args, **kwargs)


def _mutation_allowed(model, x, args, kwargs):
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        out = model(x, *args, **kwargs)
        return out.clone()


CONTEXTS = {
    "plain": _plain,
    "checkpoint": _checkpoint,
    "save_on_cpu": _save_on_cpu,
    "saved_tensor_hooks": _saved_tensor_hooks,
    "autocast": _autocast,
    "cached_parametrizations": _cached_parametrizations,
    "functional_call": _functional_call,
    "functional_call_with_buffers": _functional_call_with_buffers,
    "anomaly": _anomaly,
    "within_a_graph": _within_a_graph,
    "chained": _chained,
    "written_afterwards": _written_afterwards,
    "strided_input": _view_of_the_input,
}
