"""Recipe: the settings of a run, from TOML, with overrides. Does not know which kinds of task, model or retriever exist.

An unknown key is refused with the nearest known one; settings that contradict each other are refused naming both keys.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kit.errors import ConfigError, nearest

_LATER: dict[str, dict[str, Any]] = {
    "data": {"teacher": None, "pretrain": []},
    "train": {"optimizer": "adamw", "awp": 0.0, "awp_from": 0, "ema": 0.0, "swa": 0, "pretrain_epochs": 0},
}
"""Settings that came after runs had been named, with the values that say what was done before them: these leave a run its name."""

Schedule = Literal["linear", "cosine", "constant", "step", "exponential", "polynomial"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Kind(BaseModel):
    """One choice from a registry: `kind`, and that kind's own settings, which assemble.py checks."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """The settings other than `kind`."""
        return dict(self.__pydantic_extra__ or {})


class DataPart(_Part):
    """Where the tables are and how they are folded. Paths are relative to `folder`."""

    folder: str = "."
    train: str = "train.csv"
    test: str = "test.csv"
    extra: tuple[str, ...] = ()
    """More training tables; never in a validation part."""
    folds: int = Field(5, ge=2)
    fold_by: Literal["stratified", "multilabel", "grouped", "random"] = "stratified"
    group: str | None = None
    """Column whose equal values stay in one fold (fold_by = "grouped")."""
    fold_seed: int = 0
    teacher: str | None = None
    """A run on the same rows and folds (run:NAME, bundle:NAME or a folder), whose probabilities task.distill mixes into the loss."""
    pretrain: tuple[str, ...] = ()
    """Tables of pseudo-labels, which every fit learns before its own rows, and on which nothing is validated; with columns p0 … they are soft."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.fold_by == "grouped") != (self.group is not None):
            raise ValueError('data.fold_by = "grouped" and data.group go together: set both or neither')
        return self


class ContextPart(_Part):
    """How hits become the context string of an example."""

    passages: int = Field(5, ge=1)
    """Passages retrieved per query (k)."""
    sentences: int = Field(0, ge=0)
    """Sentences kept, the most relevant first (0: whole passages)."""
    max_chars: int = Field(2400, ge=1)
    query: Literal["prompt", "prompt_options"] = "prompt_options"


class RetrievePart(_Part):
    """The corpus, the retriever over it, and the context built from its hits."""

    corpus: str
    """Passages file (.parquet, .jsonl or .csv with id, title, text), relative to data.folder."""
    retriever: Kind = Kind(kind="bm25")
    context: ContextPart = ContextPart()


class TrainPart(_Part):
    """Optimisation. `batch_size` examples × `accumulate` micro-batches × processes make one step."""

    epochs: int = Field(3, ge=0)
    """0: the model is scored as it is: one fit, `full`, that says something of every row."""
    batch_size: int = Field(4, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(2e-5, gt=0)
    head_lr: float | None = Field(None, gt=0)
    """Rate of the top layer group (pooling and head); default: lr."""
    llrd: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning-rate decay: each group below the top layer has this factor of the one above (1: none)."""
    weight_decay: float = Field(0.01, ge=0)
    schedule: Schedule = "linear"
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of all steps in which the rate climbs from 0."""
    clip: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "paged_adamw_8bit", "adam", "adadelta"] = "adamw"
    """The 8-bit one (bitsandbytes) keeps a quarter of the state, and pages it to the CPU's memory where the GPU's runs out. Adadelta wants rates near 1."""
    fgm: float = Field(0.0, ge=0)
    """Length of the FGM perturbation of the input embeddings (0: no adversarial pass)."""
    awp: float = Field(0.0, ge=0)
    """Size of the adversarial perturbation of every weight matrix, as a share of its norm (0: none)."""
    awp_from: int = Field(0, ge=0)
    """Epochs that are trained before AWP begins."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the running mean of the weights that is validated and kept (0: none)."""
    swa: int = Field(0, ge=0)
    """Epochs at the end whose weights are averaged; the average is validated and kept (0: none)."""
    pretrain_epochs: int = Field(0, ge=0)
    """Epochs on data.pretrain, with a schedule of their own."""
    save_steps: int = Field(0, ge=0)
    """Steps of an epoch after which a fit can go on where it was killed (0: after whole epochs only)."""
    eval_steps: int = Field(0, ge=0)
    """Steps of an epoch after which the validation rows are scored for the curve (0: after whole epochs only); which epoch is kept does not depend on it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    freeze_embeddings: bool = False
    freeze_layers: int = Field(0, ge=0)
    reinit_layers: int = Field(0, ge=0)
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights a fold ends with, by the validation metric."""
    patience: int = Field(0, ge=0)
    """Stop after this many epochs without a better validation metric (0: never)."""
    seeds: tuple[int, ...] = (0,)
    """One fit per seed and fold; predictions are averaged."""
    tracker: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.fgm and self.freeze_embeddings:
            raise ValueError("train.fgm needs gradients of the input embeddings, but train.freeze_embeddings = true: set train.fgm = 0 or unfreeze")
        if self.fgm and self.freeze_layers:
            raise ValueError("train.fgm needs gradients of the input embeddings, but train.freeze_layers > 0 freezes them: set one of the two to 0")
        if self.fgm and self.awp:
            raise ValueError("train.fgm and train.awp are both adversarial: set one of the two to 0")
        if self.awp_from and not self.awp:
            raise ValueError(f"train.awp_from = {self.awp_from}, but train.awp = 0: set train.awp, or train.awp_from = 0")
        for name, needed in (("awp_from", self.awp_from + 1 if self.awp_from else 0), ("swa", self.swa)):
            if needed > self.epochs:
                raise ValueError(f"train.{name} = {getattr(self, name)} needs at least {needed} epochs, but train.epochs = {self.epochs}: change one of the two")
        if self.ema and self.swa:
            raise ValueError("train.ema and train.swa both average weights: set one of the two to 0")
        if self.patience and self.swa:
            raise ValueError("train.patience may stop before the last epochs, which train.swa averages: set one of the two to 0")
        if self.pretrain_epochs and not self.epochs:
            raise ValueError(f"train.pretrain_epochs = {self.pretrain_epochs}, but train.epochs = 0 trains nothing: change one of the two")
        if self.patience and self.keep == "last":
            raise ValueError('train.patience stops on the best epoch, but train.keep = "last": use keep = "best" or patience = 0')
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"train.seeds = {list(self.seeds)} must name at least one seed, each once")
        return self


