"""Recipe → task, tokens, model, retriever. The one file that knows the registries and checks that their entries fit together.

Does not know files' contents, folds or time.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from kit import manifest
from kit.config import Recipe, RetrievePart, TrainPart
from kit.errors import BundleError, ConfigError, DependencyError, nearest
from kit.models import MODELS
from kit.paths import BUNDLES, model_folder
from kit.retrieval import RETRIEVERS, Retriever
from kit.retrieval.context import build_contexts
from kit.retrieval.corpus import Corpus
from kit.tasks import TASKS, Task, Tokens, suffices

_UNTRAINED = ("zero_shot",)  # kinds of model that train.epochs = 0 is for, and nothing else
_STEPWISE = ("fgm", "awp", "ema", "swa", "pretrain_epochs", "freeze_embeddings", "freeze_layers", "reinit_layers", "gradient_checkpointing")
_USUAL = TrainPart()
SCRATCH = "scratch"  # model.source for a backbone with random weights
_WAYS = {
    "row": 'set model.pooling to another than "none", or model.kind = "encoder"; language models are for task.kind = "multiple_choice_prompt"',
    "token": 'set model.kind = "encoder" and model.pooling = "none", or model.kind = "lstm" or "bidaf"',
    "place": 'set model.kind = "causal" or "seq2seq" and model.head = "score", or another task.form',
    "answer_token": 'set model.kind = "causal" or "seq2seq" and model.head = "words", or task.form = "score"',
    "next_token": 'set model.kind = "causal" and model.head = "words"',
}
"""What gives what a task needs."""
_BACKBONE_OPTIONS = ("source", "config", "vocab_size")  # settings of model.* that make the backbone; the others go to the model


def make_task(recipe: Recipe) -> Task:
    """The task with the recipe's settings. Raises ConfigError for an unknown kind or setting."""
    kind = _entry(TASKS, recipe.task.kind, "task")
    hints = get_type_hints(kind)
    _check_options("task", recipe.task.options, {field.name: hints[field.name] for field in fields(kind)})
    return kind(**recipe.task.options)


def task_of_kind(kind: str) -> Task:
    """The task of that kind with its own defaults. Raises ConfigError."""
    return _entry(TASKS, kind, "task")()


def check(recipe: Recipe) -> None:
    """Everything that can be refused before time is spent: kinds, and their settings' names and types. Raises ConfigError."""
    task = make_task(recipe)
    kind = _entry(MODELS, recipe.model.kind, "model")
    invented = _keywords(kind.invent, but="seed")
    _check_options("model", recipe.model.options, {"source": str, **_keywords(kind.__init__, but="outputs"), **invented})
    if recipe.model.kind in _UNTRAINED and recipe.train.epochs:
        raise ConfigError(f"train.epochs = {recipe.train.epochs}, but model.kind = {recipe.model.kind!r} is never trained: set train.epochs = 0")
    source = recipe.model.options.get("source")
    if source is None:
        raise ConfigError('model.source is missing: give a model folder, package:NAME, or "scratch"')
    if source == SCRATCH and "config" not in recipe.model.options:
        raise ConfigError(f'model.source = "{SCRATCH}" needs model.config, the settings of the model to invent')
    for name in invented if source != SCRATCH else ():
        if name in recipe.model.options:
            raise ConfigError(f'model.source = "{source}" and model.{name} disagree: model.{name} is for source = "{SCRATCH}" only')
    if recipe.model.options.get("adapter") is not None:
        from kit.models.adapters import Adapter  # with torch, as the kind of model has it

        Adapter.of(recipe.model.options["adapter"])
    if hasattr(kind, "fit_at_once"):
        _check_at_once(recipe, task)
    if recipe.retrieve and not task.retrieves:
        raise ConfigError(f'task.kind = "{recipe.task.kind}" takes its texts as they are: leave [retrieve] out')
    if recipe.retrieve:
        _check_retriever("retrieve.retriever", recipe.retrieve.retriever.kind, recipe.retrieve.retriever.options)


def backbone(recipe: Recipe, folder: Path, base: Path, texts: Sequence[str], *, bundles: Path = BUNDLES) -> Path:
    """The folder that every fit of a run starts from: the pretrained one (of `bundles`, for bundle:NAME), or a new one made in `folder` from the texts."""
    source = recipe.model.options["source"]
    if source != SCRATCH:
        return model_folder(source, base, bundles)
    if not (folder / manifest.FILE).is_file():
        kind = _entry(MODELS, recipe.model.kind, "model")
        options = {name: value for name, value in recipe.model.options.items() if name in _BACKBONE_OPTIONS and name != "source"}
        shutil.rmtree(folder, ignore_errors=True)
        kind.invent(folder, lambda: texts, seed=recipe.train.seeds[0], **options)
        manifest.write(folder, "backbone", "backbone")
    return folder


