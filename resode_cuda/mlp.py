"""`ResidualMLP`: residual perceptrons whose whole depth is one op forward and one backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .devices import is_capturing
from .dtypes import DTYPES, dtype_names
from .fused.activations import ACTIVATIONS
from .fused.network import FUSED_SCHEMES, Network
from .fused.norms import NORMS
from .fused.op import apply
from .fused.selection import NAMES
from .method import Anchors
from .module import AdjointModule, checked_steps, default_reverse
from .perceptron import Perceptron
from .reverse import Reverse
from .schemes import SCHEMES
from .stack import ResidualStack


class ResidualMLP(AdjointModule):
    """A residual network of two-layer perceptrons that trains without storing its states, its depth in one op.

    f_n(x) = W2_n s(W1_n norm(x) + b1_n) + b2_n;   Euler: x_{n+1} = x_n + h f_n(x_n)

    The same network as a `ResidualStack` of such blocks (`to_blocks`), but a tile of rows goes through all layers
    before the next one is taken: states stay in the cache of a CPU, or on the chip of a GPU.

    Args:
        dim: of the states, >= 1; up to 256, in float32 128, Triton keeps states on chip, up to 128 CUDA C++.
        hidden: of the perceptrons' hidden activations, >= 1.
        depth: N, the number of steps, >= 1.
        scheme: "euler", N layers; or "heun", N + 1 layers, as in `ResidualStack`.
        activation: s: "identity", "relu", "gelu", "gelu_tanh" (its approximation by tanh), "silu" or "tanh".
        norm: of each layer's input: None, "rms" or "layer", without weights (W1 and b1 absorb them), epsilon 1e-5.
        bias: whether there are b1 and b2.
        step: h, dimensionless: a number > 0, or one for each step; None is 1/N.
        gradient: "adjoint" rebuilds the states in the backward pass; "checkpoint" is exact, keeps x_0, and only the
            rows that it works on have N states; "backprop" stores everything, and alone has higher derivatives.
        reverse: how the adjoint comes by the states. It rebuilds them: "paper", "corrected", "extrapolated" (accurate
            where weights are smooth in depth: `smooth_init_`), or a `Reverse`; or the forward pass stores increments,
            "stored" or `Reverse("stored", bits=b)`, b + 1/4 bits a value and step: for any weights and h, with 8 matrix
            products a step as with "extrapolated". None is "stored" for `step=1.0`, else "corrected". Accelerated
            corrections, the default from 2 on, mix iterates sample by sample, for which tiles are whole samples of x,
            and only "torch", and "triton" for rows wider than it keeps on chip, have them; `accelerate=False` runs
            everywhere. Increments are stored by "torch" and "triton", which on chip has one number of bits for all
            steps; neighbours that share a scale are those of a row.
        anchors: keep the exact starting state of every K-th step, or of the steps with these numbers; None keeps
            none.
        max_drift, on_drift: the defect that is accepted, and what a larger one leads to, as for `ResidualStack`.
        backend: "auto" takes the fastest that can run, as far as that was measured; "torch" runs everywhere, "cuda"
            (C++, for few rows) and "triton" on CUDA devices of compute capability 8.0 and later. One that is named runs
            or raises.
        device, dtype: of the parameters: float64, float32, bfloat16 or float16. With the last two, states are float32
            all the same.

    Parameters, stacked over the layers: weight_in [layers, hidden, dim], bias_in [layers, hidden], weight_out
    [layers, dim, hidden], bias_out [layers, dim]; initialised as `nn.Linear`'s.

    Between forward and backward the parameters must stay as they are, and under "adjoint" the output, unless increments
    are stored, under "checkpoint" x: the backward pass raises if one was modified in place. It computes in the forward
    pass' dtypes, whatever autocast is on by then.

    Raises:
        ValueError: for sizes below 1, unknown names, a step that is not positive and finite, or whose inverse is not,
            anchors that fit no step.
        TypeError: for sizes that are no integers, or a dtype that is none of those four.
    """

    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        depth: int,
        scheme: str = "euler",
        *,
        activation: str = "gelu",
        norm: str | None = None,
        bias: bool = True,
        step: float | Sequence[float] | None = None,
        gradient: str = "adjoint",
        reverse: str | Reverse | None = None,
        anchors: Anchors = None,
        max_drift: float = 0.05,
        on_drift: str = "warn",
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("dim", dim), ("hidden", hidden), ("depth", depth)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"ResidualMLP: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"ResidualMLP: {name} must be >= 1, got {size}")
        for name, value, known in (
            ("scheme", scheme, FUSED_SCHEMES),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("norm", norm, NORMS),
            ("backend", backend, NAMES),
        ):
            if value not in known:
                raise ValueError(f"ResidualMLP: {name} must be one of {known}, got {value!r}")
        if dtype not in (None, *DTYPES):
            raise TypeError(f"ResidualMLP: dtype must be one of {dtype_names(DTYPES)} or None, got {dtype!r}")
        steps = checked_steps("ResidualMLP", step, depth)
        super().__init__(
            SCHEMES[scheme],
            steps,
            gradient=gradient,
            reverse=default_reverse(step, steps) if reverse is None else reverse,
            anchors=anchors,
            max_drift=max_drift,
            on_drift=on_drift,
        )
        self.dim, self.hidden, self.depth = dim, hidden, depth
        self.activation, self.norm, self.backend = activation, norm, backend
        layers = self._method.block_count
        shapes = {
            "weight_in": (layers, hidden, dim),
            "bias_in": (layers, hidden),
            "weight_out": (layers, dim, hidden),
            "bias_out": (layers, dim),
        }
        for name, shape in shapes.items():
            is_there = bias or not name.startswith("bias")
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if is_there else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each layer's parameters anew, uniform in ±1/sqrt(inputs), as `nn.Linear` initialises."""
        for inputs, tensors in (
            (self.dim, (self.weight_in, self.bias_in)),
            (self.hidden, (self.weight_out, self.bias_out)),
        ):
            bound = 1 / math.sqrt(inputs)
            for tensor in tensors:
                if tensor is not None:
                    tensor.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x_N from x_0.

        Args:
            x: x_0, shape [*, dim], the parameters' dtype (or float32 with 16-bit parameters) and device.

        Returns:
            x_N, shape and dtype of x, contiguous.

        Raises:
            TypeError, ValueError: for an x that does not fit, as no nested or sparse one and no DTensor does, or a
                backend that can't compute this.
        """
        if torch.compiler.is_compiling() and self.on_drift not in ("ignore", "warn"):
            return _forward_uncompiled(self, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"ResidualMLP: x must be a tensor, got {type(x).__name__}")
        # A checkpoint around the module repeats a forward pass within a backward pass.
        is_repeated = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (torch.compiler.is_compiling() or is_repeated or is_capturing()):
            self._monitor.poll()
            self._fall_back_where_asked_for()
        return apply("ResidualMLP", self._network(), self._method, x, self.gradient, self.backend, self._monitor)

    def to_blocks(self) -> ResidualStack:
        """The same network as a `ResidualStack` of ordinary modules, with copies of the parameters and all settings.

        Each block is `nn.Sequential` of the norm if there is one, `nn.Linear`, the activation, `nn.Linear`.
        """
        stack = ResidualStack([self._block(n) for n in range(self._method.block_count)], **self.settings())
        return stack.train(self.training)

    @classmethod
    def from_blocks(cls, stack: ResidualStack, *, backend: str = "auto") -> ResidualMLP:
        """A `ResidualMLP` with copies of a stack's parameters and its settings.

        Args:
            stack: blocks as `to_blocks` makes them: norms without weights and with epsilon 1e-5, all of one shape.
            backend: as for `ResidualMLP`.

        Raises:
            TypeError: if stack is not a `ResidualStack`.
            ValueError: if a block is not such a perceptron, blocks differ, or the stack has settings that this lacks.
        """
        if not isinstance(stack, ResidualStack):
            raise TypeError(f"ResidualMLP: from_blocks needs a ResidualStack, got {type(stack).__name__}")
        if stack.stream_dtype is not None or stack.keep_input or stack.auxiliary is not None:
            raise ValueError(
                "ResidualMLP: from_blocks needs a stack with stream_dtype=None, keep_input=False and auxiliary=None, "
                "it has no such settings, got "
                f"{stack.stream_dtype}, {stack.keep_input} and {stack.auxiliary}; set them so"
            )
        blocks = [Perceptron.of(n, block) for n, block in enumerate(stack)]
        first = blocks[0]
        for n, block in enumerate(blocks):
            if block.facts != first.facts:
                raise ValueError(
                    f"ResidualMLP: all blocks must be alike to be stacked, got {first.facts} in block 0 and "
                    f"{block.facts} in block {n}"
                )
        weight = first.inner.weight
        mlp = cls(
            weight.shape[1],
            weight.shape[0],
            len(stack.steps),
            **AdjointModule.settings(stack),
            activation=first.activation,
            norm=first.norm,
            bias=first.inner.bias is not None,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        for n, block in enumerate(blocks):
            mlp._copy_layer(n, block, to_block=False)
        for mine, theirs in zip(mlp._stacked, first.parameters, strict=True):
            if mine is not None and theirs is not None:
                mine.requires_grad_(theirs.requires_grad)
        return mlp.train(stack.training)

    def extra_repr(self) -> str:
        shown = f"{self.dim}, {self.hidden}, {self.depth}, activation={self.activation!r}, norm={self.norm!r}"
        return f"{shown}, bias={self.bias_in is not None}, {self._described()}, backend={self.backend!r}"

    @property
    def _stacked(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.weight_in, self.bias_in, self.weight_out, self.bias_out

    def _network(self) -> Network:
        return Network(*self._stacked, self.activation, self.norm)

    def _block(self, n: int) -> nn.Sequential:
        has_bias, like = self.bias_in is not None, self.weight_in
        inner, outer = (
            nn.Linear(*sizes, bias=has_bias, device=like.device, dtype=like.dtype)
            for sizes in ((self.dim, self.hidden), (self.hidden, self.dim))
        )
        block = Perceptron(self.activation, self.norm, inner, outer)
        self._copy_layer(n, block, to_block=True)
        for mine, theirs in zip(self._stacked, block.parameters, strict=True):
            if mine is not None and theirs is not None:
                theirs.requires_grad_(mine.requires_grad)
        return block.module()

    @torch.no_grad()
    def _copy_layer(self, n: int, block: Perceptron, to_block: bool) -> None:
        for mine, theirs in zip(self._stacked, block.parameters, strict=True):
            if mine is not None and theirs is not None:
                source, target = (mine[n], theirs) if to_block else (theirs, mine[n])
                target.copy_(source)


@torch._disable_dynamo
def _forward_uncompiled(mlp: ResidualMLP, x: Tensor) -> Tensor:
    # Compiled code measures no drift, and what is to follow from it would not.
    return mlp._forward(x)
