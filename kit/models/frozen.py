"""Sentence embeddings of encoders that stay as they are → Ridge or SVR (scikit-learn), fitted at once. Knows no task.

The embeddings of several encoders stand side by side: means over the tokens, each of length 1. What the regression has learnt is kept as
numbers (coefficients, or support vectors), never pickled, and predicts by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from kit.errors import BundleError, ConfigError
from kit.models.encoder import Encoder, read_backbone, read_config
from kit.models.tokens import HFTokens
from kit.packing import hidden_states
from kit.paths import model_folder

if TYPE_CHECKING:
    from kit.tasks import Encoding

Batch = dict[str, Tensor]
_FITTED = "regression.safetensors"


class FrozenTokens:
    """The tokens of the first encoder; batches carry the text, too, which further encoders read with tokens of their own."""

    def __init__(self, own: HFTokens) -> None:
        self._own = own

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0, pair_first: bool = False) -> list[Encoding]:
        """See kit.tasks.Tokens. characters: code points of what the sequence holds of the text, and then of the pair."""
        encodings = self._own.encode(text, pair, max_length=max_length, stride=stride, pair_first=pair_first)
        for encoding in encodings:
            held = encoding["offsets"][encoding["segment"] == 0]
            part = text[held.min() : held.max()] if len(held) else ""
            encoding["characters"] = np.array([ord(sign) for sign in "\n".join(filter(None, (part, pair)))], np.int32)
        return encodings

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """See kit.tasks.Tokens; characters (R, L) int32, -1 behind the end."""
        characters = [torch.from_numpy(encoding["characters"]) for encoding in encodings]
        return self._own.pad(encodings) | {"characters": nn.utils.rnn.pad_sequence(characters, batch_first=True, padding_value=-1)}

    def id(self, word: str) -> int:
        """See kit.tasks.Tokens."""
        return self._own.id(word)

    def save(self, folder: Path) -> None:
        """See kit.tasks.Tokens."""
        self._own.save(folder)


class Frozen(nn.Module):
    """Embeddings (R, D) of one or several encoders → (R, outputs) by what was fitted.

    also: further encoders, as model.source names one (relative paths: beside it). regression: "ridge", linear, or "svr", with a Gaussian kernel.
    penalty: how much weights are held back (Ridge's alpha, 1 / C of SVR).
    """

    gives = "row"

    def __init__(
        self, folders: Sequence[Path], *, outputs: int, also: list[str] | None = None, regression: Literal["ridge", "svr"] = "svr", penalty: float = 1.0
    ) -> None:
        super().__init__()
        if regression not in _REGRESSIONS or penalty <= 0:
            raise ConfigError(f"model.regression = {regression!r}, model.penalty = {penalty}: give one of {', '.join(_REGRESSIONS)} and a number above 0")
        self.encoders = nn.ModuleList(read_backbone(AutoModel, folder, read_config(folder), but="pooler.", dtype=torch.float32) for folder in folders)
        self.encoders.requires_grad_(False)
        self._others = [Encoder.tokens(folder) for folder in folders[1:]]
        self._outputs, self._regression, self._penalty = outputs, _REGRESSIONS[regression], penalty
        self._fitted: dict[str, Tensor] = {}

    @classmethod
    def invent(cls, folder: Path, texts: Callable[[], Iterable[str]], *, seed: int, config: dict[str, Any], vocab_size: int = 8000) -> None:
        """See kit.models.encoder.Encoder.invent."""
        Encoder.invent(folder, texts, seed=seed, config=config, vocab_size=vocab_size)

    @classmethod
    def create(cls, source: Path, *, outputs: int, also: list[str] | None = None, **options: Any) -> Frozen:
        """See kit.models.Model."""
        return cls([Path(source), *_others(also, Path(source))], outputs=outputs, **options)

    @classmethod
    def beside(cls, options: Mapping[str, Any], source: Path | None) -> list[Path]:
        """See kit.models.Model: the further encoders."""
        return _others(options.get("also"), source) if source else []

    @classmethod
    def load(cls, folder: Path, *, outputs: int, also: list[str] | None = None, **options: Any) -> Frozen:
        """See kit.models.Model."""
        model = cls([Path(folder), *(_further(folder, number) for number, _ in enumerate(also or ()))], outputs=outputs, **options)
        path = Path(folder) / _FITTED
        try:
            model._fitted = load_file(path)
            model(model._nothing())
        except Exception as error:  # safetensors raises unrelated types for damaged files, torch for what does not fit
            raise BundleError(f"{path}: not what model.regression learns from these encoders ({type(error).__name__}): train the fold again") from None
        return model

    @classmethod
    def tokens(cls, folder: Path) -> FrozenTokens:
        """See kit.models.Model."""
        return FrozenTokens(Encoder.tokens(folder))

    def fit_at_once(self, batches: Sequence[Batch], targets: np.ndarray) -> None:
        """See kit.models.Model: targets (R, outputs)."""
        embedded = torch.cat([self.embed(batch).cpu() for batch in batches]).double().numpy()
        assert targets.shape == (len(embedded), self._outputs), f"{len(embedded)} texts, {self._outputs} outputs, targets {targets.shape}"
        found = self._regression.fit(embedded, targets.astype(np.float64), self._penalty)
        self._fitted = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}

    def forward(self, batch: Batch) -> Tensor:
        """(R, T) ids → (R, outputs) float32."""
        assert self._fitted, "fit_at_once or load comes first"
        embedded = self.embed(batch)
        fitted = {name: value.to(embedded.device) for name, value in self._fitted.items()}
        return self._regression.predict(embedded.double(), fitted).float()

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """(R, T) ids → (R, D) float32, a vector of length 1 per encoder."""
        self.encoders.eval()
        parts = [batch, *(self._read(tokens, batch) for tokens in self._others)]
        return torch.cat([_embed(encoder, part) for encoder, part in zip(self.encoders, parts, strict=True)], -1)

    def reinit_layers(self, count: int) -> None:
        """See kit.models.Model: nothing here is trained layer by layer."""
        if count:
            raise ConfigError(f'train.reinit_layers = {count}: model.kind = "frozen" leaves its layers as they are: set train.reinit_layers = 0')

    def save(self, folder: Path) -> None:
        """Write the encoders and what was fitted; further encoders with their tokens."""
        for number, encoder in enumerate(self.encoders):
            place = Path(folder) if not number else _further(folder, number - 1)
            cast(Any, encoder).save_pretrained(place)
            if number:
                self._others[number - 1].save(place)
        save_file(self._fitted, Path(folder) / _FITTED)

    def _read(self, tokens: HFTokens, batch: Batch) -> Batch:
        texts = ["".join(map(chr, row[row >= 0].tolist())) for row in batch["characters"].cpu()]
        padded = tokens.pad([tokens.encode(text, max_length=tokens.limit)[0] for text in texts])
        return {name: tensor.to(batch["input_ids"].device) for name, tensor in padded.items()}

    def _nothing(self) -> Batch:
        """A batch of one short row."""
        one = torch.ones(1, 1, dtype=torch.long)
        return {"input_ids": one, "attention_mask": one, "token_type_ids": one - 1, "characters": torch.full((1, 1), ord("1"))}


def _embed(encoder: Any, batch: Batch) -> Tensor:
    hidden = hidden_states(encoder, batch)[-1].float()
    return F.normalize((hidden * batch["attention_mask"].unsqueeze(-1)).sum(1), dim=-1)  # of the sum: the mean has the same direction


def _others(also: Iterable[str] | None, source: Path) -> list[Path]:
    return [model_folder(name, source.parent) for name in also or ()]


def _further(folder: Path, number: int) -> Path:
    return Path(folder) / f"encoder{number + 2}"


# --- regressions ------------------------------------------------------------------------------------------------------------------

_Values = dict[str, np.ndarray]


class _Regression(NamedTuple):
    """fit: embeddings (R, D) float64, targets (R, K), penalty → numbers. predict: embeddings and these → (R, K)."""

    fit: Callable[[np.ndarray, np.ndarray, float], _Values]
    predict: Callable[[Tensor, dict[str, Tensor]], Tensor]


def _fit_ridge(embedded: np.ndarray, targets: np.ndarray, penalty: float) -> _Values:
    from sklearn.linear_model import Ridge

    found = Ridge(alpha=penalty).fit(embedded, targets)
    return {"weight": np.reshape(found.coef_, (targets.shape[1], -1)), "bias": np.reshape(found.intercept_, -1)}


def _predict_ridge(embedded: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    return embedded @ fitted["weight"].T + fitted["bias"]


def _fit_svr(embedded: np.ndarray, targets: np.ndarray, penalty: float) -> _Values:
    """One machine per target; support vectors that several share are kept once."""
    from sklearn.svm import SVR

    gamma = 1 / (embedded.shape[1] * max(embedded.var(), 1e-12))  # scikit-learn's "scale"
    found = [SVR(C=1 / penalty, gamma=gamma).fit(embedded, column) for column in targets.T]
    duals = np.zeros((len(found), len(embedded)))
    for row, machine in zip(duals, found, strict=True):
        row[machine.support_] = machine.dual_coef_[0]
    used = np.flatnonzero(duals.any(0))
    return {"supports": embedded[used], "duals": duals[:, used], "bias": np.concatenate([one.intercept_ for one in found]), "gamma": np.array([gamma])}


def _predict_svr(embedded: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    distances = torch.cdist(embedded, fitted["supports"], compute_mode="donot_use_mm_for_euclid_dist")  # exact for vectors that are close
    return (-fitted["gamma"] * distances**2).exp() @ fitted["duals"].T + fitted["bias"]


_REGRESSIONS = {"ridge": _Regression(_fit_ridge, _predict_ridge), "svr": _Regression(_fit_svr, _predict_svr)}
