"""Sparse parity: x uniform in {-1, +1}^d, y the product of the k coordinates of a support.

The two-layer network and the settings are those of arXiv:2410.05464 and arXiv:2503.17494. Bits are stored as 0 and 1
(`input_ids`, 1 meaning +1), so that the same data feeds transformers. Shapes: B batch, G replicas, d input bits."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from tutelage.core.errors import UserError

Support = Sequence[int] | None
_SPARSITY = 0.1  # fraction of a sparse example's bits that are -1
_CHUNK = 4096
_FIT_EXAMPLES = 20_000  # for the least-squares fit of a planted teacher


def check_parity(d: int, k: int, support: Sequence[int] | None = None) -> tuple[int, ...]:
    """The support of a (d, k) parity (default: the first k coordinates); UserError for k outside 1..d, and for a support that
    is out of range, repeated, or not of k coordinates."""
    if d < 1:
        raise UserError(f"a parity needs at least one bit, got d={d}")
    if not 1 <= k <= d:
        why = " (with k=0 the label is constant)" if k == 0 else ""
        raise UserError(f"a parity needs k from 1 to d={d} support coordinates, got k={k}{why}")
    if support is None:
        return tuple(range(k))
    if len(support) != k or len(set(support)) != k:
        raise UserError(f"the support {list(support)} is not k={k} different coordinates")
    if min(support) < 0 or max(support) >= d:
        raise UserError(f"the support {list(support)} is out of range: coordinates are 0 to {d - 1}")
    return tuple(support)


class ParityData(Dataset[dict[str, torch.Tensor]]):
    """Examples of a parity, made on access and reproducible by (seed, index).

    Args:
        d, k, support: the parity; see `check_parity`.
        count: number of examples.
        seed: one seed gives rows `input_ids` (d,) and `labels` (); several give rows (G, d) and (G,), one stream per replica
            that depends only on its own seed.
        sparse_until: example i is sparse (each bit -1 with probability 0.1, else +1) with probability
            (1 - i / sparse_until) / 2; later examples are uniform. With this curriculum over inputs networks learn parities
            that they do not learn from uniform inputs alone (arXiv:2306.16921). 0: all examples are uniform."""

    def __init__(
        self, d: int, k: int, count: int, seed: int | Sequence[int] = 0, support: Support = None, sparse_until: int = 0
    ):
        self.support = check_parity(d, k, support)
        self.d, self.count, self.seed, self.sparse_until = d, count, seed, sparse_until
        self._chunk = functools.lru_cache(maxsize=2)(self._make_chunk)

    def __len__(self) -> int:
        return self.count

    @property
    def longest(self) -> int:
        return self.d

    def _make_chunk(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = [self.seed] if isinstance(self.seed, int) else list(self.seed)
        # the counter-based Philox generator has a separate stream for each (seed, chunk)
        streams = [np.random.Generator(np.random.Philox(key=[seed, number])) for seed in seeds]
        packed = [np.frombuffer(stream.bytes(_CHUNK * math.ceil(self.d / 8)), dtype=np.uint8) for stream in streams]
        bits = np.stack([np.unpackbits(raw.reshape(_CHUNK, -1), axis=1, count=self.d) for raw in packed], axis=1)
        index_N = number * _CHUNK + np.arange(_CHUNK)
        if index_N[0] < self.sparse_until:
            fraction_N = (1 - index_N / self.sparse_until).clip(0) / 2
            for replica, stream in enumerate(streams):
                sparse_N = stream.random(_CHUNK) < fraction_N
                bits[sparse_N, replica] = stream.random((sparse_N.sum(), self.d)) >= _SPARSITY
        zeros = len(self.support) - bits[..., list(self.support)].sum(-1, dtype=np.int64)
        ids, labels = torch.from_numpy(bits).long(), torch.from_numpy(1 - zeros % 2)
        return (ids[:, 0], labels[:, 0]) if isinstance(self.seed, int) else (ids, labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        ids, labels = self._chunk(index // _CHUNK)
        return {"input_ids": ids[index % _CHUNK], "labels": labels[index % _CHUNK]}

    def arrays(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All examples at once: bits (N, [G,] d) and labels (N, [G])."""
        chunks = [self._make_chunk(number) for number in range(math.ceil(self.count / _CHUNK))]
        ids, labels = (torch.cat(parts)[: self.count] for parts in zip(*chunks, strict=True))
        return ids, labels

    def __reduce__(self) -> Any:
        return ParityData, (self.d, len(self.support), self.count, self.seed, self.support, self.sparse_until)