def beside(recipe: Recipe, source: Path | None = None) -> list[Path]:
    """Files and folders that settings of the model name besides model.source: what `create` reads, or without a source `invent`. Raises errors of a missing one."""
    kind = _entry(MODELS, recipe.model.kind, "model")
    return kind.beside(recipe.model.options, source) if hasattr(kind, "beside") else []


def create_model(recipe: Recipe, task: Task, source: Path) -> Any:
    """A model to train, on the backbone in `source`. Raises ConfigError where it does not give what the task needs."""
    return _fitting(_entry(MODELS, recipe.model.kind, "model").create, recipe, task, source)


def load_model(recipe: Recipe, task: Task, folder: Path, *, base: Path | None = None) -> Any:
    """A trained model from its folder; where it has no weights of its own, on those in `base`, by default what model.source names."""
    load = _entry(MODELS, recipe.model.kind, "model").load
    if on_base(recipe):
        load = partial(load, base=base or model_folder(str(recipe.model.options["source"]), Path(recipe.data.folder)))
    return _fitting(load, recipe, task, folder)


def on_base(recipe: Recipe) -> bool:
    """Whether a fit of the recipe holds no weights, or only an adapter's, and needs those that model.source names beside it."""
    return recipe.model.kind in _UNTRAINED or bool(recipe.model.options.get("adapter"))


def base_name(recipe: Recipe) -> str | None:
    """Name of the bundle that packed fits of the recipe are scored on; None where they hold their own weights."""
    return str(recipe.model.options["source"]).removeprefix("bundle:") if on_base(recipe) else None


def may_stream(recipe: Recipe) -> bool:
    """Whether scoring may turn out to go layer by layer, where the model is larger than memory."""
    return recipe.model.kind in _UNTRAINED and recipe.model.options.get("streaming") != "never"


def load_tokens(recipe: Recipe, folder: Path) -> Tokens:
    """The tokens of a backbone's folder, or of a run."""
    return _entry(MODELS, recipe.model.kind, "model").tokens(folder)


def build_index(recipe: Recipe, artifacts: Path) -> Path:
    """The folder of the recipe's index below artifacts/index, built unless it is there already. Raises ConfigError, DataError."""
    settings = recipe.retrieve
    if settings is None:
        raise ConfigError(f"recipe {recipe.name!r} has no [retrieve] part, so there is no index to build")
    source = Path(recipe.data.folder) / settings.corpus
    options = _resolve_models(settings.retriever.options, Path(recipe.data.folder), artifacts / "bundles")
    folder = artifacts / "index" / index_name(recipe)
    if (folder / manifest.FILE).is_file():
        return folder
    corpus = Corpus.build(source, folder / "corpus")
    _entry(RETRIEVERS, settings.retriever.kind, "retrieve.retriever").build(corpus, folder / "retriever", **options)
    manifest.write(folder, folder.name, "index", retriever=settings.retriever.kind, passages=len(corpus))
    return folder


def index_name(recipe: Recipe) -> str:
    """Slug of the index a recipe needs: the corpus' name and 8 hex digits of its content and the retriever's settings."""
    assert recipe.retrieve is not None, "a recipe without [retrieve] has no index"
    source = Path(recipe.data.folder) / recipe.retrieve.corpus
    if not source.is_file():
        raise ConfigError(f"corpus {source} is missing: set data.folder or retrieve.corpus to where it is")
    return f"{manifest.slug(source.stem)}-{digest([manifest.sha256(source), recipe.retrieve.retriever.model_dump(mode='json')])}"


@dataclass(frozen=True)
class Library:
    """An opened index: corpus and retriever."""

    corpus: Corpus
    retriever: Retriever

    @classmethod
    def open(cls, folder: Path) -> Library:
        """Open a built index. Raises BundleError."""
        kind = manifest.read(folder).meta.get("retriever")
        if kind not in RETRIEVERS:
            raise BundleError(f"{folder}: the manifest names retriever {kind!r}, which this version of the kit does not have")
        return cls(Corpus.open(folder / "corpus"), _entry(RETRIEVERS, kind, "retrieve.retriever").load(folder / "retriever"))


def add_contexts(examples: Sequence[Any], task: Task, settings: RetrievePart, library: Library) -> list[Any]:
    """The examples with the context that the recipe's retrieval finds; the same function in training and in inference."""
    form = settings.context
    queries = task.queries(examples, form.query)
    hits = library.retriever.search(queries, form.passages)
    contexts = build_contexts(queries, library.corpus, hits, sentences=form.sentences, max_chars=form.max_chars)
    return [replace(example, context=context) for example, context in zip(examples, contexts, strict=True)]


