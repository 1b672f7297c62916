"""What a scoring process does with an order: rows → predictions, or rows → contexts in the run folder.

Owns: a run's setup.json and contexts/ as a worker reads them, the member or retriever that is loaded, the batches of one order.
Does not know: who sends orders, other processes, the deadline.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.bert.modeling_bert  # noqa: F401  # with it, what every encoder needs and transformers loads late: here once, not after every fork

import kit.models.encoder  # noqa: F401
from kit import assemble, manifest, runtime
from kit.config import Recipe, RetrievePart
from kit.data.tables import read_table
from kit.errors import BundleError
from kit.inference.crew import Event, Fetch, Order
from kit.inference.planner import FULL
from kit.predict import collate_all, stream
from kit.tasks import Feature, Task, Tokens

log = logging.getLogger(__name__)

Beat = Callable[[], None]
"""Says that the work is one step further."""

_PASSES = "passes"  # in the run folder: passes over all layers of a model, each until it is done
_ENCODED = 256  # rows from beat to beat
_QUERIES = 32  # per core, from beat to beat: what one thread of a retriever takes at a time


def serve(run: Path, device: str, pipe: Connection, began: float) -> None:
    """Work on the orders that a pipe brings, all for one member or one retriever, until it ends. began: since when loading counts (monotonic)."""
    work: _Work | None = None
    with suppress(EOFError, OSError):  # the run is gone
        while True:
            order: Order | Fetch = pipe.recv()
            began = time.monotonic() if work else began
            beat = _Beats(pipe, order.serial)
            try:
                beat()
                work = work or _open(run, device, order)
                event = work(order, beat)
                event = replace(event, load_s=time.monotonic() - began - event.seconds)
            except Exception as error:  # whatever it is, the run is told
                log.exception("order %s failed", order.serial)
                why = " ".join(f"{type(error).__name__}: {error}".split())
                event = Event(0, order.serial, "failed", why=why, memory=runtime.tells_of_memory(why))
            pipe.send(event)


_Work = Callable[[Any, Beat], Event]


def _open(run: Path, device: str, order: Order | Fetch) -> _Work:
    """What works on orders like this one."""
    return Scorer(run, order.member, device).work if isinstance(order, Order) else Fetcher(run, order.key).work


class _Beats:
    """Says on a pipe that the work on an order is one step further."""

    def __init__(self, pipe: Connection, serial: int) -> None:
        self._pipe, self._beat = pipe, Event(0, serial, "beat")

    def __call__(self) -> None:
        self._pipe.send(self._beat)


class Scorer:
    """One member: its recipe, the test set as it sees it, and the fit that is loaded."""

    def __init__(self, run: Path, member: str, device: str) -> None:
        if device != "cpu":
            torch.cuda.set_device(device)
        setup = _read_setup(run)
        place = setup["members"][member]
        self._run, self._folder, self._device = run, Path(place["folder"]), device
        self._base = Path(place["base"]) if place.get("base") else None
        self._recipe = Recipe.load(self._folder / "recipe.toml")
        self._task = assemble.make_task(self._recipe)
        self._examples = self._task.read(read_table(Path(setup["test"]), ids=self._task.id_column))
        self._contexts = Contexts(run, place["key"]) if place["key"] else None
        self._fit: str | None = None
        self._model: Any = None
        self._tokens: Any = None

    def work(self, order: Order, beat: Beat) -> Event:
        """Score an order's rows: "scored", with the seconds since the fit was loaded. Raises what loading and scoring raise."""
        self._load(order.fit, beat)
        if not getattr(self._model, "streams", False):
            return self._score(order, beat)
        if order.trial:
            return self._try(order, beat)
        state = _state_of(self._run, order, self._device)
        try:
            event = self._score(_resumed(state, order), beat, state)
        except BundleError as error:  # the states there are of other texts: better a new pass than none
            log.warning("%s: the pass begins anew: %s", state, error)
            shutil.rmtree(state, ignore_errors=True)
            event = self._score(_resumed(state, order), beat, state)
        shutil.rmtree(state, ignore_errors=True)
        return event

    def _score(self, order: Order, beat: Beat, state: Path | None = None) -> Event:
        """state: of a pass over all layers."""
        began = time.monotonic()
        task = self._view(order.view)
        examples = self._rows(order.rows)
        features = _encode(task, examples, self._tokens, beat)
        chosen = runtime.choose(order.precision, self._device)
        scored: dict[int, np.ndarray] = {}
        for indices, scores in stream(
            self._model, task, features, self._tokens, runtime=chosen, batch_tokens=order.batch_tokens, state=state, on_step=beat
        ):  # fmt: skip
            scored.update(zip(indices, scores, strict=True))
            beat()
        prediction = task.decode(list(scored.values()), [features[index] for index in scored], examples)
        prediction[~np.isfinite(prediction).all(-1)] = np.nan
        tokens = sum(feature.tokens for feature in features)
        pace = tuple(self._model.last_pass) if state else None  # as plain numbers: the run need not know models
        return Event(0, order.serial, "scored", time.monotonic() - began, tokens=tokens, rows=order.rows, prediction=prediction, pace=pace)

    def _try(self, order: Order, beat: Beat) -> Event:
        """What a pass over all layers would cost with these rows; none is scored."""
        began = time.monotonic()
        task, examples = self._view(order.view), self._rows(order.rows)
        features = _encode(task, examples, self._tokens, beat)
        batches = [batch for _, batch in collate_all(task, features, self._tokens, batch_tokens=order.batch_tokens)]
        pace = tuple(self._model.eval().measure(batches))
        nothing = np.empty((0, task.width(examples)), np.float32)
        return Event(0, order.serial, "scored", time.monotonic() - began, prediction=nothing, pace=pace)

    def _load(self, fit: str, beat: Beat) -> None:
        """Have this fit's weights on the device, and no other's."""
        if fit == self._fit:
            return
        other, self._fit = self._fit, None
        if other and self._base:
            self._model.reload(self._folder / fit)
        else:
            self._model = self._tokens = None
            runtime.free_memory()
            self._tokens = assemble.load_tokens(self._recipe, self._folder / fit)
            self._model = assemble.load_model(self._recipe, self._task, self._folder / fit, base=self._base).to(self._device)
        self._fit = fit
        beat()

    def _view(self, name: str) -> Task:
        return self._task if name == FULL else self._task.views()[name].task

    def _rows(self, rows: Sequence[int]) -> list[Any]:
        """The examples of these rows, with the contexts that were found for them so far."""
        known = self._contexts.read() if self._contexts else {}
        return [replace(self._examples[row], context=known[row]) if row in known else self._examples[row] for row in rows]


