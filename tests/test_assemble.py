"""Recipe to task, tokens, model and retriever; indexes, contexts and backbones that are made once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit import assemble, manifest
from kit.assemble import Library
from kit.config import Recipe
from kit.errors import BundleError, ConfigError, DataError, DependencyError
from kit.models import MODELS
from kit.models.encoder import Encoder
from kit.retrieval import RETRIEVERS
from kit.tasks import TASKS, suffices
from kit.tasks.multiple_choice import MultipleChoice
from tests import tiny

SCRATCH = {"source": "scratch", "config": tiny.FAMILIES["deberta"], "vocab_size": 300, "dropout": 0.0}


@pytest.fixture(scope="module")
def competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.competition(tmp_path_factory.mktemp("competition"))


def scratch(folder: Path, *overrides: str) -> Recipe:
    made = tiny.recipe(folder)
    return Recipe.of({**made.model_dump(exclude_none=True), "model": {"kind": "encoder", **SCRATCH}}).with_overrides(overrides)


# what is refused before time is spent


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.kind=multipel_choice", r"task\.kind = 'multipel_choice' is unknown \(did you mean 'multiple_choice'\?\)"),
        ("model.kind=encodr", r"model\.kind = 'encodr' is unknown \(did you mean 'encoder'\?\)"),
        ("retrieve.retriever.kind=bm2", r"retrieve\.retriever\.kind = 'bm2' is unknown \(did you mean 'bm25'\?\)"),
        ("task.max_lenght=3", r"unknown key 'task\.max_lenght' \(did you mean 'max_length'\?\)"),
        ("model.poling='max'", r"unknown key 'model\.poling' \(did you mean 'pooling'\?\)"),
        ("model.outputs=2", r"unknown key 'model\.outputs'"),
        ("model.seed=2", r"unknown key 'model\.seed'"),
        ("retrieve.retriever.stopword='de'", r"unknown key 'retrieve\.retriever\.stopword' \(did you mean 'stopwords'\?\)"),
        ("task.max_length='long'", r"task\.max_length = 'long': input should be a valid integer"),
        ("task.label_smoothing=true", r"task\.label_smoothing = True: input should be a valid number"),
        ("task.label_smoothing=2", r"task\.label_smoothing = 2: give a number from 0"),
        ("model.dropout='much'", r"model\.dropout = 'much'"),
        ("model.source=3", r"model\.source = 3: input should be a valid string"),
        ("retrieve.retriever.k1='x'", r"retrieve\.retriever\.k1 = 'x'"),
        ("model.source=scratch", r'model\.source = "scratch" needs model\.config'),
        ("model.config={model_type='bert'}", r'model\.source = "encoder" and model\.config disagree'),
        ("model.vocab_size=300", r'model\.source = "encoder" and model\.vocab_size disagree'),
        ("retrieve.retriever={kind='dense'}", r"key 'retrieve\.retriever\.model' is missing: retriever 'dense' needs it"),
        ("retrieve.retriever={kind='hybrid'}", r"key 'retrieve\.retriever\.dense\.model' is missing: retriever 'dense' needs it"),
        ("retrieve.retriever={kind='hybrid', dense={model='encoder', indx='ivf'}}", r"'retrieve\.retriever\.dense\.indx' \(did you mean 'index'\?\)"),
        ("retrieve.retriever={kind='hybrid', dense={model='encoder'}, bm25={b='x'}}", r"retrieve\.retriever\.bm25\.b = 'x'"),
    ],
)
def test_check_names_the_key_and_what_is_wrong(competition: Path, override: str, message: str) -> None:
    recipe = tiny.recipe(competition, retrieve=True)
    assemble.check(recipe)
    with pytest.raises(ConfigError, match=message) as caught:
        assemble.check(recipe.with_overrides([override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=3", r"train\.epochs = 3: "),
        ("train.epochs=0", r"train\.epochs = 0: "),
        ("train.fgm=0.5", r"train\.fgm = 0\.5: "),
        ("train.awp=0.1", r"train\.awp = 0\.1: "),
        ("train.ema=0.99", r"train\.ema = 0\.99: "),
        ("train.freeze_layers=2", r"train\.freeze_layers = 2: "),
        ("train={epochs=2, swa=1}", r"train\.swa = 1, train\.epochs = 2: "),
    ],
)
def test_check_refuses_training_step_by_step_of_what_is_fitted_at_once(tmp_path: Path, override: str, message: str) -> None:
    parts = {"task": {"kind": "essay_regression"}, "model": {"kind": "frozen", "source": "encoder"}, "train": {"epochs": 1, "seeds": [1, 2]}}
    recipe = Recipe.of({**tiny.recipe(tmp_path).model_dump(exclude_none=True), **parts})
    assemble.check(recipe)
    with pytest.raises(ConfigError, match=r'model\.kind = "frozen" learns numbers as they are, and task\.kind = "multiple_choice" predicts probabilities: '):
        assemble.check(recipe.with_overrides(["task={kind='multiple_choice'}"]))
    with pytest.raises(ConfigError, match=message + r'model\.kind = "frozen" is fitted at once: set train\.epochs = 1, and leave the others out'):
        assemble.check(recipe.with_overrides([override]))


def test_beside_names_what_else_a_model_reads(tmp_path: Path) -> None:
    made = tiny.recipe(tmp_path).model_dump(exclude_none=True)
    for name in ("first", "second"):
        tiny.encoder_folder(tmp_path / name)
    frozen = Recipe.of({**made, "model": {"kind": "frozen", "source": "first", "also": ["second"]}})
    assert assemble.beside(frozen, tmp_path / "first") == [tmp_path / "second"] and assemble.beside(frozen) == []
    with pytest.raises(BundleError, match="third is missing"):
        assemble.beside(frozen.with_overrides(["model.also=['third']"]), tmp_path / "first")
    vectors = tmp_path / "vectors.txt"
    reader = Recipe.of({**made, "model": {"kind": "lstm", "source": "scratch", "config": {"vectors": str(vectors)}}})
    with pytest.raises(ConfigError, match=r"model\.config\.vectors = '.*vectors\.txt': no such file"):
        assemble.beside(reader)
    vectors.write_text("a 1 2\n")
    assert assemble.beside(reader) == [vectors] and assemble.beside(reader, tmp_path / "first") == []
    assert assemble.beside(tiny.recipe(tmp_path)) == []


def language(folder: Path, *overrides: str, **parts: dict[str, Any]) -> Recipe:
    """A recipe for a decoder, whose parts are those given."""
    values = tiny.recipe(folder).model_dump(exclude_none=True)
    own = {"task": {"kind": "multiple_choice_prompt", "form": "yes_no"}, "model": {"kind": "causal", "source": "llama"}}
    return Recipe.of({**values, **own, **parts}).with_overrides(overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adapter={aplha=3}", r"model\.adapter\.aplha is unknown \(did you mean 'alpha'\?\)"),
        ("model.adapter={r=0}", r"model\.adapter\.r = 0: give a whole number from 1"),
        ("model.adapter={r='eight'}", r'model\.adapter\.r = "eight": give a whole number from 1'),
        ("model.adapter={modules=3}", r'model\.adapter\.modules = 3: give "all-linear" or a list of names'),
        ("model.adapter={modules=['q_proj', 3]}", r"model\.adapter\.modules = .*: give"),
        ("model.adapter={rank_pattern={q_proj='many'}}", r'model\.adapter\.rank_pattern\.q_proj = "many": give a whole number from 1'),
        ("model.adapter={}", r"\[model\.adapter\] is empty: give at least r"),
        ("model.adapter=3", r"model\.adapter = 3: input should be a valid dictionary"),
        ("model.quantise='nf3'", r"model\.quantise = 'nf3': input should be 'none' or 'nf4'"),
        ("model={kind='encoder', source='bert', adapter={r=8}}", r"unknown key 'model\.adapter' \(known: "),
        ("model={kind='seq2seq', source='t5', adapter={r=8}}", r"unknown key 'model\.adapter' \(known: "),
        ("task={kind='causal_lm'}", r'task\.kind = "causal_lm" takes its texts as they are: leave \[retrieve\] out'),
        ("task={kind='extractive_qa'}", r'task\.kind = "extractive_qa" takes its texts as they are: leave \[retrieve\] out'),
        ("task={kind='essay_regression'}", r'task\.kind = "essay_regression" takes its texts as they are: leave \[retrieve\] out'),
        ("task.template='{context}'", r"task\.template = '\{context\}' has no \{prompt\}: put it where the prompt goes"),
    ],
)
def test_check_refuses_settings_of_language_models_by_name(tmp_path: Path, override: str, message: str) -> None:
    retrieve = {"corpus": "passages.csv", "retriever": {"kind": "bm25"}}
    recipe = language(tmp_path, retrieve=retrieve)
    assemble.check(recipe.with_overrides(["model.adapter={r=8, rank_pattern={q_proj=2}}", "model.quantise='nf4'"]))
    assemble.check(language(tmp_path, task={"kind": "causal_lm"}))
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        assemble.check(recipe.with_overrides([override]))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_source_is_refused(competition: Path) -> None:
    values = tiny.recipe(competition).model_dump(exclude_none=True)
    del values["model"]["source"]
    with pytest.raises(ConfigError, match=r"model\.source is missing: give a model folder, package:NAME, or \"scratch\""):
        assemble.check(Recipe.of(values))


@pytest.mark.parametrize("retriever", ["{kind='dense', model='encoder'}", "{kind='hybrid', dense={model='encoder'}, depth=7}", "{kind='bm25', k1=1}"])
def test_check_takes_every_retriever_with_its_settings(competition: Path, retriever: str) -> None:
    assemble.check(tiny.recipe(competition, f"retrieve.retriever={retriever}", retrieve=True))


def test_a_missing_package_is_named_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "entry_that_needs_much.py").write_text("import package_nobody_has.part\n\nclass Thing: ...\n")
    (tmp_path / "entry_with_a_fault.py").write_text("import kit.no_such_room\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODELS, "needy", "entry_that_needs_much:Thing")
    monkeypatch.setitem(MODELS, "faulty", "entry_with_a_fault:Thing")
    monkeypatch.setitem(RETRIEVERS, "needy", "entry_that_needs_much:Thing")
    recipe = tiny.recipe(tmp_path, retrieve=True)
    with pytest.raises(DependencyError, match=r"model\.kind = 'needy' needs package 'package_nobody_has': pip install package_nobody_has, or choose another"):
        assemble.check(recipe.with_overrides(["model.kind=needy"]))
    with pytest.raises(DependencyError, match=r"retrieve\.retriever\.kind = 'needy' needs package"):
        assemble.check(recipe.with_overrides(["retrieve.retriever.kind=needy"]))
    with pytest.raises(ModuleNotFoundError, match=r"kit\.no_such_room"):
        assemble.check(recipe.with_overrides(["model.kind=faulty"]))  # our own mistake is no missing package


# tasks and models


def test_the_task_has_the_recipes_settings(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "task.label_smoothing=0.1", "task.shuffle_options=false")
    assert assemble.make_task(recipe) == MultipleChoice(max_length=48, label_smoothing=0.1, shuffle_options=False)
    assert assemble.task_of_kind("multiple_choice") == MultipleChoice()
    with pytest.raises(ConfigError, match=r"task\.kind = 'essays' is unknown"):
        assemble.task_of_kind("essays")


def test_a_model_that_does_not_give_what_the_task_needs_is_refused(competition: Path) -> None:
    recipe = tiny.recipe(competition, "model.pooling=none")
    with pytest.raises(ConfigError, match=r"task 'multiple_choice' with .* needs 'row', but model 'encoder' with .*'pooling': 'none'.* gives 'token': set model"):
        assemble.create_model(recipe, assemble.make_task(recipe), competition / "encoder")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone of every kind of model that is trained."""
    folder = tmp_path_factory.mktemp("backbones")
    for kind, options in tiny.MODELS.items():
        assemble._entry(MODELS, kind, "model").invent(folder / kind, lambda: tiny.TEXTS, seed=0, **options)
    return folder