def cached_contexts(examples: Sequence[Any], task: Task, recipe: Recipe, artifacts: Path) -> list[Any]:
    """`add_contexts` for training: the index is built when missing, and what was retrieved once is kept under artifacts/contexts."""
    settings = recipe.retrieve
    assert settings is not None, "a recipe without [retrieve] has no contexts"
    folder = build_index(recipe, artifacts)
    queries = task.queries(examples, settings.context.query)
    path = artifacts / "contexts" / f"{digest([folder.name, settings.context.model_dump(mode='json'), queries])}.json"
    if path.is_file():
        contexts = json.loads(path.read_text(encoding="utf-8"))
        return [replace(example, context=context) for example, context in zip(examples, contexts, strict=True)]
    found = add_contexts(examples, task, settings, Library.open(folder))
    manifest.write_atomically(path, json.dumps([example.context for example in found], ensure_ascii=False))
    return found


def digest(values: Any) -> str:
    """8 hex digits of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _fitting(make: Any, recipe: Recipe, task: Task, folder: Path) -> Any:
    options = {name: value for name, value in recipe.model.options.items() if name not in _BACKBONE_OPTIONS}
    always = getattr(_entry(MODELS, recipe.model.kind, "model"), "gives", None)
    if isinstance(always, str):  # whatever its settings
        _check_gives(always, recipe, task, options)
    model = make(folder, outputs=task.outputs, **options)
    _check_gives(model.gives, recipe, task, options)
    return model


def _check_gives(gives: str, recipe: Recipe, task: Task, options: Mapping[str, Any]) -> None:
    if not suffices(gives, task.needs):
        wrong = f"task {recipe.task.kind!r} with {recipe.task.options} needs {task.needs!r}, but model {recipe.model.kind!r} with {dict(options)} gives {gives!r}"
        raise ConfigError(f"{wrong}: {_WAYS[task.needs]}")


def _entry(registry: Mapping[str, str], kind: str, label: str) -> Any:
    """The class a registry names. Raises ConfigError for an unknown kind, DependencyError for a package that is missing."""
    if kind not in registry:
        raise ConfigError(f"{label}.kind = {kind!r} is unknown{nearest(kind, registry)}")
    module, _, name = registry[kind].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "kit":
            raise
        raise DependencyError(f"{label}.kind = {kind!r} needs package {error.name!r}: pip install {error.name}, or choose another kind ({', '.join(registry)})") from None


def _check_at_once(recipe: Recipe, task: Task) -> None:
    """Refuse what only training step by step could do."""
    if task.blends != "values":
        why = f'learns numbers as they are, and task.kind = "{recipe.task.kind}" predicts {task.blends}'
        raise ConfigError(f'model.kind = "{recipe.model.kind}" {why}: choose another kind of one of them')
    changed = {name: value for name, value in recipe.train if name in _STEPWISE and value != getattr(_USUAL, name)}
    changed |= {"epochs": recipe.train.epochs} if recipe.train.epochs != 1 else {}
    if changed:
        named = ", ".join(f"train.{name} = {value!r}" for name, value in changed.items())
        raise ConfigError(f'{named}: model.kind = "{recipe.model.kind}" is fitted at once: set train.epochs = 1, and leave the others out')


def _check_retriever(part: str, kind: str, options: Mapping[str, Any]) -> None:
    """Refuse wrong and missing options; one that is named like a retriever holds that retriever's options."""
    build = _entry(RETRIEVERS, kind, part).build
    known = _keywords(build)
    _check_options(part, options, known)
    for name in known:
        if name in RETRIEVERS:
            _check_retriever(f"{part}.{name}", name, options.get(name, {}))
        elif name not in options and inspect.signature(build).parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"key '{part}.{name}' is missing: retriever {kind!r} needs it")


def _keywords(function: Callable[..., Any], but: str = "") -> dict[str, Any]:
    """Types of a function's keyword-only parameters by name, without `but`."""
    hints = get_type_hints(function)
    return {name: hints[name] for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY and name != but}


def _check_options(part: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse what is not in `known` (name → type), and values of another type."""
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"unknown key '{part}.{name}'{nearest(name, known)}")
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(f"{part}.{name} = {value!r}: {_lower_first(error.errors()[0]['msg'])}") from None


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _resolve_models(options: Mapping[str, Any], base: Path, bundles: Path) -> dict[str, Any]:
    """Options with every `model` setting, at any depth, replaced by its folder on this machine."""
    resolve = partial(_resolve_models, base=base, bundles=bundles)
    return {
        name: resolve(value) if isinstance(value, dict) else str(model_folder(value, base, bundles)) if name == "model" else value
        for name, value in options.items()
    }
