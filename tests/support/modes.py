"""The ways of getting gradients that are tested on several ranks: options of `ResidualStack`."""

from resode_cuda import Reverse
from tests.support.exact import CONVERGED

MODES = {
    "corrected": {"reverse": "corrected"},
    "extrapolated": {"reverse": "extrapolated"},
    "accelerated": {"reverse": Reverse("extrapolate", corrections=3, accelerate=True)},
    "exact": {"reverse": CONVERGED},
    "stored": {"reverse": "stored"},
    "rounded": {"reverse": Reverse("stored", bits=4, rounded_forward=True)},
    "anchors": {"anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
    "backprop": {"gradient": "backprop"},
}
EXACTLY = "exact", "anchors", "checkpoint", "backprop"
"""Those whose gradients are autograd's to rounding."""