ADVICE = {
    "row": r"set model\.pooling .*, or model\.kind = \"encoder\"",
    "token": r"set model\.kind = \"encoder\" and model\.pooling = \"none\", or model\.kind = \"lstm\" or \"bidaf\"",
    "place": r"set model\.kind .* and model\.head = \"score\", or another task\.form",
    "answer_token": r"set model\.kind .* and model\.head = \"words\", or task\.form = \"score\"",
    "next_token": r"set model\.kind = \"causal\" and model\.head = \"words\"",
}
PAIRS = [
    (kind, name, model, gives, options)
    for kind in TASKS
    for name in tiny.TASKS[kind].settings
    for model, ways in tiny.WAYS.items()
    for gives, options in ways
]


@pytest.mark.parametrize(("kind", "name", "model", "gives", "options"), PAIRS, ids=["-".join([*pair[:4], *pair[4]]) for pair in PAIRS])
def test_a_model_fits_a_task_or_is_refused_with_what_to_change(
    backbones: Path, kind: str, name: str, model: str, gives: str, options: dict[str, Any]
) -> None:
    settings = tiny.TASKS[kind].settings[name]
    recipe = language(backbones, task={"kind": kind, **settings}, model={"kind": model, "source": "any", **options})
    task, folder = assemble.make_task(recipe), backbones / tiny.UNTRAINED.get(model, model)
    if suffices(gives, task.needs):
        assert assemble.create_model(recipe, task, folder).gives == gives
        return
    wrong = f"^task '{kind}' with .* needs '{task.needs}', but model '{model}' with .* gives '{gives}': {ADVICE[task.needs]}"
    with pytest.raises(ConfigError, match=wrong) as caught:
        assemble.create_model(recipe, task, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("causal_lm-usual", {"causal", "zero_shot"}),
        ("essay_regression-usual", {"encoder", "frozen", "rules"}),
        ("extractive_qa-usual", {"bidaf", "encoder", "lstm"}),
        ("multiple_choice-usual", {"encoder", "frozen", "rules"}),
        ("multiple_choice_prompt-letter", {"causal", "seq2seq", "zero_shot"}),
        ("multiple_choice_prompt-score", {"causal-score", "seq2seq-score"}),
    ],
)
def test_few_pairs_fit(kind: str, fits: set[str]) -> None:
    """As words, without a model: what is compared here is what the models above say they give."""
    needs = {f"{kind}-{name}": assemble.task_of_kind(kind).__class__(**settings).needs for kind in TASKS for name, settings in tiny.TASKS[kind].settings.items()}
    found = {"-".join([model, *([options["head"]] if "head" in options else [])]) for _, _, model, gives, options in PAIRS if suffices(gives, needs[kind])}
    assert found == fits


