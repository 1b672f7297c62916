"""Hidden states of a sequence → one vector. Knows no backbone and no task.

Each pooling is an nn.Module: forward(hidden (R, T, H), batch) → (R, width); `width` is known before the first forward.
`batch` carries attention_mask (R, T) and segment (R, T): 0 text, 1 pair, -1 special or padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


class MeanPooling(nn.Module):
    """Mean over the tokens that are not padding."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = hidden_size

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return _mean(hidden, batch["attention_mask"])


class FirstPooling(nn.Module):
    """The first token, [CLS] in BERT-like models."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = hidden_size

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        return hidden[:, 0]


class MaxPooling(nn.Module):
    """Largest value of each hidden unit over the tokens that are not padding."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = hidden_size

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        padding = batch["attention_mask"].unsqueeze(-1) == 0
        return hidden.masked_fill(padding, torch.finfo(hidden.dtype).min).amax(1)


class AttentionPooling(nn.Module):
    """Mean weighted by a learned score per token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = hidden_size
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
        score = self.score(hidden).squeeze(-1).float()  # (R, T)
        weight = score.masked_fill(batch["attention_mask"] == 0, -torch.inf).softmax(-1)
        return torch.einsum("rt,rth->rh", weight.to(hidden.dtype), hidden)


class MatchPooling(nn.Module):
    """How well the pair is covered by the text, for backbones whose hidden states are comparable by cosine.

    Gives [m, u * v, |u - v|]: m the mean over the pair's tokens of the largest cosine with a text token (late interaction, Khattab &
    Zaharia 2020), weighted by a learned score that begins even; u and v the unit mean vectors of text and pair (InferSent's features,
    Conneau et al. 2017). With `init_head` a sentence encoder starts at the accuracy of its similarity instead of at chance. Without
    text or pair all features are 0.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = 1 + 2 * hidden_size
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(R, T, H) → (R, width)."""
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

POOLINGS: dict[str, type[nn.Module]] = {
    "mean": MeanPooling,
    "cls": FirstPooling,
    "max": MaxPooling,
    "attention": AttentionPooling,
    "match": MatchPooling,
}


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(R, T, H), (R, T) → (R, H): the mean where mask is not 0; zeros where it is nowhere."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
