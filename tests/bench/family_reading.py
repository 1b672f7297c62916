"""Extractive question answering, a part of tests.bench.families: SQuAD v1.1's articles or, where quick, the sample's readings.

The last articles of the file are held out. `minilm` and the peer see the same questions, as many of every article, for the same epochs at the same
rate; `minilm_all` and the recurrent readers, whose word vectors are made from the training texts, see all questions of the training articles. Peer:
the library's example run_qa.py: AutoModelForQuestionAnswering, its Trainer, windows of max_length with stride, the 20 best starts and ends of each
window, an answer of at most 30 tokens. As published it pads every window to max_length, and so it is timed; trained for its quality it pads to the
longest of a batch, which gives the same numbers in less time, and that is timed as "trainer_longest". Ours drops nothing in the backbone and has a
rate of its own for the head. Both learn the answer that most people gave. Trivial: the sentence that shares most words with the question.
Speed: short fits in turns, "own_with_dropout" is ours with the backbone as it comes; reading is from text to answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, Trainer

from kit import assemble, runtime
from kit.config import Recipe
from kit.data.tables import read_table
from kit.metrics import bootstrap
from kit.sample import write_sample
from kit.tasks.extractive_qa import ExtractiveQA, Reading, Span, as_prediction
from tests.bench.turns import (
    Fitted,
    clock,
    emptied,
    estimated,
    fitted,
    in_turns,
    kept,
    kept_values,
    read,
    real_table,
    speeds,
    trained,
    trainer_arguments,
    without_dropout,
)

_BEST = 20  # starts and ends of a window that the peer combines


@dataclass(frozen=True)
class Setting:
    """recipe: of the encoder. table: of KIT_DATA; None: the sample's. articles: to train on. each: questions of an article that `minilm` and the peer see.

    held: at most so many articles are held out. timed, read: questions of a turn's training and reading. lstm, bidaf: settings of the shipped recipes.
    """

    recipe: str
    table: str | None
    articles: int
    held: int
    each: int
    epochs: int
    timed: int
    read: int
    turns: int
    lstm: tuple[str, ...]
    bidaf: tuple[str, ...]
    overrides: tuple[str, ...] = ()


_WORDS = "model.config={dimension = 100}"  # vectors from the training texts
FULL = Setting(
    "squad_minilm", "squad/squad_dev_v1.1_dev.json.gz", articles=30, held=8, each=60, epochs=2, timed=160, read=160, turns=5,
    lstm=(_WORDS, "train.epochs=8"),
    bidaf=(_WORDS, "train.epochs=6", "train.batch_size=32", "train.optimizer=adam", "train.lr=2e-3", "train.schedule=linear", "train.ema=0.0"),
)  # fmt: skip
_SMALL = ("model.config={dimension = 10}", "model.hidden_size=8", "train.epochs=1")
QUICK = Setting("sample_reading", None, articles=4, held=2, each=4, epochs=1, timed=16, read=8, turns=1, lstm=_SMALL, bidaf=_SMALL)


class Part(NamedTuple):
    """train: questions about the training articles, with one answer each; fewer: as many of every article. held: about the others, with all answers.

    backbone: as it comes; calm: without dropout.
    """

    train: list[Reading]
    fewer: list[Reading]
    held: list[Reading]
    backbone: Path
    calm: Path
    folder: Path


class Fit(NamedTuple):
    """What a model is fitted with."""

    recipe: Recipe
    train: Sequence[Reading]


def extractive_qa(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """The section of the results, again after every model."""
    recipe = Recipe.load(setting.recipe, [f"train.epochs={setting.epochs}", *setting.overrides])
    task = assemble.make_task(recipe)
    assert isinstance(task, ExtractiveQA)
    part = _part(setting, recipe, task, folder)
    words = {kind: Recipe.load(f"squad_{kind}", overrides) for kind, overrides in (("lstm", setting.lstm), ("bidaf", setting.bidaf))}
    fits = {
        "minilm": Fit(recipe, part.fewer),
        "trainer": Fit(recipe, part.fewer),
        "lstm": Fit(words["lstm"], part.train),
        "bidaf": Fit(words["bidaf"], part.train),
        "minilm_all": Fit(recipe, part.train),
    }
    sizes = {"training_part": len(part.train), "minilm": len(part.fewer), "held_out": len(part.held), "epochs": setting.epochs, "max_length": task.max_length}
    sizes |= {f"{kind}_epochs": one.train.epochs for kind, one in words.items()}
    models: dict[str, Fitted] = {}
    speed: dict[str, Any] = {}
    for name, one in fits.items():
        models[name] = kept(folder / "kept", name, [one.recipe.digest, len(one.train), len(part.held)], partial(_fitted, name, one, part))
        if name == "trainer":
            speed = kept_values(folder / "kept", "speed", asdict(setting), lambda: _speed(setting, recipe, task, part))
        yield _section(task, part, models) | {"speed": speed, "sizes": sizes}


def _part(setting: Setting, recipe: Recipe, task: ExtractiveQA, folder: Path) -> Part:
    table = real_table(setting.table, task.id_column) if setting.table else read_table(write_sample(folder / "sample", "readings") / "train.json")
    readings = task.read(table)
    titles = list(dict.fromkeys(reading.title for reading in readings))
    inside, outside = set(titles[: setting.articles]), set(titles[-setting.held :])
    rng = np.random.default_rng(0)
    train = [_with_usual_answer(readings[row]) for row in rng.permutation(len(readings)) if readings[row].title in inside]
    seen: Counter[str] = Counter()
    fewer = []
    for reading in train:
        seen[reading.title] += 1
        fewer += [reading] * (seen[reading.title] <= setting.each)
    backbone = assemble.backbone(recipe, Path(), Path(), [])
    held = [reading for reading in readings if reading.title in outside]
    return Part(train, fewer, held, backbone, without_dropout(backbone, folder / "backbone"), folder)


def _with_usual_answer(reading: Reading) -> Reading:
    """The reading with the one answer that most people gave."""
    assert reading.answers, f"{reading.id}: no answer"
    return replace(reading, answers=(Counter(reading.answers).most_common(1)[0][0],))


def _fitted(name: str, one: Fit, part: Part, place: Path) -> Fitted:
    if name == "trainer":
        return _trainer(one.recipe, part.backbone, one.train, part.held, place)
    backbone = part.calm
    if name in ("lstm", "bidaf"):
        backbone = assemble.backbone(one.recipe, place / "words", Path(), [f"{reading.context} {reading.question}" for reading in part.train])
    return fitted(one.recipe, backbone, one.train, part.held, place / "fit")


# --- the peer ----------------------------------------------------------------------------------------------------------------------------------


def _trainer(recipe: Recipe, backbone: Path, train: Sequence[Reading], held: Sequence[Reading], folder: Path) -> Fitted:
    seconds, trainer = _trainer_epochs(recipe, backbone, train, folder, padding=False)
    return Fitted(seconds, _trainer_reads(trainer, recipe, backbone, held, padding=False)[1])


def _trainer_epochs(recipe: Recipe, backbone: Path, train: Sequence[Reading], folder: Path, *, padding: bool) -> tuple[float, Trainer]:
    """Seconds from questions to a trained model on disk, and the Trainer. padding: to max_length; else to the longest of a batch."""
    device = runtime.choose().device
    begun = clock(device)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    arguments = trainer_arguments(recipe.train, folder)
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(backbone, dtype=torch.float32)
    rows: Any = [_learnt(window, train[window["row"]]) for window in _windows(recipe, tokenizer, train, padding=padding)]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    model.save_pretrained(folder)
    return clock(device) - begun, trainer


def _trainer_reads(trainer: Trainer, recipe: Recipe, backbone: Path, readings: Sequence[Reading], *, padding: bool) -> tuple[float, np.ndarray]:
    """Seconds from questions to answers, and these as spans (N, 3n)."""
    device = runtime.choose().device
    begun = clock(device)
    windows = _windows(recipe, AutoTokenizer.from_pretrained(backbone), readings, padding=padding)
    rows: Any = [{name: window[name] for name in ("input_ids", "token_type_ids", "attention_mask")} for window in windows]
    starts, ends = trainer.predict(rows).predictions
    best: list[tuple[float, Span]] = [(-np.inf, Span(0, 0, 0.0))] * len(readings)
    for window, start, end in zip(windows, starts, ends, strict=True):
        best[window["row"]] = max(best[window["row"]], _best(window, start, end, recipe.task.options.get("max_answer", 30)), key=lambda found: found[0])
    return clock(device) - begun, as_prediction([[span] for _, span in best])


def _windows(recipe: Recipe, tokenizer: Any, readings: Sequence[Reading], *, padding: bool) -> list[dict[str, Any]]:
    """Windows of question and context as run_qa.py makes them; row: of the reading; offsets: (start, stop) of the context's tokens, None of others."""
    options = recipe.task.options
    found = tokenizer(
        [reading.question.lstrip() for reading in readings], [reading.context for reading in readings], truncation="only_second",
        max_length=options["max_length"], stride=options["stride"], return_overflowing_tokens=True, return_offsets_mapping=True,
        padding="max_length" if padding else False,
    )  # fmt: skip
    windows = []
    for number, row in enumerate(found["overflow_to_sample_mapping"]):
        offsets = [place if part == 1 else None for place, part in zip(found["offset_mapping"][number], found.sequence_ids(number), strict=True)]
        inputs = {name: found[name][number] for name in ("input_ids", "token_type_ids", "attention_mask")}
        windows.append(inputs | {"row": row, "offsets": offsets})
    return windows


