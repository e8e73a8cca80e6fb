"""`ResidualStack`: any blocks, as a residual network that trains without storing its states."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from .adjoint import checkpoint, node, traced
from .adjoint.agreement import on_any_rank
from .adjoint.block_arguments import Arguments, Call
from .adjoint.blocks import Auxiliaries, Block, Returned
from .adjoint.drift import FALLBACKS
from .adjoint.inventory import Inventories, submodules
from .adjoint.inversion import inverted
from .adjoint.outputs import Outputs
from .adjoint.restoration import undo_leftovers
from .devices import is_capturing
from .dtypes import DTYPES
from .export import wants_plain
from .handed_out import warn_of_training
from .layouts import is_distributed
from .method import Anchors
from .module import AdjointModule, checked_block_form, checked_steps, default_reverse
from .plan import Plan
from .recalibration import Recalibration
from .reverse import Reverse, integer
from .schemes import SCHEMES, BlockForm
from .schemes import step as take_step
from .trial import Loss

FORMS = ("residual", "block")


class ResidualStack(AdjointModule):
    """A residual network of any blocks, x_{n+1} = x_n + Phi_n(x_n), with a backward pass of O(1) activation memory.

    The forward pass, the parameters and the `state_dict` are those of the ordinary network (`nn.Sequential(*blocks)`
    has the same keys). The backward pass of `gradient="adjoint"` starts from the output alone: it rebuilds each state
    from the next one and applies the vector-Jacobian product there.

    Args:
        blocks: the modules f_n. Each maps a floating tensor of any shape, and the stack's further arguments, to a
            tensor of the same shape, dtype and device. The same module may stand at several places.
        scheme: `"euler"`, x + h f_n(x), N steps of N blocks; or `"heun"`, x + h/2 (k1 + k2) with k1 = f_n(x) and
            k2 = f_{n+1}(x + h k1), N steps of N + 1 blocks.
        form: `"residual"`, blocks are the f_n; or `"block"`, blocks add the state themselves, x_{n+1} = block_n(x_n),
            as the layers of most models do (Euler, h = 1). The forward pass is then that of the blocks to the last bit,
            in any dtype, and a block may return a tuple of the state and None.
        step: h, dimensionless: a number > 0, or one for each step. None is 1/N; 1.0 with Euler is the ordinary
            ResNet x + f(x).
        gradient: `"adjoint"` rebuilds the states; `"checkpoint"` stores one state per step and is exact; `"backprop"`
            stores everything and is the only one with higher derivatives, torch.func and forward mode.
        reverse: how the adjoint comes by the states. It rebuilds them by `"paper"`, `"corrected"`, `"extrapolated"` or
            a `Reverse`, which states costs and orders; or the forward pass stores increments: `"stored"`, 8 bits a
            value and step, or `Reverse("stored", bits=b)`. None is `"stored"` for `step=1.0` and `form="block"`,
            networks that nothing can be rebuilt for once they are trained, and else `"corrected"`.
        anchors: K keeps the exact starting state of every K-th step, counted from 0; a collection of step numbers
            keeps those of the steps that it names. The error of the reconstruction starts afresh there, at one state of
            memory each, and `anchors=1` is exact. None keeps none. Where a single layer is wild, mostly the first,
            `anchors={0}` may be all that is needed.
        max_drift: the largest defect |y - x_n| / |x_n| of a step that is accepted, dimensionless. It compares defects,
            the relative error of the points where vector-Jacobian products are taken, not an error of the gradient;
            `calibrate` measures that one. For increments stored in b bits, whose defect is
            relative to the larger one of x_n and x_{n+1}, it is 2^(8 - b) times as much.
        on_drift: what a larger defect, NaN or Inf in the reconstruction, or a block whose increment is another one in
            the backward pass (`drift.changes`) leads to. `"warn"` warns once per stack; `"raise"` raises `DriftError`;
            `"store"` warns and sets `reverse="stored"`, and where 8 bits are not enough `gradient="checkpoint"`;
            `"checkpoint"` warns and sets `gradient="checkpoint"`, exact, for the training steps that follow;
            `"ignore"` warns of NaN and Inf alone. Defects are free. They are judged at the end of the backward pass on
            a CPU; on a GPU without waiting for it, by a forward pass once they have arrived, except that all but "warn"
            and "ignore" make the next forward pass wait for them. Under `DistributedDataParallel` each rank decides by
            its own batch. Where blocks hold a `SyncBatchNorm`, or are sharded or split over ranks, what one decides
            holds for all of them. Blocks with collectives of their own are not for "store" and "checkpoint".
        keep_input: keep x_0, one state more, and measure in `drift.reconstruction` how far the rebuilt one is from it.
        auxiliary: blocks may return (increment, auxiliary), such as the balancing loss of a router, and the stack
            returns (x_N, auxiliary([...])), with gradients in all modes. A function from the list of what the
            evaluations returned, in their order, to a tensor, such as Python's `sum`; under Heun most blocks are
            evaluated twice. None: blocks return one tensor.
        stream_dtype: dtype of the states between blocks. None is float32 for 16-bit inputs, else the input's dtype: the
            reconstruction subtracts small increments, which 16 bits lose. Blocks see, and the stack returns, the
            input's dtype.

    The gradient's relative error is O(h^p) with p = 1 ("paper") or 2 ("corrected") for Euler where blocks are smooth,
    and grows like exp(L) with the Lipschitz constant L of the flow: watch `drift`. With stored increments the point
    of each product is off by half a quantum at most, whatever the blocks do, and the gradient by that times their
    steepness; the error halves with each bit, and with 8 bits it was below that of bfloat16 autocast on every trained
    network tried.

    Under "adjoint" and "checkpoint" a block runs again in the backward pass, under "adjoint" without gradients in the
    forward pass, unless increments are stored. What it sees is as it was: random numbers (torch's, Python's `random`,
    NumPy's global ones), buffers, autocast, the default dtype, train/eval flags, numbers and strings among its modules'
    attributes, arguments with their containers. Whether it was the same function is measured (`drift.changes`), and
    acted on by `on_drift`. Under "checkpoint" one step in turn is compared in each pass, and raises `DriftError`; where
    increments are stored all are in the first pass, then one in turn, unless `on_drift="raise"`.
    Limits, all of them the blocks':

    - What a block leaves for others (an auxiliary loss kept on the module, states appended to a list, activations taken
      by a hook) has no gradients under "adjoint", which warns of it, or raises, where it can: use `auxiliary` or
      `return_states`.
    - Random numbers of a generator of the block's own, caches in objects of its own and tensors written through `.data`
      are not replayed; that they changed is noticed where they change the increment by a twentieth or more.
    - A block must not write its parameters or its tensor arguments, or branch on whether gradients are enabled.
    - torch's attention does not take its fast path for inference inside a stack, since that is another function.
    - `torch.compile` traces a stack, or a model with it, where its blocks are torch's own modules, or have run
      uncompiled in the same mode and neither drew random numbers nor wrote buffers; others run uncompiled inside the
      compiled model, at first or always. With `fullgraph=True` take one training step uncompiled before. Drift is not
      measured in compiled code.
    - A CUDA graph may capture training steps of blocks that draw no random numbers; others are refused while it does.
      Replays measure `drift`, and nothing warns of it: read it.
    - Two threads may train one stack if its blocks draw no random numbers, write no buffers and attributes, have no
      hooks on their parameters and hold no attention in eval mode.

    Discrete adjoint method: Sander, Ablin and Peyré, NeurIPS 2022, arXiv:2205.14612.

    Raises:
        ValueError: for no block, one block under Heun, unknown names, a step that is not positive and finite, or whose
            inverse is not, or not one for each step, anchors below 1 or that no step has for its number, bits for
            another number of steps, or form="block" with another scheme, step or stream.
        TypeError: for blocks that are no modules, a step or anchors that is no number, or a `stream_dtype` that is no
            floating dtype.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        scheme: str = "euler",
        *,
        form: str = "residual",
        step: float | Sequence[float] | None = None,
        gradient: str = "adjoint",
        reverse: str | Reverse | None = None,
        anchors: Anchors = None,
        stream_dtype: torch.dtype | None = None,
        max_drift: float = 0.05,
        on_drift: str = "warn",
        keep_input: bool = False,
        auxiliary: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> None:
        blocks = list(blocks)
        for index, block in enumerate(blocks):
            if not isinstance(block, nn.Module):
                raise TypeError(f"ResidualStack: block {index} must be an nn.Module, got {type(block).__name__}")
        if scheme not in SCHEMES:
            raise ValueError(f"ResidualStack: scheme must be one of {tuple(SCHEMES)}, got {scheme!r}")
        if form not in FORMS:
            raise ValueError(f"ResidualStack: form must be one of {FORMS}, got {form!r}")
        needed = SCHEMES[scheme].blocks_per_step
        if len(blocks) < needed:
            way_out = 'use scheme="euler" or add a block' if blocks else "pass a list of modules"
            raise ValueError(
                f"ResidualStack: scheme={scheme!r} needs at least {needed} block{'s'[: needed - 1]}, "
                f"got {len(blocks)}; {way_out}"
            )
        steps = checked_steps("ResidualStack", step, len(blocks) + 1 - needed)
        if form == "block":
            steps = checked_block_form(scheme, step, steps, stream_dtype)
        super().__init__(
            BlockForm if form == "block" else SCHEMES[scheme],
            steps,
            gradient=gradient,
            reverse=default_reverse(1.0 if form == "block" else step, steps) if reverse is None else reverse,
            anchors=anchors,
            max_drift=max_drift,
            on_drift=on_drift,
        )
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)
        self._block_count = len(blocks)
        self.form = form
        if stream_dtype not in (None, *DTYPES):
            raise TypeError(f"ResidualStack: stream_dtype must be one of {DTYPES} or None, got {stream_dtype!r}")
        self.stream_dtype = stream_dtype
        self.keep_input = keep_input
        if auxiliary is not None and not callable(auxiliary):
            raise TypeError(
                f"ResidualStack: auxiliary must be a function of a list of tensors, got {auxiliary!r}; use sum"
            )
        self.auxiliary = auxiliary
        self._inventories = Inventories()
        # By the training flags of all modules: whether blocks were functions of their arguments when they last ran.
        self._are_functions: dict[tuple[bool, ...], bool] = {}
        self._has_run = False
        self._watch: RemovableHandle | None = None  # of blocks handed out before

    def forward(self, x: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """x_N from x_0.

        Args:
            x: x_0, any shape, floating dtype, on the blocks' device.
            *args, **kwargs: passed to every block; tensors among them, also inside lists, tuples and dicts, get
                gradients. Blocks get the caller's own objects in the forward pass, and what each of them was given
                when they run again.
            return_states: (keyword) numbers n, from 0 to N, of states x_n to be returned too, for U-Nets, deep
                supervision and early exits; blocks do not get it. Each takes the memory of a state, and the
                reconstruction's error starts afresh there.

        Returns:
            x_N, shape and dtype of x. With `auxiliary` a tuple of it and the reduced auxiliaries; with `return_states`
            the last entry of the tuple is the list of these states, in the order asked for.

        Raises:
            TypeError: if x is not a floating tensor, or is a DTensor, or a block returns no tensor, a DTensor, or
                another dtype.
            ValueError: if a block changes the shape or device of its input, for a state that there is none of, or for
                steps so small, or so different, that the stream's dtype cannot hold h, 1/h or the ratios of successive
                steps.
            RuntimeError: if a block modifies in place its input, a tensor among its arguments or its parameters; in the
                backward pass, see `gradient`.
        """
        # Not in the signature: what exports a module would pass it on as one more argument of the blocks.
        return_states = kwargs.pop("return_states", None)
        if self._watch is not None and not self._has_run:
            self._has_run = True
        if torch.compiler.is_compiling():
            if return_states is None and self._is_traceable():
                return self._forward_traced(x, args, kwargs)
            return _forward_uncompiled(self, x, args, kwargs, return_states)
        return self._forward(x, args, kwargs, return_states)

    def _forward(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], return_states: Sequence[int] | None
    ) -> Any:
        undo_leftovers()
        self._has_run = True
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        # A checkpoint around the stack repeats a forward pass within a backward pass.
        is_repeated = torch._C._current_graph_task_id() != -1
        if not is_repeated and not is_capturing():
            self._apply_pending(x, args, kwargs)
        wanted = self._checked_states(return_states)
        blocks, state = self._blocks_for(x), self._state_from(x)
        arguments = Arguments(args, kwargs)
        differentiable = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in chain((x,), arguments.tensors, self.parameters())
        )
        if differentiable and self.gradient != "adjoint":
            self._monitor.forget()
        is_plain = wants_plain("ResidualStack", self.gradient, differentiable)
        if is_plain or self.gradient == "backprop" or not differentiable:
            outputs = self._propagate_stored(blocks, state, Call(args, kwargs), wanted)
        elif torch._C._are_functorch_transforms_active():
            raise node.unsupported(self.gradient, "a torch.func transform")
        elif self.gradient == "checkpoint":
            outputs = checkpoint.propagate(self._method, blocks, state, arguments, self._monitor)
        else:
            between = {n for n in wanted if 0 < n < len(self.steps)}
            outputs = node.propagate(
                self._method, blocks, state, arguments, self._monitor, keep_input=self.keep_input, states=between
            )
            outputs.states.update({0: state, len(self.steps): outputs.last})
            self._are_functions[self._modes()] = outputs.are_functions
        return self._returned(outputs, x.dtype, None if return_states is None else wanted)

    def _returned(self, outputs: Outputs, dtype: torch.dtype, wanted: Sequence[int] | None) -> Any:
        found: list[Any] = [outputs.last.to(dtype)]
        if self.auxiliary is not None:
            found.append(self._reduced(outputs))
        if wanted is not None:
            found.append([outputs.states[n].to(dtype) for n in wanted])
        return found[0] if len(found) == 1 else tuple(found)

    def _reduced(self, outputs: Outputs) -> Any:
        assert self.auxiliary is not None
        given = [auxiliary for auxiliary in outputs.auxiliaries if auxiliary is not None]
        if not given:
            raise TypeError(
                "ResidualStack: with auxiliary set at least one block must return (increment, auxiliary), but none "
                "did; leave auxiliary out"
            )
        return self.auxiliary(given)

    def _checked_states(self, return_states: Sequence[int] | None) -> list[int]:
        if return_states is None:
            return []
        if not isinstance(return_states, Iterable):
            raise TypeError(f"ResidualStack: return_states must be a list of numbers, got {return_states!r}")
        wanted = []
        for given in return_states:
            n = integer(given)
            if n is None or not 0 <= n <= len(self.steps):
                raise ValueError(
                    f"ResidualStack: return_states must be numbers from 0 to {len(self.steps)}, got {given!r}; x_0 is "
                    "the input, the last one the output"
                )
            wanted.append(n)
        return wanted

    def _is_traceable(self) -> bool:
        """Whether a compiler may trace the stack; else it runs uncompiled inside the compiled model."""
        autocasts = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        is_watched = self.keep_input or self._monitor.on_drift not in ("ignore", "warn")
        wants_eager = autocasts or is_watched or self._recalibration is not None or self.auxiliary is not None
        if wants_eager or not traced.is_traceable(self.modules()):
            return False
        needs_functions = self.gradient == "adjoint" and torch.is_grad_enabled()
        return not needs_functions or traced.are_known(self.modules()) or self._are_functions.get(self._modes(), False)

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in submodules((self,)))

    def _forward_traced(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        blocks, state = self._blocks_for(x), self._state_from(x)
        if not torch.compiler.is_exporting():
            self._monitor.forget()
        if torch.is_grad_enabled() and self.gradient == "adjoint":
            state = traced.propagate(self._method, blocks, state, traced.TracedArguments(args, kwargs))
        elif torch.is_grad_enabled() and self.gradient == "checkpoint":
            state = traced.propagate_checkpointed(self._method, blocks, state, Call(args, kwargs))
        else:
            state = self._propagate_stored(blocks, state, Call(args, kwargs), ()).last
        return state.to(x.dtype)

    def _propagate_stored(self, blocks: Sequence[Block], state: Tensor, call: Call, wanted: Collection[int]) -> Outputs:
        """x_N from x_0 as autograd records it, if it does."""
        scheme = self._method.scheme
        auxiliaries: Auxiliaries = []
        states = {0: state}
        for n, h in enumerate(self.steps):
            functions = [block.function(call, auxiliaries) for block in blocks[self._method.blocks_of(n)]]
            state, _ = take_step(scheme, functions, state, h)
            if n + 1 in wanted:
                states[n + 1] = state
        return Outputs(state, auxiliaries, states)

    def _apply_pending(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Change the settings where the last backward pass, or a calibration that is due, asks for it."""
        self._monitor.poll()
        if self._recalibration is not None and self.training and torch.is_grad_enabled():
            plan = self._recalibration.plan(self, x, args, kwargs)
            if plan is not None:
                self.apply_plan(plan)
        if not torch.is_grad_enabled():
            return  # which ranks need not do together
        if self.gradient == "adjoint" and self.on_drift in FALLBACKS:
            self._monitor.fallback_requested = on_any_rank(self._monitor.fallback_requested, self, x.device)
        self._fall_back_where_asked_for()

    def apply_plan(self, plan: Plan) -> ResidualStack:
        """Train as a plan of `resode_cuda.calibrate` says from now on. Returns the stack.

        Its measured ratio of gradient error to defects makes `drift.gradient_error` an estimate of the former.
        """
        chosen = plan.chosen
        # Anchors first: if they don't fit the stack, nothing has changed.
        self.anchors, self.gradient = chosen.anchors, chosen.gradient
        if chosen.reverse is not None:
            self.reverse = chosen.reverse
        # The setters have forgotten the last plan's.
        self._monitor.gradient_error_per_defect = chosen.error / chosen.defect if chosen.defect else None
        return self

    def recalibrate_every(
        self,
        steps: int,
        tolerance: float | str = 1e-2,
        *,
        share: float = 0.01,
        loss: Loss | None = None,
        prefer: str = "memory",
        group: distributed.ProcessGroup | None = None,
    ) -> ResidualStack:
        """Calibrate on the batch at hand at the next training step and every `steps` after it, and apply the plan.

        Args:
            steps: training steps (forward passes in train mode with gradients) from one calibration to the next; 0 ends
                it.
            tolerance, loss, prefer, group: as for `resode_cuda.calibrate`, which it calls before the forward pass. A
                loss with labels must have been given those of the coming batch. Ranks of a group take as many training
                steps, and leave one out together.
            share: of the time since the first calibration that all later ones together may take; a calibration for
                which that does not suffice yet is left out.

        A batch that cannot serve, because its exact gradient is zero or not finite, is warned of and passed over.
        Copies of the stack do not calibrate again, nor do pickled ones; `training_state` keeps where it stands.

        Returns:
            the stack.
        """
        self._recalibration = Recalibration(steps, tolerance, share, loss, prefer, group) if steps != 0 else None
        return self

    def _resumed_recalibration(self, state: dict[str, Any] | None) -> Recalibration | None:
        return None if state is None else Recalibration.resumed(state, self._recalibration)

    @torch.no_grad()
    def invert(self, x_last: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """x_0 rebuilt from x_N by the stack's reverse solver, without gradients. No buffer of a block changes.

        Nothing is stored for it: where increments are stored for the backward pass, `"corrected"` serves here, which
        trained networks of h = 1 are out of reach of.

        Args:
            x_last: x_N, the output of the forward pass, any shape, floating dtype, on the blocks' device.
            *args, **kwargs: those of the forward pass.

        Returns:
            x_0, shape and dtype of x_last. Relative error O(h^p), for Euler with p = 1 ("paper") or 2 ("corrected"),
            and 3 ("extrapolated") where weights are smooth in depth; it grows like exp(L) with the Lipschitz constant
            L of the flow. Blocks that draw random numbers draw new ones: put them in eval mode.

        Raises:
            TypeError, ValueError: as the forward pass.
        """
        undo_leftovers()
        blocks, state = self._blocks_for(x_last), self._state_from(x_last)
        return inverted(self._method, blocks, state, Call(args, kwargs)).to(x_last.dtype)

    def __len__(self) -> int:
        """Number of blocks."""
        return self._block_count

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Block `index`; of a slice an `nn.ModuleList` of the blocks."""
        if isinstance(index, slice):
            return nn.ModuleList(self._handed_out(self._all_blocks()[index]))
        return self._handed_out([self._all_blocks()[operator.index(index)]])[0]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._handed_out(self._all_blocks()))

    def _all_blocks(self) -> list[nn.Module]:
        return [self._modules[str(index)] for index in range(self._block_count)]  # type: ignore[misc]

    def _handed_out(self, blocks: list[nn.Module]) -> list[nn.Module]:
        """The blocks, watched as long as the stack has not run itself: then whoever takes them knows what for."""
        if not (self._has_run or self._watch or torch.compiler.is_compiling()):
            self._watch = warn_of_training(self, blocks)
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recalibration": None, "_watch": None}

    def _replicate_for_data_parallel(self) -> ResidualStack:
        replica: ResidualStack = super()._replicate_for_data_parallel()  # type: ignore[assignment]
        replica._inventories = Inventories()
        return replica

    def extra_repr(self) -> str:
        return self._described()

    def settings(self) -> dict[str, Any]:
        names = "form", "stream_dtype", "keep_input", "auxiliary"
        mine = {name: getattr(self, name) for name in names}
        return {**super().settings(), **mine}

    def _blocks_for(self, x: Tensor) -> list[Block]:
        if not isinstance(x, Tensor):
            raise TypeError(f"ResidualStack: x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(
                f"ResidualStack: x must have a real floating dtype, got {x.dtype}; convert it, or embed it first"
            )
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise TypeError(f"ResidualStack: x must be a dense tensor, got a {kind} one; pad it, or use x.to_dense()")
        if is_distributed(x):
            raise TypeError(
                "ResidualStack: x must be this rank's own tensor, got a DTensor; pass x.to_local(), and let blocks "
                "return such tensors, too (use_local_output=True)"
            )
        returns = Returned(self.form == "block", self.auxiliary is not None)
        return [Block(module, n, x.dtype, self._inventories, returns) for n, module in enumerate(self._all_blocks())]

    def _state_from(self, x: Tensor) -> Tensor:
        """x in the stream's dtype, in which there must be all that the steps multiply it by."""
        # Blocks that add the state themselves add it in their own dtype.
        is_own = self.form == "block"
        dtype = x.dtype if is_own else self.stream_dtype or torch.promote_types(x.dtype, torch.float32)
        self._method.check_steps("ResidualStack", dtype)
        return x.to(dtype)


@torch._disable_dynamo
def _forward_uncompiled(
    stack: ResidualStack,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    return_states: Sequence[int] | None,
) -> Any:
    # A compiler that traced the adjoint would be free to draw other random numbers, and to move the reconstruction
    # into the forward pass. Blocks compiled on their own (block.compile()) stay compiled.
    return stack._forward(x, args, kwargs, return_states)
