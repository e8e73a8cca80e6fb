"""What an evaluation depends on around its block: torch's settings, attributes, the numbers of Python and NumPy."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.backends import mha

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import block_count, mlp, relative_error
from tests.support.stateful import plain_twin, train_step

pytestmark = [
    pytest.mark.usefixtures("float64", "settings"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

MODES = {
    "adjoint": {"reverse": EXACT},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
}
every_mode = pytest.mark.parametrize("mode", MODES)
STEPS = 4


@pytest.fixture
def settings():
    """Settings that a test may change without care."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    mode, autocast = torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.set_autocast_enabled("cpu", autocast)


def assert_like_the_plain_loop(blocks, scheme, mode, x, between=lambda module: None, read=lambda module: None):
    """Two training steps: their gradients, and what is found afterwards.

    Args:
        between: changes something between forward and backward.
        read: what there is to be found.
    """
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    start = random.getstate(), np.random.get_state()
    for seed in (3, 4):
        found = []
        for module, forward in ((twin, run), (stack, stack)):
            random.setstate(start[0])
            np.random.set_state(start[1])
            got = train_step(forward, module, x, seed=seed, between=lambda module=module: between(module))
            found.append((got, read(module)))
        (exact, expected), (got, after) = found
        assert relative_error(got, exact) < 1e-10
        assert after == expected


SETTINGS = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float32), torch.get_default_dtype),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "warn only": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.is_deterministic_algorithms_warn_only_enabled,
    ),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "autocast dtype": (
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
        lambda: torch.get_autocast_dtype("cpu"),
    ),
}


class Asking(nn.Module):
    """Is another function where a setting of torch is another one than at first."""

    def __init__(self, read):
        super().__init__()
        self.body = mlp()
        self.answer = [read, read()]

    def forward(self, x):
        read, first = self.answer
        return self.body(x) if read() == first else -self.body(x).tanh()


@every_mode
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_torch_are_those_of_the_forward_pass(scheme, mode, setting):
    change, read = SETTINGS[setting]
    before, x = read(), torch.randn(5, 6)
    blocks = [Asking(read) for _ in range(block_count(scheme, STEPS))]
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    exact = train_step(run, twin, x)
    got = train_step(stack, stack, x, between=change)
    assert relative_error(got, exact) < 1e-10
    assert read() != before
    torch.set_autocast_dtype("cpu", torch.bfloat16)


class Mixed(nn.Module):
    """Depends on attributes of every plain kind, some of them its submodules'."""

    def __init__(self):
        super().__init__()
        self.body, self.dropout = mlp(), nn.Dropout(0.5)
        self.scale, self.kind, self.is_negative, self.bias, self.bounds = 0.7, "tanh", False, None, (-0.6, 0.6)

    def forward(self, x):
        out = getattr(self.body(x), self.kind)() * self.scale
        out = -out if self.is_negative else out
        out = out if self.bias is None else out + self.bias
        out = self.dropout(out).clamp(*self.bounds)
        return out if not hasattr(self, "late") else out * self.late


CHANGES = {
    "p": lambda block: setattr(block.dropout, "p", 0.1),
    "number": lambda block: setattr(block, "scale", -2.0),
    "string": lambda block: setattr(block, "kind", "sin"),
    "bool": lambda block: setattr(block, "is_negative", True),
    "None": lambda block: setattr(block, "bias", 0.3),
    "tuple": lambda block: setattr(block, "bounds", (-3.0, 3.0)),
    "new": lambda block: setattr(block, "late", 0.5),
}


def plain_attributes(module):
    names = ("scale", "kind", "is_negative", "bias", "bounds", "late")
    return [(block.dropout.p, *(getattr(block, name, "missing") for name in names)) for block in module.children()]


@every_mode
@pytest.mark.parametrize("change", CHANGES)
def test_attributes_of_modules_are_those_of_the_forward_pass(scheme, mode, change):
    blocks = [Mixed() for _ in range(block_count(scheme, STEPS))]

    def between(module):
        for block in module.children():
            CHANGES[change](block)

    assert_like_the_plain_loop(blocks, scheme, mode, torch.randn(5, 6), between, plain_attributes)
    assert plain_attributes(nn.ModuleList(blocks)) != plain_attributes(nn.ModuleList([Mixed()] * len(blocks)))