class ReplicatedLinear(nn.Module):
    """G independent linear maps as one batched product, (B, G, in) -> (B, G, out), with the distribution of `nn.Linear`.
    There is one seed per replica; `index` is the number of the layer, so that layers with the same seed have different
    weights."""

    def __init__(self, seeds: Sequence[int], in_features: int, out_features: int, index: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(in_features)
        weights, biases = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 * seed + index)
            weights.append(torch.empty(in_features, out_features).uniform_(-bound, bound, generator=generator))
            biases.append(torch.empty(out_features).uniform_(-bound, bound, generator=generator))
        self.weight = nn.Parameter(torch.stack(weights))  # (G, in, out)
        self.bias = nn.Parameter(torch.stack(biases))  # (G, out)

    def forward(self, x_BGI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], x_BGI.transpose(0, 1), self.weight).transpose(0, 1)


class ParityMLPConfig(PreTrainedConfig):
    model_type = "parity_mlp"

    def __init__(self, d: int = 50, hidden_size: int = 100, replica_seeds: Sequence[int] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.d, self.hidden_size = d, hidden_size
        self.replica_seeds = None if replica_seeds is None else list(replica_seeds)
        self.num_hidden_layers = 2


class ParityMLP(PreTrainedModel):
    """x -> W x + b -> ReLU -> 2 logits; block 1 is the linear map ("pre"), block 2 the ReLU ("post").

    With `replica_seeds` it has G independent networks: inputs (B, G, d), logits (B, G, 2). With a loss that is summed over
    replicas, each network has the gradients that it would have alone."""

    config_class = ParityMLPConfig
    config: ParityMLPConfig
    main_input_name = "input_ids"

    def __init__(self, config: ParityMLPConfig):
        super().__init__(config)
        first: nn.Module
        if config.replica_seeds is None:
            first, self.head = nn.Linear(config.d, config.hidden_size), nn.Linear(config.hidden_size, 2)
        else:
            first = ReplicatedLinear(config.replica_seeds, config.d, config.hidden_size, 0)
            self.head = ReplicatedLinear(config.replica_seeds, config.hidden_size, 2, 1)  # type: ignore[assignment]
        self.blocks = nn.ModuleList([first, nn.ReLU()])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the layers initialise their own weights, by seed."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits, (..., 2), of bits (..., d)."""
        hidden = input_ids.to(self.head.weight.dtype) * 2 - 1
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


AutoConfig.register(ParityMLPConfig.model_type, ParityMLPConfig)
AutoModel.register(ParityMLPConfig, ParityMLP)


@torch.no_grad()
def planted_teacher(
    d: int,
    k: int,
    width: int = 2000,
    *,
    support: Sequence[int] | None = None,
    noise: float = 0.02,
    confidence: float = 5.0,
    seed: int = 0,
) -> ParityMLP:
    """A two-layer network that computes a parity by construction, for parities that are too hard to train.

    The weights of the first layer are ±1/2 on the support and N(0, `noise`^2) elsewhere, its biases uniform on [-k/2, k/2].
    The second layer is the ridge least-squares fit of the label (±1) on random examples, scaled to logits of ±`confidence`."""
    data = ParityData(d, k, _FIT_EXAMPLES, seed=seed + 1_000_003, support=support)
    generator = torch.Generator().manual_seed(seed)
    weight = noise * torch.randn(width, d, generator=generator)
    signs = torch.randint(0, 2, (width, k), generator=generator).float() * 2 - 1
    weight[:, list(data.support)] = signs / 2
    model = ParityMLP(ParityMLPConfig(d, width))
    first: Any = model.blocks[0]
    first.weight.copy_(weight)
    first.bias.copy_((torch.rand(width, generator=generator) - 0.5) * k)
    ids, labels = data.arrays()
    hidden = torch.relu(first(ids.float() * 2 - 1))
    features = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    gram = (features.T @ features / _FIT_EXAMPLES).double()
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, features.double().T @ (labels.double() * 2 - 1) / _FIT_EXAMPLES)
    row = (confidence * solution).float()
    model.head.weight.copy_(torch.stack([-row[:-1], row[:-1]]))
    model.head.bias.copy_(torch.stack([-row[-1], row[-1]]))
    return model.eval()
