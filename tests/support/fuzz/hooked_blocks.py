"""Blocks of random networks with hooks on modules, states and intermediates."""

from __future__ import annotations

from tests.support.fuzz.blocks import FuzzBlock


class Hooked(FuzzBlock):
    """Its hooks, forward and backward, change what passes."""

    def made(self):
        body = super().made()
        body[0].register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))
        body[1].register_forward_hook(lambda module, given, out: out + 0.1)
        body[2].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))
        return body


class GraphHooked(FuzzBlock):
    """A hook on an intermediate doubles its gradient."""

    def increment(self, x):
        hidden = self.body[:2](x)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: 2 * g)
        return self.body[2](hidden)


class BlockHooked(FuzzBlock):
    """Its hooks sit on the block itself."""

    def made(self):
        self.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0], *grad_in[1:]))
        self.register_full_backward_pre_hook(lambda module, grad_out: (0.5 * grad_out[0],))
        return super().made()


class HooksItsInput(FuzzBlock):
    """A hook on the state doubles its whole gradient in the ordinary network."""

    def increment(self, x):
        if x.requires_grad:
            x.register_hook(lambda g: 2 * g)
        return self.body(x)


HOOKED_BLOCKS = {
    "hooked": Hooked,
    "graph_hooked": GraphHooked,
    "block_hooked": BlockHooked,
    "hooks_input": HooksItsInput,
}
