"""The graph of a step's forward pass, kept without its tensors, for steps whose backward pass knows its point y.

Autograd saves tensors while a block runs, and a backward pass needs no more of the block than these. So where
increments are stored the graph of the forward pass stays, with a number in the place of each tensor, and the block runs
again at y only as far as the last of them: what follows, mostly a matrix product, is spared. A block that does not save
at y what it saved at x_n, since it branches on its input, is differentiated at y as with other solvers; so is one that
differentiates inside, which needs its tensors at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from ..layouts import in_memory
from ..schemes import BlockFunction, Vjp
from .agreement import collectives_so_far
from .blocks import Auxiliaries, Block, BlockCall
from .inventory import HeldParameter
from .vjp import BlockVjps, refuse_hooks, strangers


class _AllSaved(Exception):  # noqa: N818 (no error)
    """All tensors have been saved."""


class _OtherSaved(Exception):  # noqa: N818 (no error)
    """A tensor has been saved that is not the one of the forward pass."""


class _UsedTwiceError(CheckpointError):
    """A tensor was asked for a second time, after it had been let go of."""


class _UsedTooEarlyError(RuntimeError):
    """A tensor was asked for that has not been computed again."""


Format = tuple[torch.Size, torch.dtype, torch.device, int]
"""The last is the number of a leaf, from 1 on, and 0 for other tensors."""


class _Leaves:
    """Tells a block's leaves, and views of their beginning, from other tensors by their addresses.

    These are looked up before each evaluation: FSDP gathers parameters elsewhere in the backward pass.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
        self._numbers: dict[int, int] = {}

    def look_up(self) -> None:
        addresses = [_address(tensor) for tensor in self._tensors]
        self._numbers = dict(zip(reversed(addresses), range(len(addresses), 0, -1), strict=True))
        self._numbers.pop(0, None)

    def number_of(self, tensor: Tensor) -> int:
        return self._numbers.get(_address(tensor), 0) if tensor.layout == torch.strided else 0


def _address(tensor: Tensor) -> int:
    return in_memory(tensor)[0].data_ptr()


