"""A deep GPT on several processes: its stack under DDP, or sharded block by block by FSDP2, with checkpoints.

Its layers are the blocks of a `ResidualStack` in the block form, which stores 8 bits a value of each one's increment.
`fully_shard` shards each block and then the model, as for any other model, and each process keeps the states of its own
rows: sharding divides the parameters, the stack what grows with depth. With `--plain` the same is trained by backprop
as well, and the table has both.

`--resume FOLDER` keeps checkpoints there and goes on with the newest, on any number of processes. Beside the weights
and the optimizer's state it holds `training_state()`, how the stack trains by now: what a plan or `on_drift` has
changed, which each process decides by its own rows.

    torchrun --nproc-per-node 2 examples/distributed.py --plain

Two processes on 2 cores of an AMD EPYC, 100 steps: loss 2.87 by both; each process had 2.33 MiB of weights and held
48.92 MiB by backprop, 1.45 MiB as a stack. With `--parallel ddp` it had 4.66 MiB of weights, and held 48.89 and 1.42.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from common import CHARACTERS, documentation, held_bytes, local, mib, options, table, windows
from gpt_text import Layer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resode_cuda import ResidualStack

QUICK = {"layers": 8, "dim": 32, "length": 32, "rows": 8, "steps": 6, "every": 2}
USUAL = {"layers": 24, "dim": 64, "length": 64, "rows": 16, "steps": 100, "every": 25}
FULL = {"layers": 96, "dim": 1024, "length": 1024, "rows": 16, "steps": 2000, "every": 100}


class GPT(nn.Module):
    """Cross-entropy of the characters that follow."""

    def __init__(self, layers: int, dim: int, length: int, gradient: str) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(CHARACTERS, dim), nn.Embedding(length, dim)
        blocks = [Layer(dim) for _ in range(layers)]
        self.stack = ResidualStack(blocks, form="block", gradient=gradient, on_drift="store")
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CHARACTERS))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        given, following = characters[:, :-1], characters[:, 1:]
        logits = self.head(self.stack(self.embed(given) + self.place.weight[: given.shape[1]]))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


class Checkpoints(Stateful):
    """What `torch.distributed.checkpoint` saves and loads: sharded tensors by all processes, for any number of them."""

    def __init__(self, folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def state_dict(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        # Other values than tensors are kept once, from any process; so those of all are one string.
        states: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(states, self.model.stack.training_state())
        return {"model": weights, "optimizer": moments, "training": json.dumps(states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights, moments, states = state["model"], state["optimizer"], json.loads(state["training"])
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.model.stack.load_training_state(states[distributed.get_rank() % len(states)])

    def save(self, step: int) -> None:
        dcp.save({"run": self}, checkpoint_id=self.folder / f"{step}")

    def load(self) -> int:
        """Load the newest one. Returns its step, 0 if there is none."""
        # The file of metadata is written last: without it a process died before all was there.
        steps = [int(path.parent.name) for path in self.folder.glob("*/.metadata")]
        if steps:
            dcp.load({"run": self}, checkpoint_id=self.folder / f"{max(steps)}")
        return max(steps, default=0)


def trained(given: argparse.Namespace, gradient: str, device: torch.device) -> list[str]:
    """Train, and tell about it. Every process draws the batch of all of them and takes its rows."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    characters = documentation().to(device)
    torch.manual_seed(given.seed)
    model = GPT(given.layers, given.dim, given.length, gradient).to(device)
    parallel: nn.Module = model
    if given.parallel == "ddp":
        parallel = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device.type, (count,))
        for block in model.stack:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    checkpoints = Checkpoints(Path(given.resume or "") / given.parallel / gradient, model, optimizer)
    begin = checkpoints.load() if given.resume else 0

    def loss(step: int) -> Tensor:
        torch.manual_seed(given.seed + step)
        return parallel(windows(characters, given.rows, given.length + 1).chunk(count)[rank])

    losses, times = [], []
    for step in range(begin, given.steps):
        start = time.perf_counter()
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        mean = value.detach() / count
        distributed.all_reduce(mean)
        losses.append(mean.item())
        times.append(time.perf_counter() - start)
        if given.resume and (step + 1) % given.every == 0:
            checkpoints.save(step + 1)
    weights = sum(local(parameter).nbytes for parameter in model.parameters())
    held = held_bytes(model, lambda: loss(0))
    shown = [f"{begin}", f"{losses[-1]:.4f}" if losses else "-", mib(weights), mib(held)]
    if device.type == "cuda":
        shown.append(mib(torch.cuda.max_memory_allocated()))
        torch.cuda.reset_peak_memory_stats()
    return [*shown, f"{1000 * statistics.median(times):.0f}" if times else "-"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="fsdp")
    parser.add_argument("--resume", metavar="FOLDER", help="of checkpoints, to go on with and to be kept")
    parser.add_argument("--plain", action="store_true", help="train by backprop, too")


def main() -> None:
    given = options(__doc__, quick=QUICK, usual=USUAL, full=FULL, add=add_flags)
    on_cuda = given.device.startswith("cuda")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_cuda else "gloo")
    if given.rows % distributed.get_world_size():
        raise SystemExit(f"--rows must be a multiple of the {distributed.get_world_size()} processes")
    ways = {"plain": "backprop", "stack": "adjoint"} if given.plain else {"stack": "adjoint"}
    rows = [[f"{way}, {given.parallel}", *trained(given, gradient, device)] for way, gradient in ways.items()]
    if distributed.get_rank() == 0:
        memory = ["MiB of weights", "MiB held", *(["MiB at most"] if on_cuda else [])]
        print(f"each of {distributed.get_world_size()} processes:")
        print(table(["", "from step", "last loss", *memory, "ms a step"], rows))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