class Fetcher:
    """One retriever, opened when the first row needs it."""

    def __init__(self, run: Path, key: str) -> None:
        setup = _read_setup(run)
        place, task = setup["contexts"][key], dict(setup["task"])
        self._index, self._settings = Path(place["index"]), RetrievePart.model_validate(place["settings"])
        self._task = replace(assemble.task_of_kind(task.pop("kind")), **task)  # type: ignore[type-var]  # tasks are dataclasses
        self._examples = self._task.read(read_table(Path(setup["test"]), ids=self._task.id_column))
        self._contexts = Contexts(run, key)
        self._library: assemble.Library | None = None

    def work(self, order: Fetch, beat: Beat) -> Event:
        """Find the contexts of an order's rows that are not in the run folder yet: "fetched". Raises what retrieval raises."""
        known = self._contexts.read()
        missing = [row for row in dict.fromkeys(order.rows) if row not in known]
        if missing and self._library is None:
            self._library = assemble.Library.open(self._index)
            beat()
        began = time.monotonic()
        step = _QUERIES * (os.cpu_count() or 1)
        for start in range(0, len(missing), step):
            self._find(missing[start : start + step])
            beat()
        examples = [replace(self._examples[row], context=known[row]) for row in order.rows]
        chars = np.array([len(example.context) for example in examples])
        return Event(0, order.serial, "fetched", time.monotonic() - began, rows=order.rows, hints=self._task.hints(examples), chars=chars)

    def _find(self, rows: Sequence[int]) -> None:
        assert self._library is not None
        found = assemble.add_contexts([self._examples[row] for row in rows], self._task, self._settings, self._library)
        self._contexts.write({row: example.context for row, example in zip(rows, found, strict=True)})


class Contexts:
    """The contexts that were found in a run for one key: contexts/<key>/<first row>-<number>.json, each {row: context}.

    Those that the disk of the run folder has no room for are below the system's folder for temporary files.
    """

    def __init__(self, run: Path, key: str) -> None:
        state = assemble.digest([str(run), _read_setup(run).get("state", "")])
        self._folders = (run / "contexts" / key, Path(tempfile.gettempdir()) / f"kit-contexts-{state}" / key)
        self._seen: set[Path] = set()
        self._known: dict[int, str] = {}

    def read(self) -> dict[int, str]:
        """All that are there now, by row."""
        for path in sorted({path for folder in self._folders for path in folder.glob("*.json")} - self._seen):
            self._seen.add(path)
            try:
                self._known |= {int(row): str(context) for row, context in json.loads(path.read_text(encoding="utf-8")).items()}
            except (OSError, ValueError, AttributeError) as error:
                log.warning("%s cannot be read (%s): its rows have no context, unless they are fetched again", path, error)
        return self._known

    def write(self, found: dict[int, str]) -> None:
        """Add contexts. Raises OSError."""
        first, last = (folder / f"{next(iter(found))}-{len(found)}.json" for folder in self._folders)
        content = json.dumps({str(row): context for row, context in found.items()}, ensure_ascii=False)
        try:
            manifest.write_atomically(first, content)
        except OSError as error:
            log.warning("%s cannot be written (%s): %s instead", first, error, last)
            manifest.write_atomically(last, content)
        self._seen |= {first, last}
        self._known |= found


def _state_of(run: Path, order: Order, device: str) -> Path:
    """Where a pass over all layers keeps its states; every device has passes of its own, even of one member."""
    return run / _PASSES / f"{order.member}.{order.fit}.{order.view}.{device.replace(':', '')}"


def _resumed(state: Path, order: Order) -> Order:
    """The order whose pass was cut off in this folder, if it was to be scored in the same way; else this one, whose pass begins there."""
    path, way = state / "order.json", [order.batch_tokens, order.precision]
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["way"] == way:
            return replace(order, rows=tuple(kept["rows"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(state, ignore_errors=True)
    manifest.write_atomically(path, json.dumps({"rows": order.rows, "way": way}))
    return order


def _encode(task: Task, examples: Sequence[Any], tokens: Tokens, beat: Beat) -> list[Feature]:
    """The features of the examples, some rows at a time."""
    features: list[Feature] = []
    for start in range(0, len(examples), _ENCODED):
        part = task.encode(examples[start : start + _ENCODED], tokens)
        features += [replace(feature, row=start + feature.row) for feature in part]
        beat()
    return features


def _read_setup(run: Path) -> dict[str, Any]:
    return json.loads((run / "setup.json").read_text(encoding="utf-8"))
