"""Images to train on: scikit-learn's digits, or CIFAR-10 and ImageNet from folders that are there already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..command_line import CommandError
from ..sections import digits

Batch = tuple[Tensor, Tensor]
CIFAR10_MEAN, CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADERS = 8
"""Processes that read ImageNet's files."""


class Images(Protocol):
    channels: int
    classes: int

    def training(self, rows: int, seed: int) -> Iterator[Batch]:
        """An epoch in random order, in whole batches."""

    def testing(self, rows: int) -> Iterator[Batch]:
        """All that is held out."""


@dataclass(frozen=True)
class Source:
    """A data set by name, and the folder that it lies in."""

    name: str = "digits"
    folder: str | None = None

    def load(self) -> Images:
        """Open it.

        Raises:
            CommandError: if torchvision or the files are not there.
        """
        if self.name == "digits":
            data = digits.load(torch.device("cpu"))
            return InMemory((data.train_images, data.train_labels), (data.test_images, data.test_labels))
        try:
            import torchvision.datasets  # noqa: F401
        except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
            raise CommandError(
                f"bench.paper: --{self.name} needs torchvision, which cannot be imported; install the one that belongs "
                f"to torch {torch.__version__}: {error}"
            ) from error
        try:
            return _cifar10(self.folder) if self.name == "cifar10" else ImageFolders(self.folder)
        except (OSError, RuntimeError) as error:  # torchvision's for files that are missing or not whole
            reason = str(error).partition("\n")[0]
            raise CommandError(
                f"bench.paper: --{self.name} must be a folder with the data set, got {self.folder}; nothing is "
                f"downloaded: {reason}"
            ) from error


class InMemory:
    """A data set small enough to be held in memory, [rows, channels, side, side].

    Args:
        augment: shift training images by up to four pixels and mirror half of them, as is usual for CIFAR-10.
    """

    def __init__(self, train: Batch, test: Batch, augment: bool = False) -> None:
        self._train, self._test, self._augment = train, test, augment
        self.channels, self.classes = train[0].shape[1], int(train[1].max()) + 1

    def training(self, rows: int, seed: int) -> Iterator[Batch]:
        images, labels = self._train
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(rows)[: len(labels) // rows]:
            batch = images[chosen]
            yield _shifted(batch, generator) if self._augment else batch, labels[chosen]

    def testing(self, rows: int) -> Iterator[Batch]:
        yield from zip(self._test[0].split(rows), self._test[1].split(rows), strict=True)


class ImageFolders:
    """ImageNet's train and val, read as they are needed."""

    channels = 3

    def __init__(self, folder: str | None) -> None:
        from torchvision import datasets, transforms

        normal = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)]
        train = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *normal]
        test = [transforms.Resize(256), transforms.CenterCrop(224), *normal]
        self._train, self._test = (
            datasets.ImageFolder(str(Path(folder or "") / part), transforms.Compose(steps))
            for part, steps in (("train", train), ("val", test))
        )
        self.classes = len(self._train.classes)

    def training(self, rows: int, seed: int) -> Iterator[Batch]:
        return self._batches(self._train, rows, torch.Generator().manual_seed(seed))

    def testing(self, rows: int) -> Iterator[Batch]:
        return self._batches(self._test, rows, None)

    @staticmethod
    def _batches(data: Any, rows: int, generator: torch.Generator | None) -> Iterator[Batch]:
        shuffled = generator is not None
        return iter(
            torch.utils.data.DataLoader(
                data, rows, shuffle=shuffled, drop_last=shuffled, generator=generator, num_workers=LOADERS
            )
        )


def _cifar10(folder: str | None) -> Images:
    from torchvision.datasets import CIFAR10

    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CIFAR10_MEAN, CIFAR10_DEVIATION))

    def part(train: bool) -> Batch:
        data = CIFAR10(folder, train=train, download=False)
        images = torch.from_numpy(data.data).movedim(-1, 1).float() / 255
        return (images - mean) / deviation, torch.tensor(data.targets)

    return InMemory(part(True), part(False), augment=True)


def _shifted(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    rows, _, side, _ = images.shape
    padded = F.pad(images, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, rows), generator=generator).tolist()
    mirrored = torch.randint(0, 2, (rows,), generator=generator).tolist()
    moved = [image[:, i : i + side, j : j + side] for image, i, j in zip(padded, down, right, strict=True)]
    return torch.stack([image.flip(-1) if flip else image for image, flip in zip(moved, mirrored, strict=True)])
