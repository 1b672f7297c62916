"""A trained reader that answers a question about a text. Knows no bundle format, blend or clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kit import assemble, runtime
from kit.config import Recipe
from kit.errors import BundleError, ConfigError, DataError
from kit.predict import predict
from kit.tasks import Task, Tokens
from kit.tasks.extractive_qa import Reading, as_spans

_FULL = "full"


class Found(NamedTuple):
    """An answer: its text, "" for none, its characters in the text, -1 for none, and its probability."""

    text: str
    start: int
    stop: int
    probability: float


@dataclass(frozen=True)
class Reader:
    """One fit of a run: the one on everything where there is one, else the first."""

    recipe: Recipe
    task: Task
    tokens: Tokens
    model: Any

    @classmethod
    def open(cls, folder: Path) -> Reader:
        """The reader of a run folder or a member bundle. Raises BundleError, ConfigError."""
        folder = Path(folder)
        if not (folder / "recipe.toml").is_file():
            raise BundleError(f"{folder}: no recipe.toml: give the folder of a run or of a member bundle")
        recipe = Recipe.load(folder / "recipe.toml")
        task = assemble.make_task(recipe)
        if task.blends != "spans":
            raise ConfigError(f'{folder}: was trained for task.kind = "{recipe.task.kind}", not to read: give a run of "extractive_qa"')
        fits = sorted((path.parent for path in folder.glob("*/metrics.json")), key=lambda fit: (fit.name != _FULL, fit.name))
        if not fits:
            raise BundleError(f"{folder}: no finished fit (a folder with metrics.json): run `kit train` first")
        return cls(recipe, task, assemble.load_tokens(recipe, fits[0]), assemble.load_model(recipe, task, fits[0]))

    def ask(self, question: str, text: str, *, count: int = 1) -> list[Found]:
        """The best answers to a question that the text holds, at most `count`, the best first. Raises DataError where one of the two is blank."""
        for name, given in (("question", question), ("text", text)):
            if not given.strip():
                raise DataError(f"the {name} is blank: give one that has words")
        readings = [Reading("", question, text)]
        features = self.task.encode(readings, self.tokens)
        chosen = runtime.choose(self.recipe.infer.precision)
        scores = predict(self.model, self.task, features, self.tokens, runtime=chosen, batch_tokens=self.recipe.infer.batch_tokens)
        spans = as_spans(self.task.decode(scores, features, readings)[0])
        return [Found(text[max(0, span.start) : max(0, span.stop)], span.start, span.stop, math.exp(span.log_p)) for span in spans[:count]]
