"""Recurrent readers: an LSTM with attention to the question, and BiDAF (Seo et al. 2016, "Bidirectional attention flow for machine comprehension").

Both read word tokens (kit.models.words) of a text and a pair, context and question, and say of every token of the context how well an answer
begins and ends there. "[CLS]" counts as the context's first word, so that it can stand for no answer, and the last "[SEP]" as the question's
last, so that neither is ever empty. Rows are cut apart and masked: padding changes nothing. Knows no task.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kit.errors import BundleError, ConfigError, nearest
from kit.models.checkpoint import load_weights, save_weights
from kit.models.words import Vectors, WordTokens, make_vectors, read_vectors, split, table_of, write_words

Batch = dict[str, Tensor]
_CONFIG, _WEIGHTS, _TABLE = "config.json", "model.safetensors", "words.weight"
_NOWHERE = -1e4  # the score of what is not in the context; half precision has it
_LETTER, _SPAN = 8, 5  # numbers of a character; characters that a filter sees
_FILTERS = 100
_SHOWN = 300  # characters of a library's error


@dataclass(frozen=True)
class Sizes:
    """What a model takes from its folder: word ids, numbers of a word's vector, character ids."""

    words: int
    dimension: int
    characters: int


class Part(NamedTuple):
    """The context or the question of every row. ids (R, T), characters (R, T, WIDTH), 0 beyond length (R,); mask (R, T) bool."""

    ids: Tensor
    characters: Tensor
    length: Tensor
    mask: Tensor


class Reader(nn.Module, ABC):
    """What the recurrent readers share: (R, T, 2) scores of a padded batch, from those (R, Tc, 2) that `read` gives of the contexts."""

    gives = "token"
    kind: str

    def __init__(self, sizes: Sizes, *, outputs: int, dropout: float) -> None:
        super().__init__()
        if outputs != 2:
            raise ConfigError(f'model.kind = "{self.kind}" says where an answer begins and ends, 2 numbers a token, not {outputs}: choose another kind')
        self.sizes = sizes
        self.words = nn.Embedding(sizes.words, sizes.dimension, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self._recomputes = False

    @classmethod
    def invent(
        cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any], vocab_size: int = 100_000
    ) -> None:
        """See kit.models.Model: words and their vectors. `config` names the file of `vectors`, relative to where the kit runs, or the `dimension` (50) of
        those that are made from the texts.
        """
        vectors = _vectors(texts, config, limit=vocab_size)
        write_words(vectors.words, texts(), folder)
        table = torch.from_numpy(table_of(vectors, seed=seed))
        save_file({_TABLE: table}, Path(folder) / _WEIGHTS)
        _write_sizes(Sizes(len(table), table.shape[1], WordTokens(folder).characters), Path(folder))

    @classmethod
    def beside(cls, options: Mapping[str, Any], source: Path | None) -> list[Path]:
        """See kit.models.Model: the file of word vectors."""
        named = options.get("config", {}).get("vectors")
        if source or named is None:
            return []
        if not Path(named).is_file():
            raise ConfigError(f"model.config.vectors = {named!r}: no such file: give word vectors as text, or leave it out to make some from the texts")
        return [Path(named)]

    @classmethod
    def create(cls, source: Path, *, outputs: int, **options: Any) -> Self:
        """See kit.models.Model."""
        sizes = read_sizes(source)
        model = cls(sizes, outputs=outputs, **options)
        try:
            with safe_open(Path(source) / _WEIGHTS, framework="pt") as weights:
                table = weights.get_tensor(_TABLE)
            with torch.no_grad():
                model.words.weight.copy_(table)
        except Exception as error:  # safetensors raises unrelated types for damaged files
            why = " ".join(str(error).split())[:_SHOWN]
            raise BundleError(f"{Path(source) / _WEIGHTS}: no vectors of {sizes.words} words ({why}): make the backbone again") from None
        return model

    @classmethod
    def load(cls, folder: Path, *, outputs: int, **options: Any) -> Self:
        """See kit.models.Model."""
        model = cls(read_sizes(folder), outputs=outputs, **options)
        load_weights(model, folder)
        return model

    @classmethod
    def tokens(cls, folder: Path) -> WordTokens:
        """See kit.models.Model."""
        return WordTokens(folder)

    def save(self, folder: Path) -> None:
        """Write config.json and the weights, word vectors included."""
        save_weights(self, folder)
        _write_sizes(self.sizes, Path(folder))

    def forward(self, batch: Batch) -> Tensor:
        """(R, T) ids → (R, T, 2) float32: how well an answer begins and ends at a token; the same low number outside of the context."""
        context, question = parts(batch)
        scores = self.read(context, question).float().masked_fill(~context.mask[..., None], _NOWHERE)
        return F.pad(scores, (0, 0, 0, batch["input_ids"].shape[1] - scores.shape[1]), value=_NOWHERE)

    @abstractmethod
    def read(self, context: Part, question: Part) -> Tensor:
        """Scores (R, Tc, 2) of the context's words; whatever where it is padded."""

    @property
    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """What stands between the word vectors and the head, bottom → top."""

    @property
    def input_embeddings(self) -> nn.Parameter:
        """The word vectors (V, D)."""
        table: Any = self.words.weight
        return table

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """[word vectors, each layer, the rest]."""
        groups = [list(module.parameters()) for module in (self.words, *self.layers)]
        below = {id(parameter) for group in groups for parameter in group}
        return [*groups, [parameter for parameter in self.parameters() if id(parameter) not in below]]

    def checkpoint_activations(self) -> None:
        """See kit.models.Model: a layer keeps what it is given, and nothing of its inside."""
        self._recomputes = True

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model. Raises ConfigError where there are fewer layers."""
        if count > len(self.layers):
            raise ConfigError(f'train.reinit_layers = {count}: model.kind = "{self.kind}" has {len(self.layers)} layers')
        for layer in self.layers[len(self.layers) - count :]:
            modules: list[Any] = [*layer.modules()][::-1]  # a module after its parts, for it may set them otherwise
            for module in modules:
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def _through(self, layer: nn.Module, *given: Tensor) -> Tensor:
        """A layer's output."""
        if self._recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *given, use_reentrant=False)
        return layer(*given)