class Counting(nn.Module):
    """Counts its calls in a number, a list, a dict, a set and a deque."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.calls, self.seen, self.table, self.kinds, self.latest = 0, [], {"calls": 0}, set(), deque(maxlen=3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.table["calls"] += 2
        self.kinds.add(self.calls)
        self.latest.append(self.calls)
        count = self.calls + len(self.seen) + self.table["calls"] + len(self.kinds) + sum(self.latest)
        return self.body(x) * torch.tensor(float(count)).cos()


@every_mode
def test_counters_and_lists_on_modules_count_once(scheme, mode):
    blocks = [Counting() for _ in range(block_count(scheme, STEPS))]
    assert_like_the_plain_loop(
        blocks,
        scheme,
        mode,
        torch.randn(5, 6),
        read=lambda module: [(b.calls, b.seen, b.table, b.kinds, b.latest) for b in module.children()],
    )


@every_mode
def test_lists_on_modules_that_change_in_between_are_left_as_they_were_changed(scheme, mode):
    blocks = [Counting() for _ in range(block_count(scheme, STEPS))]
    assert_like_the_plain_loop(
        blocks,
        scheme,
        mode,
        torch.randn(5, 6),
        between=lambda module: [block.seen.clear() for block in module.children()],
        read=lambda module: [block.seen for block in module.children()],
    )
    assert [block.seen for block in blocks] == [[]] * len(blocks)


class Drawing(nn.Module):
    """Draws a factor from a generator that is not torch's."""

    def __init__(self, draw):
        super().__init__()
        self.body = mlp()
        self.draw = [draw]

    def forward(self, x):
        return self.body(x) * float(self.draw[0]())


DRAWS = {
    "random.random": lambda: random.random(),
    "random.gauss": lambda: random.gauss(1, 1),
    "random.sample": lambda: random.sample(range(9), 3)[0] / 9,
    "numpy.rand": lambda: np.random.rand(),
    "numpy.randn": lambda: np.random.randn(),
    "numpy.permutation": lambda: np.random.permutation(9)[0] / 9,
    "one after the other": lambda: np.random.randn() + random.gauss(0, 1) + torch.randn(()).item(),
}


def generator_states(module):
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, words.tolist(), *rest), torch.get_rng_state().tolist()


@every_mode
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("has_spare", [False, True], ids=["fresh", "with a spare number"])
def test_random_numbers_of_python_and_numpy_are_replayed(scheme, mode, draw, has_spare):
    random.seed(1)
    np.random.seed(1)
    if has_spare:
        random.gauss(0, 1)
        np.random.randn()
    blocks = [Drawing(DRAWS[draw]) for _ in range(block_count(scheme, STEPS))]

    def between(module):
        random.gauss(0, 1)
        np.random.randn(3)

    assert_like_the_plain_loop(blocks, scheme, mode, torch.randn(5, 6), between, generator_states)


class Masked(nn.Module):
    """An encoder that knows which entries are padding, a part of its output and all of its input's shape."""

    def __init__(self, depth):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth) if depth else layer
        self.register_buffer("padding", torch.tensor([[False] * 4, [False, False, True, True], [False] * 4]))

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=self.padding)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


ENCODERS = {"encoder": lambda: Masked(2), "layer": lambda: Masked(0), "attention": Attending}


@every_mode
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dropouts", ["off", "on"])
def test_attention_in_eval_mode_is_the_function_that_has_gradients(scheme, mode, kind, dropouts):
    """Torch's fast path would leave dropouts out that alone are in train mode, as for Monte-Carlo dropout."""
    blocks = nn.ModuleList([ENCODERS[kind]() for _ in range(block_count(scheme, STEPS))]).eval()
    for module in blocks.modules():
        if isinstance(module, nn.Dropout):
            module.train(dropouts == "on")
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    x = torch.randn(3, 4, 6)
    torch.manual_seed(5)
    out = run(x)
    for is_recorded in (True, False):
        torch.manual_seed(5)
        with torch.set_grad_enabled(is_recorded):
            assert torch.equal(stack(x), out)
    assert relative_error(train_step(stack, stack, x), train_step(run, twin, x)) < 1e-9
    assert mha.get_fastpath_enabled()


@every_mode
def test_a_fast_path_that_the_program_has_turned_off_stays_off(scheme, mode):
    blocks = nn.ModuleList([Masked(1) for _ in range(block_count(scheme, STEPS))]).eval()
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    mha.set_fastpath_enabled(False)
    try:
        train_step(stack, stack, torch.randn(3, 4, 6))
        assert not mha.get_fastpath_enabled()
    finally:
        mha.set_fastpath_enabled(True)
