"""Hidden states of a sequence → one vector. Knows no backbone and no task.

Each pooling is an nn.Module: forward(states, batch) → (R, width); `width` is known before the first forward. states: the hidden states
(R, T, H) of the embeddings and of each of the L layers, bottom → top; one that `needs_layers` is false for may be given the last alone,
one that `needs_first` is true for the first token's alone (R, 1, H).
`batch` carries attention_mask (R, T) and segment (R, T): 0 text, 1 pair, -1 special or padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.errors import ConfigError

Batch = dict[str, Tensor]
_CONCATENATED = 4
_LEAST = 1e-6  # of a value that is raised to a power


class Pooling(nn.Module):
    """What all have: a width, by default that of the hidden states. layers: L."""

    needs_layers = False
    needs_first = False

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__()
        self.width = hidden_size


class MeanPooling(Pooling):
    """Mean over the tokens that are not padding."""

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return _mean(states[-1], batch["attention_mask"])


class FirstPooling(Pooling):
    """The first token, [CLS] in BERT-like models."""

    needs_first = True

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return states[-1][:, 0]


class MaxPooling(Pooling):
    """Largest value of each hidden unit over the tokens that are not padding."""

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return _without_padding(states[-1], batch, torch.finfo(states[-1].dtype).min).amax(1)


class MinPooling(Pooling):
    """Smallest value of each hidden unit over the tokens that are not padding."""

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return _without_padding(states[-1], batch, torch.finfo(states[-1].dtype).max).amin(1)


class PowerPooling(Pooling):
    """Generalised mean (GeM, Radenović et al. 2018): the p-th root of the mean of p-th powers over the tokens; p is learned, above 0, and begins at 3.

    Values below 1e-6 count as that. Computed from logarithms, so that no power over- or underflows.
    """

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        self.log_p = nn.Parameter(torch.tensor(3.0).log())

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        p = self.log_p.float().exp()
        logs = _without_padding(states[-1].float().clamp(min=_LEAST).log() * p, batch, -torch.inf)  # (R, T, H)
        count = batch["attention_mask"].sum(1, keepdim=True).float()  # (R, 1)
        return ((logs.logsumexp(1) - count.log()) / p).exp()


class WeightedPooling(Pooling):
    """Mean over the tokens of a mean over embeddings and layers, whose learned weights begin even (ELMo's, Peters et al. 2018)."""

    needs_layers = True

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        self.score = nn.Parameter(torch.zeros(1 + layers))

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """L + 1 states (R, T, H) → (R, width)."""
        return torch.einsum("l,rlh->rh", self.score.float().softmax(-1), _means(states, batch).float())


class LastFourPooling(Pooling):
    """Means over the tokens of the last four layers, side by side (Devlin et al. 2019 fed these to another model)."""

    needs_layers = True

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        if layers < _CONCATENATED:
            raise ConfigError(f'model.pooling = "last4" needs {_CONCATENATED} layers, and the model has {layers}: choose "weighted"')
        self.width = _CONCATENATED * hidden_size

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """L + 1 states (R, T, H) → (R, width)."""
        return _means(states[-_CONCATENATED:], batch).flatten(1)


class LSTMPooling(Pooling):
    """What an LSTM says at the top, which reads the means over the tokens of the layers, bottom → top (after Song et al. 2020, who read [CLS])."""

    needs_layers = True

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        self.reader = nn.LSTM(hidden_size, hidden_size, batch_first=True)

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """L + 1 states (R, T, H) → (R, width)."""
        said, _ = self.reader(_means(states[1:], batch).to(next(self.reader.parameters()).dtype))  # (R, L, H)
        return said[:, -1]


class AttentionPooling(Pooling):
    """Mean weighted by a learned score per token."""

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        hidden = states[-1]
        score = self.score(hidden).squeeze(-1).float()  # (R, T)
        weight = score.masked_fill(batch["attention_mask"] == 0, -torch.inf).softmax(-1)
        return torch.einsum("rt,rth->rh", weight.to(hidden.dtype), hidden)


class MatchPooling(Pooling):
    """How well the pair is covered by the text, for backbones whose hidden states are comparable by cosine.

    Gives [m, u * v, |u - v|]: m the mean over the pair's tokens of the largest cosine with a text token (late interaction, Khattab &
    Zaharia 2020), weighted by a learned score that begins even; u and v the unit mean vectors of text and pair (InferSent's features,
    Conneau et al. 2017). With `init_head` a sentence encoder starts at the accuracy of its similarity instead of at chance. Without
    text or pair all features are 0.
    """

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__(hidden_size, layers)
        self.width = 1 + 2 * hidden_size
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        hidden = states[-1]
        score = self.score(hidden).squeeze(-1).float()  # (R, T)
        hidden = hidden.float()
        text, pair = batch["segment"] == 0, batch["segment"] == 1
        unit = F.normalize(hidden, dim=-1)
        cosine = (unit @ unit.transpose(1, 2)).masked_fill(~text[:, None, :], -1.0).amax(-1)  # (R, T)
        weight = score.masked_fill(~pair, torch.finfo(torch.float32).min).softmax(-1)
        covered = (cosine * weight).sum(-1, keepdim=True)  # (R, 1)
        u, v = F.normalize(_mean(hidden, text), dim=-1), F.normalize(_mean(hidden, pair), dim=-1)
        return torch.cat([covered, u * v, (u - v).abs()], -1) * (text.any(1) & pair.any(1)).unsqueeze(1)

    def init_head(self, head: nn.Linear) -> None:
        """Start the head at the coverage alone, so that the first scores rank options by it."""
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        head.weight.data[:, 0] = _COSINE_SCALE


_COSINE_SCALE = 20.0  # differences between options are about 0.05 in cosine; 20 makes them about 1 before the softmax

POOLINGS: dict[str, type[Pooling]] = {
    "mean": MeanPooling,
    "cls": FirstPooling,
    "max": MaxPooling,
    "min": MinPooling,
    "gem": PowerPooling,
    "attention": AttentionPooling,
    "weighted": WeightedPooling,
    "last4": LastFourPooling,
    "lstm": LSTMPooling,
    "match": MatchPooling,
}


def _without_padding(hidden: Tensor, batch: Batch, value: float) -> Tensor:
    """(R, T, H) with `value` where the tokens are padding."""
    return hidden.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, value)


def _means(states: Sequence[Tensor], batch: Batch) -> Tensor:
    """S states (R, T, H) → (R, S, H): of each the mean over the tokens that are not padding."""
    return torch.stack([_mean(hidden, batch["attention_mask"]) for hidden in states], 1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(R, T, H), (R, T) → (R, H): the mean where mask is not 0; zeros where it is nowhere."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