class LSTM(Reader):
    """Word vectors → LSTM → what each word of the context finds in the question → LSTM → linear."""

    kind = "lstm"

    def __init__(self, sizes: Sizes, *, outputs: int, hidden_size: int = 100, dropout: float = 0.2) -> None:
        super().__init__(sizes, outputs=outputs, dropout=dropout)
        width = 2 * _positive(hidden_size, "hidden_size")
        self.context = States(sizes.dimension, hidden_size, dropout=dropout)
        self.attention = Attention(width)
        self.match = States(3 * width, hidden_size, dropout=dropout)
        self.head = nn.Linear(width, outputs)

    @property
    def layers(self) -> list[nn.Module]:
        """The states of both texts by themselves; the question in the context."""
        return [self.context, nn.ModuleList([self.attention, self.match])]

    def read(self, context: Part, question: Part) -> Tensor:
        """See Reader."""
        h, u = (self._through(self.context, self.words(part.ids), part.length) for part in (context, question))  # (R, Tc, 2H), (R, Tq, 2H)
        found = self._through(self.attention, h, u, question.mask)
        matched = self._through(self.match, torch.cat([h, found, h * found], -1), context.length)
        return self.head(self.dropout(matched))


class BiDAF(Reader):
    """Characters and word vectors → highway → LSTM → attention flow → two LSTMs → where it begins; one more → where it ends."""

    kind = "bidaf"

    def __init__(self, sizes: Sizes, *, outputs: int, hidden_size: int = 100, dropout: float = 0.2) -> None:
        super().__init__(sizes, outputs=outputs, dropout=dropout)
        width = 2 * _positive(hidden_size, "hidden_size")
        self.embed = Embed(sizes, dropout=dropout)
        self.context = States(self.embed.width, hidden_size, dropout=dropout)
        self.flow = AttentionFlow(width)
        self.model = States(4 * width, hidden_size, dropout=dropout, layers=2)
        self.end = States(width, hidden_size, dropout=dropout)
        self.heads = nn.ModuleList([nn.Linear(5 * width, 1) for _ in range(outputs)])

    @property
    def layers(self) -> list[nn.Module]:
        """Embedding of words; states of both texts by themselves; the flow between them and what is made of it."""
        return [self.embed, self.context, nn.ModuleList([self.flow, self.model])]

    def read(self, context: Part, question: Part) -> Tensor:
        """See Reader."""
        h, u = (self._states(part) for part in (context, question))  # (R, Tc, 2H), (R, Tq, 2H)
        g = self._through(self.flow, h, u, context.mask, question.mask)  # (R, Tc, 8H)
        begins = self._through(self.model, g, context.length)
        ends = self._through(self.end, begins, context.length)
        return torch.cat([head(self.dropout(torch.cat([g, m], -1))) for head, m in zip(self.heads, (begins, ends), strict=True)], -1)

    def _states(self, part: Part) -> Tensor:
        """(R, T, 2H) of one text by itself."""
        return self._through(self.context, self._through(self.embed, self.words(part.ids), part.characters), part.length)