def test_a_created_model_is_saved_and_loaded_with_its_tokens(competition: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(competition, "model.pooling=attention")
    task = assemble.make_task(recipe)
    source = assemble.backbone(recipe, tmp_path / "unused", competition, [])
    assert source == competition / "encoder" and not (tmp_path / "unused").exists()
    model, tokens = assemble.create_model(recipe, task, source), assemble.load_tokens(recipe, source)
    model.save(tmp_path / "fold0")
    tokens.save(tmp_path)
    batch = task.collate(task.encode(tiny.questions(3), assemble.load_tokens(recipe, source)), tokens)
    loaded = assemble.load_model(recipe, task, tmp_path / "fold0")
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(batch), model.eval()(batch))


def test_a_source_may_be_a_bundle_of_the_artifacts_folder(competition: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(competition / "encoder", tmp_path / "bundles" / "my-model")
    manifest.write(weights, "my-model", "weights")
    recipe = tiny.recipe(competition, "model.source=bundle:my-model")
    assert assemble.backbone(recipe, tmp_path / "unused", competition, [], bundles=tmp_path / "bundles") == weights
    dense = ["retrieve.corpus=passages.csv", "retrieve.retriever.kind=dense", "retrieve.retriever.model=bundle:no-such"]
    with pytest.raises(BundleError, match="'no-such' is neither .*found bundles .my-model."):
        assemble.build_index(tiny.recipe(competition, *dense), tmp_path)


def test_a_source_that_is_nowhere_is_named(competition: Path, tmp_path: Path) -> None:
    with pytest.raises((BundleError, ConfigError), match="nowhere"):
        assemble.backbone(tiny.recipe(competition, "model.source=nowhere"), tmp_path, competition, [])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_backbone_from_scratch_is_the_same_for_a_seed_and_made_once(competition: Path, tmp_path: Path) -> None:
    recipe = scratch(competition)
    assemble.check(recipe)
    first = assemble.backbone(recipe, tmp_path / "a", competition, tiny.TEXTS)
    torch.manual_seed(12345)
    second = assemble.backbone(recipe, tmp_path / "b", competition, tiny.TEXTS)
    assert files(first) == files(second) and manifest.verify(first).kind == "backbone"
    other = assemble.backbone(recipe.with_overrides(["train.seeds=[1]"]), tmp_path / "c", competition, tiny.TEXTS)
    changed = {name for name, content in files(other).items() if content != files(first)[name]}
    assert changed == {"model.safetensors", manifest.FILE}
    before = {path: os.stat(path).st_mtime_ns for path in first.iterdir()}
    assert assemble.backbone(recipe, tmp_path / "a", competition, ["other texts"]) == first
    assert {path: os.stat(path).st_mtime_ns for path in first.iterdir()} == before
    assert isinstance(assemble.create_model(recipe, assemble.make_task(recipe), first), Encoder)


def test_a_half_made_backbone_is_made_anew(competition: Path, tmp_path: Path) -> None:
    recipe = scratch(competition)
    whole = assemble.backbone(recipe, tmp_path / "a", competition, tiny.TEXTS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "left_over.safetensors").write_text("half")
    assert files(assemble.backbone(recipe, tmp_path / "b", competition, tiny.TEXTS)) == files(whole)


# indexes and contexts


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with passages and an encoder, free to be changed."""
    tiny.write_corpus(tmp_path / "data" / "passages.csv")
    tiny.encoder_folder(tmp_path / "data" / "encoder")
    return tmp_path / "data"


def test_the_name_of_an_index_changes_with_its_content_and_settings_only(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, retrieve=True)
    name = assemble.index_name(recipe)
    assert name.startswith("passages-") and len(name) == len("passages-") + 8
    for same in ("retrieve.context.passages=3", "retrieve.context.max_chars=9", "train.lr=1", "task.max_length=99", "name=other", "data.folds=7"):
        assert assemble.index_name(recipe.with_overrides([same])) == name, same
    for other in ("retrieve.retriever.k1=1.2", "retrieve.retriever.stopwords=none", "retrieve.retriever={kind='dense', model='encoder'}"):
        assert assemble.index_name(recipe.with_overrides([other])) != name, other
    moved = tiny.write_corpus(tmp_path / "elsewhere" / "passages.csv").parent
    assert assemble.index_name(recipe.with_overrides([f"data.folder={str(moved)!r}"])) == name
    (data / "passages.csv").write_text((data / "passages.csv").read_text() + "p99,One passage more.\n")
    assert assemble.index_name(recipe) != name


def test_an_index_is_built_once_and_found_again(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, retrieve=True)
    folder = assemble.build_index(recipe, tmp_path / "artifacts")
    assert folder == tmp_path / "artifacts" / "index" / assemble.index_name(recipe)
    assert manifest.verify(folder).meta == {"retriever": "bm25", "passages": len(tiny.TEXTS)}
    before = {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")}
    assert assemble.build_index(recipe, tmp_path / "artifacts") == folder
    assert {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")} == before


def test_models_named_in_a_retriever_are_found_beside_the_data(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, "retrieve.retriever={kind='hybrid', dense={model='encoder'}}", retrieve=True)
    library = Library.open(assemble.build_index(recipe, tmp_path / "artifacts"))
    assert library.retriever.search([tiny.TEXTS[4]], 1).ids.tolist() == [[4]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda data: (data / "passages.csv").unlink(), ConfigError, r"passages\.csv is missing: set data\.folder or retrieve\.corpus"),
        (lambda data: (data / "passages.csv").write_text("id,text\n"), DataError, r"passages\.csv"),
    ],
)
def test_a_missing_or_empty_corpus_is_named(data: Path, tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], message: str) -> None:
    change(data)
    with pytest.raises(error, match=message):
        assemble.build_index(tiny.recipe(data, retrieve=True), tmp_path / "artifacts")


def test_a_recipe_without_retrieval_has_no_index(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe 'tiny' has no \[retrieve\] part"):
        assemble.build_index(tiny.recipe(data), tmp_path)


def test_an_index_of_a_retriever_we_do_not_have_is_refused(data: Path, tmp_path: Path) -> None:
    folder = assemble.build_index(tiny.recipe(data, retrieve=True), tmp_path)
    manifest.write(folder, folder.name, "index", retriever="colbert", passages=1)
    with pytest.raises(BundleError, match=r"the manifest names retriever 'colbert', which this version of the kit does not have"):
        Library.open(folder)
    with pytest.raises(BundleError, match="no MANIFEST"):
        Library.open(tmp_path / "nowhere")


def test_contexts_are_the_passages_found_and_the_examples_stay_otherwise_the_same(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, "retrieve.context.passages=1", retrieve=True)
    assert recipe.retrieve is not None
    examples = tiny.questions(9, context=False)
    library = Library.open(assemble.build_index(recipe, tmp_path))
    found = assemble.add_contexts(examples, MultipleChoice(), recipe.retrieve, library)
    assert [(q.id, q.prompt, q.options, q.answer) for q in found] == [(q.id, q.prompt, q.options, q.answer) for q in examples]
    assert all(q.context in tiny.TEXTS for q in found) and len({q.context for q in found}) > 3
    assert assemble.add_contexts([], MultipleChoice(), recipe.retrieve, library) == []


def test_cached_contexts_are_those_of_add_contexts_and_are_used_again(data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(data, retrieve=True)
    assert recipe.retrieve is not None
    examples, task = tiny.questions(6, context=False), MultipleChoice()
    first = assemble.cached_contexts(examples, task, recipe, tmp_path)
    library = Library.open(assemble.build_index(recipe, tmp_path))
    assert first == assemble.add_contexts(examples, task, recipe.retrieve, library)
    (kept,) = (tmp_path / "contexts").iterdir()
    kept.write_text(json.dumps([f"kept {row}" for row in range(6)]))
    assert [q.context for q in assemble.cached_contexts(examples, task, recipe, tmp_path)] == [f"kept {row}" for row in range(6)]


def test_contexts_are_found_anew_for_other_questions_settings_or_passages(data: Path, tmp_path: Path) -> None:
    recipe, task = tiny.recipe(data, retrieve=True), MultipleChoice()
    examples = tiny.questions(4, context=False)

    def kept_after(examples: list[Any], recipe: Recipe) -> int:
        assemble.cached_contexts(examples, task, recipe, tmp_path)
        return len(list((tmp_path / "contexts").iterdir()))

    assert kept_after(examples, recipe) == kept_after(tiny.questions(4), recipe) == 1, "the old context is no part of the query"
    assert kept_after(examples[::-1], recipe) == 2
    assert kept_after(examples, recipe.with_overrides(["retrieve.context.passages=1"])) == 3
    assert kept_after(examples, recipe.with_overrides(["retrieve.retriever.k1=0.5"])) == 4
    assert kept_after(examples, recipe.with_overrides(["train.lr=0.5"])) == 4
    (data / "passages.csv").write_text("id,text\np0,Entropy never falls.\n")
    assert kept_after(examples, recipe) == 5




def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert assemble.digest({"a": 1, "b": [1, 2]}) == assemble.digest({"b": [1, 2], "a": 1}) != assemble.digest({"b": [2, 1], "a": 1})
    assert len(assemble.digest(None)) == 8


def test_predictions_of_a_rebuilt_model_are_equal(competition: Path, tmp_path: Path) -> None:
    recipe = scratch(competition, "model.pooling=match")
    task = assemble.make_task(recipe)
    scores = []
    for name in "ab":
        folder = assemble.backbone(recipe, tmp_path / name, competition, tiny.TEXTS)
        model, tokens = assemble.create_model(recipe, task, folder), assemble.load_tokens(recipe, folder)
        batch = task.collate(task.encode(tiny.questions(2), tokens), tokens)
        with torch.inference_mode():
            scores.append(task.scores(model.eval()(batch), batch).numpy())
    np.testing.assert_array_equal(*scores)
