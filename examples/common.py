"""What the examples share: flags, a training loop that measures itself, text to learn, and a table.

Memory is what autograd holds between the forward and the backward pass, which is what grows with depth: the storages
of all tensors that it saves, each once, parameters left out. The peak of a training step is higher, by the gradients
and, where the states are rebuilt or their increments stored, by the activations of the one block at work.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Sizes = Mapping[str, Any]


def options(
    about: str | None,
    *,
    quick: Sizes,
    usual: Sizes,
    full: Sizes,
    add: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """The flags of an example. Seeds torch's generator.

    Args:
        quick, usual, full: the sizes under `--quick`, by default and under `--full`; each is a flag of its own too.
        add: adds what flags the example has beside.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    extent.add_argument("--full", action="store_true", help="sizes for a GPU, beside --device cuda")
    for name, value in usual.items():
        told = f"default {value}, quick {quick[name]}, full {full[name]}"
        parser.add_argument(f"--{name}", type=type(value), help=told)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on a CPU")
    parser.add_argument("--figure", help="where to draw the picture, of an example that has one")
    add(parser)
    given = parser.parse_args()
    sizes = quick if given.quick else full if given.full else usual
    for name, value in sizes.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    torch.manual_seed(given.seed)
    torch.set_num_threads(given.threads)
    return given


@contextmanager
def extra() -> Iterator[None]:
    """Around imports of other packages: what is missing ends the program with the command that installs it."""
    try:
        _define_torchvision_operators()
        yield
    except ImportError as error:
        sys.exit(f'{sys.argv[0]}: needs a package that is missing ({error}); pip install "resode_cuda[models]"')


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # defined for as long as this lives


def _define_torchvision_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch, for which PyPI has no build of its operators.

    timm and transformers import it, and use none of these.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class Run(NamedTuple):
    """A training."""

    losses: list[float]
    held: int
    """Bytes that autograd holds of a forward pass."""
    seconds: float
    """Median of a training step."""


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float = 1e-3) -> Run:
    """An ordinary training loop: nothing in it knows whether the model is converted.

    Args:
        loss: draws a batch and returns the model's loss for it.
        rate: largest learning rate of AdamW, in one cycle.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())  # waits for the device
        times.append(time.perf_counter() - start)
    return Run(losses, held_bytes(model, loss), statistics.median(times))


def held_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd holds after a forward pass, parameters left out."""
    parameters = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage._cdata] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _alive = forward()
    # Sizes as they are now: FSDP has emptied what it had gathered.
    return sum(storage.nbytes() for storage in held.values())


def local(parameter: Tensor) -> Tensor:
    """What this process has of a parameter, which may be sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


CHARACTERS = 128


def numbers(text: str) -> Tensor:
    """A text as the numbers of its characters."""
    return torch.tensor([min(ord(character), CHARACTERS - 1) for character in text])


def documentation() -> Tensor:
    """Python's description of its language, half a million characters that come with it."""
    return numbers("".join(pydoc_data.topics.topics.values()))


def windows(characters: Tensor, rows: int, length: int) -> Tensor:
    """Windows of a text at random places, shape [rows, length]."""
    starts = torch.randint(0, len(characters) - length, (rows,)).tolist()
    return torch.stack([characters[start : start + length] for start in starts])
