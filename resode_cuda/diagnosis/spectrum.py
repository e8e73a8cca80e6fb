"""The largest eigenvalue of a symmetric map that is known by its products with vectors: Lanczos' method.

For power iteration it would have to stand out from the others, which that of a step close to the identity does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHARE_LEFT = 1e-8
"""What may be left of a product, outside the space that is spanned already, for that space to be invariant."""


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> float:
    """The largest eigenvalue, from below.

    Args:
        product: v -> M v, for a vector of any shape.
        start: where the Krylov space begins; its size does not matter.
        products: how many are made. So many vectors are held.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(products):
        image = product(basis[-1])
        size = image.norm().item()
        diagonal.append(torch.sum(image * basis[-1]).item())
        for v in (*basis, *basis):  # twice, for what rounding leaves of the first time
            image = image - torch.sum(image * v) * v
        left = image.norm().item()
        if len(diagonal) == products or not left > SHARE_LEFT * size:
            break
        beside.append(left)
        basis.append(image / left)
    within = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    within += sum(torch.diag(torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64), k) for k in (-1, 1))
    return float("nan") if within.isnan().any() else torch.linalg.eigvalsh(within)[-1].item()
