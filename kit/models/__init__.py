"""What a model is. Knows no task, metric, fold or recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kit.tasks import Tokens

MODELS = {
    "bidaf": "kit.models.recurrent:BiDAF",
    "causal": "kit.models.causal:Causal",
    "encoder": "kit.models.encoder:Encoder",
    "frozen": "kit.models.frozen:Frozen",
    "lstm": "kit.models.recurrent:LSTM",
    "rules": "kit.models.rules:Rules",
    "seq2seq": "kit.models.seq2seq:Seq2Seq",
    "zero_shot": "kit.models.zero_shot:ZeroShot",
}


class Model(Protocol):
    """An nn.Module. gives: one of the words of kit.tasks.Task.needs.

    One that is never trained has `create`, `load`, `tokens`, `forward` and `save` only; one that is fitted at once has these and
    `fit_at_once(batches, targets)`: collated batches, and what `forward` should give for their rows (R, outputs), in that order. One whose settings
    name files besides its backbone has `beside(options, source)`, a class method: those that `create` reads, or with source None those that `invent` does.
    One whose word embeddings get gradients only where a batch reads them has `rows_read(batch)`: these rows (K,), each once.
    """

    gives: str

    @classmethod
    def invent(cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, **options: Any) -> None:
        """Write a backbone with random weights, and a tokenizer trained on the texts, for `create` to start from."""
        ...

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Self:
        """A model on the backbone of a folder, the rest new. Raises BundleError, ConfigError."""
        ...

    @classmethod
    def load(cls, folder: Path, *, outputs: int, **options: Any) -> Self:
        """The model that `save` wrote; one that wrote an adapter only takes the folder of the weights it belongs to as `base`. Raises BundleError."""
        ...

    @classmethod
    def tokens(cls, folder: Path) -> Tokens:
        """The tokens of a backbone's folder, or of one that holds a saved model."""
        ...

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The output for a collated batch, e.g. (R, outputs) for "row"."""
        ...

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """All parameters, bottom → top, each exactly once: [embeddings, layer 1, …, layer L, pooling and head]; the last may be empty (tied words)."""
        ...

    @property
    def input_embeddings(self) -> nn.Parameter:
        """The (V, H) table that adversarial training perturbs."""
        ...

    def checkpoint_activations(self) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        ...

    def reinit_layers(self, count: int) -> None:
        """Draw the weights of the top `count` layers anew, as their library initialises them."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load` needs: configuration and safetensors. The tokens save themselves beside it."""
        ...