class _SavedTensors:
    """What autograd saves of an evaluation: in the forward pass the formats alone, in a backward pass the tensors.

    The graph holds this by its hooks. So it must not hold the graph.

    Args:
        leaves: which are told from each other.
    """

    def __init__(self, leaves: _Leaves) -> None:
        self._leaves = leaves
        self._formats: list[Format] = []
        self._tensors: list[Tensor | weakref.ref[Tensor]] = []
        self._versions: list[int] = []
        self._stops = False
        self.ending: type[Exception] | None = None
        """What has ended the evaluation, whatever became of it on its way through the block. (The exception itself
        would hold the block's frames, and their tensors.)"""

    def __len__(self) -> int:
        return len(self._formats)

    def noting(self) -> saved_tensors_hooks:
        """Have the graph that is made inside save numbers."""
        self._leaves.look_up()
        return saved_tensors_hooks(self._note, self._give)

    def collecting(self, stops: bool) -> saved_tensors_hooks:
        """Have the evaluation inside leave its tensors here; `_AllSaved` ends it with the last of them."""
        self.clear()
        self._leaves.look_up()
        self._stops, self.ending = stops, None
        return saved_tensors_hooks(self._collect, self._refuse)

    @torch._disable_dynamo
    def _refuse(self, _: None) -> Tensor:
        """The block differentiates inside, which it did not in the forward pass."""
        self.ending = _OtherSaved
        raise _OtherSaved

    @torch._disable_dynamo
    def _collect(self, tensor: Tensor) -> None:
        place = len(self._tensors)
        if place == len(self) or self._formats[place] != self._format(tensor):
            self.ending = _OtherSaved
            raise _OtherSaved
        self._tensors.append(tensor.detach())
        self._versions.append(_version(tensor))
        if self._stops and place + 1 == len(self):
            self.ending = _AllSaved
            raise _AllSaved

    @property
    def are_complete(self) -> bool:
        return len(self._tensors) == len(self)

    def clear(self) -> None:
        self._tensors, self._versions = [], []

    @torch._disable_dynamo
    def _note(self, tensor: Tensor) -> int:
        self._formats.append(self._format(tensor))
        return len(self) - 1

    def _format(self, tensor: Tensor) -> Format:
        return tensor.shape, tensor.dtype, tensor.device, self._leaves.number_of(tensor)

    @torch._disable_dynamo
    def _give(self, place: int) -> Tensor:
        if not self._tensors:
            raise _UsedTooEarlyError(
                "ResidualStack: what a block leaves for others, on a module, in a list or by a hook, must not be "
                "differentiated, since its tensors are computed again by the stack's own backward pass alone; return "
                "it with the increment to a stack with auxiliary=sum, or ask for states with return_states="
            )
        held = self._tensors[place]
        if isinstance(held, Tensor):
            # Autograd asks once, and what its node has done with goes at once: a block's tensors shrink as its
            # gradients come.
            tensor, self._tensors[place] = held, weakref.ref(held)
        else:
            given = held()
            if given is None:
                raise _UsedTwiceError
            tensor = given
        if _version(tensor) != self._versions[place]:
            raise RuntimeError(
                "ResidualStack: blocks must not modify in place what autograd has saved for their gradients, but a "
                f"tensor of shape {list(tensor.shape)} was; use an operation that is not in place"
            )
        return tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Start(torch.autograd.Function):
    """The state at which a block's graph begins: its gradient is asked for there, and goes no further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anything: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise _UsedTooEarlyError("ResidualStack: what a block leaves for others must not be differentiated")


_ANYTHING = torch.empty(0, requires_grad=True)
"""Gives a state a graph."""


class BlockGraph:
    """The graph of one evaluation of a block.

    Args:
        block: which is evaluated.
        leaves: of the step.

    Attributes:
        holds_input: whether something in it, or the block, holds the state itself.
        can_stop: whether the block may stop where nothing more is saved.
        start: where the gradient of the block's input is found; None where it has none.
        root: of the block's output, auxiliary_root of what it returned beside it; None where these have no gradient.
    """

    def __init__(self, block: Block, leaves: _Leaves) -> None:
        self.block = block
        self._saved = _SavedTensors(leaves)
        self.start: GradientEdge | None = None
        self.root: GradientEdge | None = None
        self.auxiliary_root: GradientEdge | None = None
        self.dtype: torch.dtype | None = None
        self.holds_input, self.can_stop = False, True

    def record(self, f: BlockFunction, x: Tensor, needs_x: bool, auxiliaries: Auxiliaries) -> Tensor:
        """f(x), without gradients: the graph is kept here."""
        count = len(auxiliaries)
        with torch.enable_grad():
            x = x.detach()  # or the graph would go on to the step before
            start = _Start.apply(x, _ANYTHING) if needs_x else x
            with self._saved.noting():
                out = f(start)
        self.start = get_gradient_edge(start) if needs_x else None
        self.root, self.dtype = _edge(out), out.dtype
        if len(auxiliaries) > count and auxiliaries[-1] is not None:
            self.auxiliary_root = _edge(auxiliaries[-1])
            auxiliaries[-1] = auxiliaries[-1].detach()
        out, input_before = out.detach(), weakref.ref(start)
        del start
        self.holds_input = needs_x and input_before() is not None
        return out

    def again(self, f: BlockFunction, point: Tensor, stops: bool) -> Tensor | None:
        """Save what the forward pass saved, but at this point.

        Args:
            point: a leaf that has a gradient if the block's input had one.
            stops: whether f may stop as soon as that is saved.

        Returns:
            f(point); None where it has stopped.
        Raises:
            _OtherSaved: if f saves something else.
        """
        stops = stops and self.can_stop
        if stops and not len(self._saved):
            return None
        out = None
        try:
            with torch.enable_grad(), self._saved.collecting(stops):
                out = f(point)
        except BaseException as error:
            # TorchScript's interpreter makes another error of it.
            ending = self._saved.ending if isinstance(error, Exception) else None
            if ending is not _AllSaved:
                self.clear()
                raise (ending or error) from None
            return None
        if self._saved.ending is not None or not self._saved.are_complete:
            self.clear()
            raise _OtherSaved
        return out.detach()

    def clear(self) -> None:
        """Let go of what was saved again."""
        self._saved.clear()


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


class StepGraph:
    """The graphs of a step's blocks.

    Args:
        calls: of the blocks.
        tensors: leaves in the place of those among the blocks' arguments, and the blocks' parameters.
        needs_x: whether the step's starting state has a gradient.

    Attributes:
        leaves: where the gradients of the arguments and parameters are found; None for those that have none.
    """

    def __init__(self, calls: Sequence[BlockCall], tensors: Sequence[Tensor], needs_x: bool) -> None:
        self._needs_x = needs_x
        self._known = set(map(id, tensors))
        self._told_apart = _Leaves(tensors)
        self.leaves = [_edge(tensor) for tensor in tensors]
        self.blocks: list[BlockGraph | None] = []
        """None for one whose graph is not kept."""
        self._calls = calls

    def keeping(self, functions: Sequence[BlockFunction], auxiliaries: Auxiliaries) -> list[BlockFunction]:
        """The blocks in the forward pass, which leave their graphs here."""

        def kept(call: BlockCall, f: BlockFunction) -> BlockFunction:
            return lambda x: self._record(call, f, x, auxiliaries)

        return [kept(call, f) for call, f in zip(self._calls, functions, strict=True)]

    def _record(self, call: BlockCall, f: BlockFunction, x: Tensor, auxiliaries: Auxiliaries) -> Tensor:
        graph, out = None, None
        if not call.block.needs_its_tensors:
            graph, out = self._kept(call, f, x, auxiliaries)
        if out is None:
            out = f(x)
            # If the first try was to blame, and not the block.
            call.block.needs_its_tensors = True
        self.blocks.append(graph)
        # The next block's input depends on this one's output.
        self._needs_x = True
        return out

    def _kept(
        self, call: BlockCall, f: BlockFunction, x: Tensor, auxiliaries: Auxiliaries
    ) -> tuple[BlockGraph | None, Tensor | None]:
        """f(x) and its graph, None where that can't be kept.

        A block that fails, which it may do since its tensors are not saved, is as if it had not run.
        """
        graph, count, collectives = BlockGraph(call.block, self._told_apart), len(auxiliaries), collectives_so_far()
        try:
            out = graph.record(f, x, self._needs_x, auxiliaries)
        except Exception:  # if the block is to blame, it fails again without a graph
            call.rewind()
            del auxiliaries[count:]
            return None, None
        if collectives_so_far() != collectives:
            # Whether a graph can be kept may be found otherwise on another rank: a collective's own thread may hold
            # the state a little longer there, or the block take another branch.
            call.block.needs_its_tensors = True
            return None, out
        # Hooks come in pairs: those after a module's forward pass must run too.
        graph.can_stop = not call.inventory.has_forward_hooks
        is_kept = not (graph.holds_input or self._has_strangers(call, graph))
        return graph if is_kept else None, out

    def _has_strangers(self, call: BlockCall, graph: BlockGraph) -> bool:
        """Whether the block uses tensors with gradients that are not known here; the backward pass looks at them."""
        if not call.inventory.may_use_strangers:
            return False
        roots, ends = _nodes((graph.root, graph.auxiliary_root)), _nodes((graph.start, *self.leaves))
        return bool(strangers(roots, self._known, ends))


def _nodes(edges: Sequence[GradientEdge | None]) -> list[Any]:
    return [edge.node for edge in edges if edge is not None]


def may_keep(calls: Sequence[BlockCall], parameters: Sequence[HeldParameter], has_containers: bool) -> bool:
    """Whether the graphs of blocks may be kept.

    Not where a container among the arguments may be filled with tensors of the graph, where gradients would pass hooks
    of a parameter a second time, or go on to what it is computed from, or where a block can't be stopped.
    """
    trained = [parameter.tensor for parameter in parameters if parameter.tensor.requires_grad]
    are_plain = all(tensor.is_leaf and not tensor._backward_hooks for tensor in trained)
    return are_plain and not (has_containers or any(call.inventory.is_scripted for call in calls))


class KeptVjps(BlockVjps):
    """The vector-Jacobian products of a step's blocks by the graphs that are kept of them.

    Args:
        graph: of the step.
        is_evaluated: whether the blocks are to be evaluated to their ends.
        others: as of `BlockVjps`.
    """

    def __init__(self, graph: StepGraph, is_evaluated: bool, *others: Any) -> None:
        super().__init__(*others)
        self._graphs, self._places = list(graph.blocks), graph.leaves
        self._is_evaluated = is_evaluated

    def linearize(self, f: BlockFunction, x: Tensor) -> tuple[Tensor | None, Vjp]:
        graph = self._graphs.pop(0)
        if graph is None:
            return super().linearize(f, x)
        point = x.detach().requires_grad_(graph.start is not None)
        self._auxiliaries.clear()
        try:
            out = graph.again(f, point, stops=not (self._is_evaluated or self._graphs))
        except _OtherSaved:
            graph.clear()
            return super().linearize(f, x)
        refuse_hooks(self._n, point)
        g_auxiliary = self._auxiliary_cotangents.pop(0) if self._auxiliary_cotangents else None
        start, was_point_wanted = graph.start if self._is_point_wanted else None, self._is_point_wanted

        def evaluated_anew() -> Vjp:
            self._is_point_wanted = was_point_wanted
            return super(KeptVjps, self).linearize(f, x)[1]

        self._is_point_wanted = self._is_point_wanted or graph.root is not None

        def vjp(cotangent: Tensor) -> Tensor | None:
            roots = [(graph.root, cotangent.to(graph.dtype)), (graph.auxiliary_root, g_auxiliary)]
            try:
                return self._through([(root, g) for root, g in roots if root is not None and g is not None], start)
            except CheckpointError as error:  # a checkpoint inside, which saves other tensors at y
                graph.block.needs_its_tensors |= isinstance(error, _UsedTwiceError)
                if g_auxiliary is not None or graph.auxiliary_root is not None:
                    self._auxiliary_cotangents.insert(0, g_auxiliary)
                return evaluated_anew()(cotangent)
            finally:
                graph.clear()

        return out, vjp

    def _through(self, given: Sequence[tuple[Any, Any]], start: GradientEdge | None) -> Tensor | None:
        """The product for the block's input. Those for the leaves are added to what was found for them."""
        places = [place if leaf.requires_grad else None for place, leaf in zip(self._places, self._leaves, strict=True)]
        wanted = list(dict.fromkeys(place for place in (start, *places) if place is not None))
        if not (wanted and given):
            return None
        products = self._differentiated(given, wanted, keeps_graph=True)
        by_place: dict[Any, Tensor | None] = dict(zip(wanted, products, strict=True))
        self._add([by_place.pop(place, None) for place in places])
        return by_place.get(start)