class InferPart(_Part):
    """Inference settings; they do not change what is trained, so they are not part of the digest."""

    batch_tokens: int = Field(4096, ge=1)
    """Tokens of one batch, padding included; halved when memory runs out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class Recipe(_Part):
    """Everything that decides what a run computes."""

    name: str = Field(pattern=r"^[a-z0-9]+(?:[_-][a-z0-9]+)*$")
    task: Kind
    model: Kind
    data: DataPart = DataPart()
    retrieve: RetrievePart | None = None
    train: TrainPart = TrainPart()
    infer: InferPart = InferPart()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if bool(self.data.pretrain) != bool(self.train.pretrain_epochs):
            raise ValueError("data.pretrain (tables of pseudo-labels) and train.pretrain_epochs (above 0) go together: set both or neither")
        return self

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """The recipe of a TOML file, or of a recipe shipped with the kit by its name. Raises ConfigError."""
        path = _recipe_path(name_or_path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
        values.setdefault("name", path.stem)
        for override in overrides:
            _set(values, override)
        return cls.of(values, source=str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "recipe") -> Self:
        """The recipe of nested values; unknown keys and contradictions raise ConfigError with the key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error)}") from None

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """This recipe with `key.path=value` settings, the value in TOML syntax (a bare word is a text)."""
        values = self.model_dump(exclude_none=True)
        for override in overrides:
            _set(values, override)
        return type(self).of(values, source="--set")

    @property
    def digest(self) -> str:
        """8 hex digits of the settings that change what is trained; the data themselves are hashed by the run."""
        body = self.model_dump(mode="json", exclude={"name": True, "infer": True, "data": {"folder", "test"}, "train": {"tracker", "save_steps", "eval_steps"}})
        for part, usual in _LATER.items():
            body[part] = {name: value for name, value in body[part].items() if name not in usual or value != usual[name]}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:8]

    def to_toml(self) -> str:
        """The resolved recipe as TOML; loading it gives an equal recipe."""
        return "\n".join(_toml_lines(self.model_dump(exclude_none=True))) + "\n"


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the kit: name → file."""
    folder = Path(str(resources.files("kit") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _recipe_path(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    raise ConfigError(f"recipe {str(name_or_path)!r} is neither a file nor shipped with the kit{nearest(str(name_or_path), shipped)}")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: write key.path=value, for example train.lr=1e-5")
    for part in keys[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a table of settings")
    try:
        values[keys[-1]] = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        values[keys[-1]] = text.strip()


def _explain(error: ValidationError) -> str:
    """One line from pydantic's report: the key, what is wrong, the nearest known key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(place[-1], _fields_at(place[:-1]))}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _fields_at(place: list[str]) -> list[str]:
    part: Any = Recipe
    for name in place:
        annotation = part.model_fields[name].annotation
        part = next((a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if part is None:
            return []
    return list(part.model_fields)


def _toml_lines(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items() if key not in tables]
    for key, table in tables.items():
        place = f"{prefix}{_toml_key(key)}"
        lines += ["", f"[{place}]", *_toml_lines(table, f"{place}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)  # inf and nan, too, are words of TOML
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")  # JSON's texts, integers and booleans are TOML's


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml_value(key)
