"""What a language model says at the places that a batch of trees asks for: the vocabulary's log-probabilities, or a new linear head.

Owns what decoders (kit.models.causal) and encoder-decoders (kit.models.seq2seq) share; where their states come from is theirs. The vocabulary
is looked at only where it is asked for, through the library's own forward. Knows no task and no prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPast

from kit.errors import ConfigError
from kit.models.encoder import layer_groups, layers_of, reinit_layers

Batch = dict[str, Tensor]
_LOGITS = 1 << 26  # numbers of the logits that exist at one time: 256 MB in float32
_AT_ONCE = 1 << 19  # of these, so many are looked at together: what they become on the way stays in a processor's cache


class LanguageModel(nn.Module, ABC):
    """States → log-probabilities (M,) of the tokens a batch asks for, or a linear head on the states (M, outputs) at those places.

    head: "words", the vocabulary's own, or "score", a new one. others: "score" sees the mean of its row's other states beside each.
    """

    words: ClassVar[str]
    """What a model with the vocabulary's head gives, as in kit.tasks.Task.needs."""
    backbone: Any

    def __init__(self, backbone: Callable[[], Any], config: PretrainedConfig, *, outputs: int, head: str, others: bool, dropout: float) -> None:
        super().__init__()
        if head not in ("words", "score"):
            raise ConfigError(f'model.head = {head!r} is unknown: "words" (log-probabilities of tokens) or "score" (a new linear head)')
        if others and head == "words":
            raise ConfigError('model.others = true, but model.head = "words" has no place for them: set model.head = "score"')
        self.has_words = head == "words"
        self.gives = self.words if self.has_words else "place"
        self.others = others
        self.backbone = backbone()
        self.dropout = nn.Dropout(dropout)
        if head == "score":
            self.head = nn.Linear(config.hidden_size * (1 + others), outputs)
            nn.init.normal_(self.head.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(self.head.bias)

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """What gives the states, without the vocabulary's head."""

    @property
    @abstractmethod
    def stacks(self) -> list[nn.Module]:
        """What has the layers, bottom → top."""

    @abstractmethod
    def states(self, batch: Batch) -> Tensor:
        """The decoder's states (M, H) at the places that are asked for."""

    @abstractmethod
    def run(self, ids: Tensor, states: Tensor) -> Any:
        """The library's forward on ids (1, M), whose decoder stands still and gives states (M, H)."""

    def forward(self, batch: Batch) -> Tensor:
        """A batch of trees → (M,) or (M, outputs), float32; see kit.models.prefix and the class."""
        states = self.states(batch)
        if self.has_words:
            return self._log_probabilities(states, batch["token"])
        if self.others:
            states = torch.cat([states, _mean_of_others(states, batch["at"] // batch["branch"].shape[1], len(batch["branch"]))], -1)
        return self.head(self.dropout(states).to(self.head.weight.dtype)).float()

    @property
    def input_embeddings(self) -> nn.Parameter:
        """The word embeddings (V, H)."""
        return self.backbone.get_input_embeddings().weight

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """[embeddings and all else outside the layers, layer 1 … L, head]: the vocabulary's head is in the first group where it is tied."""
        return layer_groups(self, self.stacks)

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model. Raises ConfigError where there are fewer layers."""
        reinit_layers(self.backbone, [layer for stack in self.stacks for layer in layers_of(stack)], count)

    def _log_probabilities(self, states: Tensor, token: Tensor) -> Tensor:
        """(M, H) and (M,) → (M,), a part of the vocabulary's logits (M, V) at a time; those of a part are computed again in the backward pass."""
        step = max(1, _LOGITS // self.backbone.config.get_text_config().vocab_size)
        parts = []
        for begin in range(0, len(states), step):
            part = states[begin : begin + step], token[begin : begin + step]
            several = torch.is_grad_enabled() and len(states) > step  # all logits at once would take the memory
            parts.append(checkpoint(self._of_part, *part, use_reentrant=False) if several else self._of_part(*part))
        return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)

    def _of_part(self, states: Tensor, token: Tensor) -> Tensor:
        with _gives(self.decoder, states):
            logits = self.run(torch.zeros(1, len(states), dtype=torch.long, device=states.device), states).logits.flatten(0, 1).float()
        return cast(Tensor, _LogProbabilities.apply(logits, token))


class _LogProbabilities(torch.autograd.Function):
    """Of a token (M,) by logits (M, V) in float32. Nothing of the logits' size is made: the backward pass writes their gradient over them.

    So nobody else may need them, and a second backward pass through the same graph raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: Tensor) -> Tensor:
        total = torch.cat([part.logsumexp(-1) for part in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, token, total)
        return logits.gather(-1, token[:, None])[:, 0] - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, token, total = ctx.saved_tensors
        logits, rows = logits.detach(), _rows_at_once(logits)
        for part, normaliser, factor in zip(logits.split(rows), total[:, None].split(rows), (-gradient)[:, None].split(rows), strict=True):
            part.sub_(normaliser).exp_().mul_(factor)
        return logits.scatter_add_(-1, token[:, None], gradient[:, None]), None


def _rows_at_once(logits: Tensor) -> int:
    return len(logits) if logits.is_cuda else max(1, _AT_ONCE // logits.shape[1])  # a GPU would wait for each of many small kernels


@dataclass
class _States(BaseModelOutputWithPast):
    """A decoder's output that has its states and nothing else that a head might look for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _gives(decoder: nn.Module, states: Tensor) -> Iterator[None]:
    """Inside, the decoder gives these states (M, H) whatever it reads: so a language model's own forward turns them into logits, caps and scales included."""
    kept = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: _States(last_hidden_state=states[None])
    try:
        yield
    finally:
        del decoder.forward
        if kept is not None:
            decoder.forward = kept


def fused(backbone: Any) -> Any:
    """The backbone, whose activations as GPT-2 has them, eight passes over their numbers, are one: the same function, equal to rounding."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return backbone


def _mean_of_others(states: Tensor, owner: Tensor, rows: int) -> Tensor:
    """For each state (M, H) the mean of the others of the same owner (M,), one of `rows`; zeros for one that is alone."""
    total = states.new_zeros(rows, states.shape[-1]).index_add(0, owner, states)
    count = states.new_zeros(rows).index_add(0, owner, states.new_ones(len(states)))
    return (total[owner] - states) / (count[owner] - 1).clamp(min=1)[:, None]
