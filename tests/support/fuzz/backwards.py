"""Ways to ask for gradients. Each runs the forward passes that it needs, lets the event happen in between, and returns
gradients by name.

A session has `forward(n)`, the output for input n; `event()`; `loss(out)`; and `leaves`, what is to get gradients.
"""

from __future__ import annotations

import threading

import torch


def _grad(loss, leaves, **options):
    if not loss.requires_grad or not leaves:
        return {}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, **options)
    return dict(zip(leaves, found, strict=True))


def _collected(leaves):
    return {name: leaf.grad for name, leaf in leaves.items()}


def _backward(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0))
    session.event()
    if loss.requires_grad:
        loss.backward()
    return _collected(leaves)


def _all(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0))
    session.event()
    return _grad(loss, leaves)


def _some(session):
    leaves = dict(list(session.leaves.items())[::3])
    loss = session.loss(session.forward(0))
    session.event()
    return _grad(loss, leaves)


def _inputs(session):
    leaves = dict(list(session.leaves.items())[1::2])
    loss = session.loss(session.forward(0))
    session.event()
    if leaves and loss.requires_grad:
        loss.backward(inputs=list(leaves.values()))
    return _collected(leaves)


def _twice(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0))
    first = _grad(loss, leaves, retain_graph=True)
    session.event()
    second = _grad(loss, leaves)
    return {f"first {k}": v for k, v in first.items()} | {f"second {k}": v for k, v in second.items()}


def _in_order(session):
    leaves = session.leaves
    losses = [session.loss(session.forward(n)) for n in (0, 1)]
    session.event()
    return _each(losses, leaves)


def _in_reverse_order(session):
    leaves = session.leaves
    losses = [session.loss(session.forward(n)) for n in (0, 1)]
    session.event()
    return _each(losses[::-1], leaves)


def _each(losses, leaves):
    found = [_grad(loss, leaves) for loss in losses]
    return {f"{n} {k}": v for n, gradients in enumerate(found) for k, v in gradients.items()}


def _accumulated(session):
    leaves = session.leaves
    for n in (0, 1):
        loss = session.loss(session.forward(n))
        if n == 0:
            session.event()
        if loss.requires_grad:
            loss.backward()
    return _collected(leaves)


def _two_steps(session):
    """A step of an optimizer lies between two training steps."""
    leaves, found = session.leaves, {}
    for n in (0, 1):
        loss = session.loss(session.forward(n))
        if n == 0:
            session.event()
        found |= {f"{n} {k}": v for k, v in _grad(loss, leaves).items()}
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.add_(0.01)
    return found


def _joined(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0)) + 2 * session.loss(session.forward(1))
    session.event()
    return _grad(loss, leaves)


def _hooked(session):
    """Hooks on every leaf double its gradient, and see it once."""
    leaves = session.leaves
    for name, leaf in leaves.items():
        leaf.register_hook(lambda g, name=name: session.log.append(name) or 2 * g)
        leaf.register_post_accumulate_grad_hook(lambda p, name=name: session.log.append(f"accumulated {name}"))
    loss = session.loss(session.forward(0))
    session.event()
    if loss.requires_grad:
        loss.backward()
    session.log.sort()
    return _collected(leaves)


def _updated_in_backward(session):
    """Every weight is updated as soon as its gradient is there, which is then dropped."""
    found = {}

    def update(parameter, name):
        found[name] = parameter.grad.to_dense().clone()
        parameter.grad = None
        with torch.no_grad():
            parameter.add_(0.5)

    for name, leaf in session.model.named_parameters():
        if not leaf.requires_grad:
            continue
        leaf.register_post_accumulate_grad_hook(lambda parameter, name=name: update(parameter, name))
    loss = session.loss(session.forward(0))
    session.event()
    if loss.requires_grad:
        loss.backward()
    return found


def _batched(session):
    leaves = session.leaves
    out = session.forward(0)
    session.event()
    if not out.requires_grad or not leaves:
        return {}
    cotangents = torch.stack([out.detach().cos(), out.detach().sin(), torch.ones_like(out)])
    found = torch.autograd.grad(out, list(leaves.values()), cotangents, is_grads_batched=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _in_a_thread(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0))
    session.event()
    errors = []

    def run():
        try:
            if loss.requires_grad:
                loss.backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return _collected(leaves)


def _of_a_part(session):
    leaves = session.leaves
    out = session.forward(0)
    session.event()
    return _grad(out[:1].double().sum(), leaves)


def _hooked_output(session):
    leaves = session.leaves
    out = session.forward(0)
    session.event()
    if out.requires_grad:
        out.register_hook(lambda g: 2 * g)
    return _grad(session.loss(out), leaves)


def _used_twice(session):
    """The output is used at two places, and a part of the gradient comes first."""
    leaves = session.leaves
    out = session.forward(0)
    first = _grad(session.loss(out), dict(list(leaves.items())[:1]), retain_graph=True)
    session.event()
    second = _grad(session.loss(out.sin()) + session.loss(out), leaves)
    return {f"first {k}": v for k, v in first.items()} | second


def _second_derivatives(session):
    leaves = session.leaves
    loss = session.loss(session.forward(0))
    session.event()
    first = _grad(loss, leaves, create_graph=True)
    total = sum(g.double().square().sum() for g in first.values() if g is not None)
    return _grad(total, leaves) if isinstance(total, torch.Tensor) else {}


def _under_autocast(session):
    """Forward and backward pass in one region of autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=session.recipe.context == "autocast"):
        return _backward(session)


WAYS = {
    "backward": _backward,
    "grad": _all,
    "some": _some,
    "inputs": _inputs,
    "twice": _twice,
    "in_order": _in_order,
    "in_reverse_order": _in_reverse_order,
    "accumulated": _accumulated,
    "two_steps": _two_steps,
    "joined": _joined,
    "hooked": _hooked,
    "updated_in_backward": _updated_in_backward,
    "batched": _batched,
    "thread": _in_a_thread,
    "part": _of_a_part,
    "hooked_output": _hooked_output,
    "used_twice": _used_twice,
    "second_derivatives": _second_derivatives,
    "in_one_region": _under_autocast,
}