# --- layers ----------------------------------------------------------------------------------------------------------------------


class States(nn.Module):
    """Bidirectional LSTM over the words there are: (R, T, D), lengths (R,) → (R, T, 2H), zeros where padded.

    Rows are padded on the right, so what reads ahead meets no padding before it has read the words; what reads back reads each row turned round within its
    length. Exact as packed rows are, whose backward pass takes seven times as long on a CPU.
    """

    def __init__(self, size: int, hidden_size: int, *, dropout: float, layers: int = 1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        sizes = [size, *[2 * hidden_size] * (layers - 1)]
        self.ahead, self.back = (nn.ModuleList([nn.LSTM(size, hidden_size, batch_first=True) for size in sizes]) for _ in range(2))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        """See the class."""
        rows = torch.arange(len(x), device=x.device)[:, None]
        steps = torch.arange(x.shape[1], device=x.device)
        inside = steps < length[:, None]  # (R, T)
        turned = torch.where(inside, length[:, None] - 1 - steps, steps)
        for ahead, back in zip(self.ahead, self.back, strict=True):
            x = self.dropout(x)
            x = torch.cat([ahead(x)[0], back(x[rows, turned])[0][rows, turned]], -1)
        return x * inside[..., None]


class Embed(nn.Module):
    """Word vectors (R, T, D) and characters (R, T, WIDTH) → (R, T, width): filters over a word's characters, the largest value of each; highway."""

    def __init__(self, sizes: Sizes, *, dropout: float) -> None:
        super().__init__()
        self.width = sizes.dimension + _FILTERS
        self.letters = nn.Embedding(sizes.characters, _LETTER, padding_idx=0)
        self.filters = nn.Conv1d(_LETTER, _FILTERS, _SPAN)
        self.highway = nn.Sequential(Highway(self.width), Highway(self.width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, characters: Tensor) -> Tensor:
        """See the class."""
        letters = self.dropout(self.letters(characters.flatten(0, 1))).transpose(1, 2)  # (R*T, _LETTER, WIDTH)
        spelled = self.filters(letters).amax(-1).relu()  # (R*T, _FILTERS)
        return self.highway(torch.cat([words, spelled.view(*words.shape[:2], -1)], -1))


class Highway(nn.Module):
    """gate · relu(W x) + (1 - gate) · x (Srivastava, Greff & Schmidhuber 2015); at first most passes as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate nearly closed; the rest as torch draws it."""
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        gate = self.gate(x).sigmoid()
        return gate * self.change(x).relu() + (1 - gate) * x


class Attention(nn.Module):
    """What each word of the context finds in the question: (R, Tc, W), (R, Tq, W), mask (R, Tq) → (R, Tc, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, u: Tensor, asked: Tensor) -> Tensor:
        """See the class."""
        likeness = self.look(h) @ u.transpose(1, 2)  # (R, Tc, Tq)
        return _softmax(likeness, asked[:, None]) @ u


class AttentionFlow(nn.Module):
    """Context (R, Tc, W), question (R, Tq, W) and their masks → (R, Tc, 4W): [h, ũ, h∘ũ, h∘h̃].

    Likeness of two words: w · [h, u, h∘u]. ũ: the question as each word of the context sees it. h̃: the words of the context that are likest to any of
    the question.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.likeness = nn.Linear(3 * width, 1, bias=False)

    def forward(self, h: Tensor, u: Tensor, told: Tensor, asked: Tensor) -> Tensor:
        """See the class."""
        of_h, of_u, of_both = self.likeness.weight[0].chunk(3)
        likeness = (h @ of_h)[:, :, None] + (u @ of_u)[:, None] + (h * of_both) @ u.transpose(1, 2)  # (R, Tc, Tq)
        seen = _softmax(likeness, asked[:, None]) @ u
        likest = likeness.masked_fill(~asked[:, None], torch.finfo(likeness.dtype).min).amax(-1)  # (R, Tc)
        central = _softmax(likest, told)[:, None] @ h  # (R, 1, W)
        return torch.cat([h, seen, h * seen, h * central], -1)


def _softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis, where mask; every row has some."""
    return x.masked_fill(~mask, -torch.inf).softmax(-1)


# --- batches and folders ---------------------------------------------------------------------------------------------------------


def parts(batch: Batch) -> tuple[Part, Part]:
    """Context, with its "[CLS]", and question, with its "[SEP]", of rows "[CLS] context [SEP] question [SEP]" or "[CLS] context [SEP]"."""
    total = batch["attention_mask"].sum(1)
    asked = (batch["segment"] == 1).sum(1) + 1
    told = (batch["segment"] == 0).sum(1) + 1
    return _part(batch, torch.zeros_like(total), told), _part(batch, total - asked, asked)


def _part(batch: Batch, start: Tensor, length: Tensor) -> Part:
    """The words from `start` (R,) on."""
    steps = torch.arange(int(length.max()), device=length.device)
    mask = steps < length[:, None]  # (R, T)
    rows = torch.arange(len(length), device=length.device)[:, None]
    places = torch.where(mask, start[:, None] + steps, 0)
    ids = batch["input_ids"][rows, places] * mask
    characters = batch["characters"][rows, places] * mask[..., None]
    return Part(ids, characters, length, mask)


def read_sizes(folder: Path) -> Sizes:
    """The sizes of a folder that `invent` or `save` wrote. Raises BundleError."""
    path = Path(folder) / _CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sizes = Sizes(*(values[name] for name in Sizes.__annotations__))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: no folder of a recurrent reader ({type(error).__name__}: {error}): set model.source to one, or to \"scratch\"") from None
    if not all(isinstance(value, int) and value > 0 for value in asdict(sizes).values()):
        raise BundleError(f"{path}: {asdict(sizes)} are no sizes of a model: make the backbone again")
    return sizes


def _write_sizes(sizes: Sizes, folder: Path) -> None:
    (folder / _CONFIG).write_text(json.dumps({"model_type": "recurrent", **asdict(sizes)}, indent=2), encoding="utf-8")


def _vectors(texts: Callable[[], Iterable[str]], config: dict[str, Any], *, limit: int) -> Vectors:
    """The vectors that model.config asks for. Raises ConfigError, DataError."""
    known: dict[str, type] = {"vectors": str, "dimension": int}
    for name, value in config.items():
        if name not in known:
            raise ConfigError(f"unknown key 'model.config.{name}'{nearest(name, known)}")
        if type(value) is not known[name]:
            raise ConfigError(f"model.config.{name} = {value!r}: give {'a file' if name == 'vectors' else 'a whole number'}")
    if "vectors" not in config:
        return make_vectors(texts(), dimension=_positive(config.get("dimension", 50), "config.dimension"), limit=limit)
    words_of = split()
    counts = Counter(word for text in texts() for word in words_of(text))
    vectors = read_vectors(Path(config["vectors"]), first=counts, limit=limit)
    if len(vectors.mean) != config.get("dimension", len(vectors.mean)):
        raise ConfigError(f"model.config.dimension = {config['dimension']}, but the vectors in {config['vectors']} have {len(vectors.mean)}: leave it out")
    return vectors


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"model.{name} = {value}: must be at least 1")
    return value
