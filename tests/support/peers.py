"""Other libraries' models in the tests.

torchvision's compiled operators are not built for a CPU build of torch beside it, and it cannot be imported without
two of them. No test uses these.
"""

import torch

_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


def define_torchvision_operators() -> None:
    """Before torchvision is imported, by a test or by another library."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