def _learnt(window: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """A window with the places of the answer's first and last token, 0 where it has not all of it."""
    assert reading.answers
    answer = reading.answers[0]
    inside = [place for place, offset in enumerate(window["offsets"]) if offset is not None]
    first, last = window["offsets"][inside[0]], window["offsets"][inside[-1]]
    begin = end = 0
    if first[0] <= answer.start and answer.stop <= last[1]:
        begin = max(place for place in inside if window["offsets"][place][0] <= answer.start)
        end = min(place for place in inside if window["offsets"][place][1] >= answer.stop)
    return {name: window[name] for name in ("input_ids", "token_type_ids", "attention_mask")} | {"start_positions": begin, "end_positions": end}


def _best(window: dict[str, Any], start: np.ndarray, end: np.ndarray, longest: int) -> tuple[float, Span]:
    """The best answer of a window, by the sum of both logits, which is compared across windows."""
    found = (-np.inf, Span(0, 0, 0.0))
    offsets = window["offsets"]
    for first in np.argsort(-start[: len(offsets)])[:_BEST]:
        for last in np.argsort(-end[: len(offsets)])[:_BEST]:
            if offsets[first] is not None and offsets[last] is not None and first <= last < first + longest and start[first] + end[last] > found[0]:
                found = float(start[first] + end[last]), Span(offsets[first][0], offsets[last][1], 0.0)
    return found


# --- figures -----------------------------------------------------------------------------------------------------------------------------------


def _speed(setting: Setting, recipe: Recipe, task: ExtractiveQA, part: Part) -> dict[str, Any]:
    """Training and reading in turns, one epoch of a few questions."""
    short = recipe.with_overrides(["train.epochs=1"])
    train, held, folder = part.fewer[: setting.timed], part.held[: setting.read], part.folder / "timed"
    training, given = in_turns(
        {
            "own": lambda: trained(short, part.calm, train, emptied(folder / "own")),
            "own_with_dropout": lambda: trained(short, part.backbone, train, emptied(folder / "own")),
            "trainer": lambda: _trainer_epochs(short, part.backbone, train, folder / "trainer", padding=True),
            "trainer_longest": lambda: _trainer_epochs(short, part.backbone, train, folder / "trainer", padding=False),
        },
        setting.turns,
    )
    reading, _ = in_turns(
        {
            "own": lambda: read(given["own"], short, part.calm, held),
            "trainer": lambda: _trainer_reads(given["trainer"], short, part.backbone, held, padding=True),
            "trainer_longest": lambda: _trainer_reads(given["trainer"], short, part.backbone, held, padding=False),
        },
        setting.turns,
    )
    return speeds(training, len(train), reading, len(held))


def _section(task: ExtractiveQA, part: Part, models: dict[str, Fitted]) -> dict[str, Any]:
    """Every model's metrics, the trivial rule's, and by how much F1 is above the peer's."""
    targets = task.targets(part.held)
    found: dict[str, Any] = {name: _metrics(task, one.prediction, targets) | {"minutes": one.seconds / 60} for name, one in models.items()}
    section: dict[str, Any] = {"models": found, "trivial": {"likest_sentence": _metrics(task, task.hints(part.held)["overlap"], targets)}}
    if "trainer" in models:
        gains = task.merit(models["minilm"].prediction, targets) - task.merit(models["trainer"].prediction, targets)
        gain = bootstrap(lambda values, _: float(values.mean()), gains, gains)
        section["minilm_less_trainer"] = {"f1": gain.value, "ci95": [gain.low, gain.high]}
    return section


def _metrics(task: ExtractiveQA, prediction: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    found = {}
    for name in ("em", "f1", "start_accuracy", "end_accuracy"):
        each = np.array([task.metrics[name](prediction[row : row + 1], targets[row : row + 1]) for row in range(len(targets))])  # metrics are means of rows
        found[name] = estimated(lambda values, _: float(values.mean()), each, each)
    return found
