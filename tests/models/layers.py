"""A small model whose own loop calls its layers, one after the other."""

from torch import nn

DIM = 12


class Layer(nn.Module):
    """x + f(norm(x)), as the layers of most models are."""

    def __init__(self, dim=DIM, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.body = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Tanh(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale=None):
        f = self.dropout(self.body(self.norm(x)))
        return x + (f if scale is None else f * scale)


class Model(nn.Module):
    """Embedding, layers, head; `loop(layers, x)` calls the layers."""

    def __init__(self, count=5, dim=DIM, dropout=0.0, loop=None, layer=Layer):
        super().__init__()
        self.embedding = nn.Linear(8, dim)
        self.layers = nn.ModuleList(layer(dim, dropout) for _ in range(count))
        self.head = nn.Linear(dim, 3)
        self.loop = one_by_one if loop is None else loop

    def forward(self, x):
        return self.head(self.loop(self.layers, self.embedding(x)))


def one_by_one(layers, x):
    for layer in layers:
        x = layer(x)
    return x
