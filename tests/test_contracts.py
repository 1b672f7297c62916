"""What every registered task, model and retriever promises, tried on the examples of tests/tiny.py.

A new entry of a registry is picked up by itself; tests/tiny.py then needs an example of it.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError, DataError
from kit.models import MODELS, Model
from kit.retrieval import RETRIEVERS, Hits, Retriever
from kit.retrieval.corpus import Corpus
from kit.tasks import TASKS, Feature, Task, Tokens
from tests import tiny

ROOT = Path(__file__).parents[1]
N = 5
NEEDS = {"row", "token", "next_token", "all_tokens"}


def entry(registry: dict[str, str], kind: str) -> Any:
    module, name = registry[kind].split(":")
    return getattr(import_module(module), name)


def example(examples: dict[str, Any], kind: str, name: str) -> Any:
    assert kind in examples, f"tests/tiny.py has no example of {kind!r}: add one to tiny.{name}, so that its contract is tested"
    return examples[kind]


def verbs(protocol: type) -> set[str]:
    return {name for name, value in vars(protocol).items() if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod))}


@pytest.mark.parametrize(("registry", "protocol"), [(TASKS, Task), (MODELS, Model), (RETRIEVERS, Retriever)], ids=["tasks", "models", "retrievers"])
def test_every_entry_has_all_verbs_with_the_contracts_parameters(registry: dict[str, str], protocol: type) -> None:
    for kind in registry:
        made = entry(registry, kind)
        assert inspect.getdoc(made), f"{kind} says what it is"
        for verb in verbs(protocol):
            assert hasattr(made, verb), f"{kind} has no {verb}"
            promised, given = vars(protocol)[verb], inspect.getattr_static(made, verb)
            if not isinstance(promised, property):
                assert_takes(getattr(given, "__func__", given), getattr(promised, "__func__", promised), f"{kind}.{verb}")
            assert isinstance(given, classmethod) == isinstance(promised, classmethod), f"{kind}.{verb}"


def assert_takes(given: Any, promised: Any, verb: str) -> None:
    """A call that the contract allows fits: the same positional names, every keyword, and nothing else that has no default."""
    wanted, actual = (list(inspect.signature(function).parameters.values()) for function in (promised, given))
    names = [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    places = [p for p in actual if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in places][: len(names)] == names, verb
    assert all(p.default is not p.empty for p in places[len(names) :]), f"{verb} asks for more than the contract"
    assert {p.name for p in wanted if p.kind is p.KEYWORD_ONLY} <= {p.name for p in actual if p.kind is p.KEYWORD_ONLY}, verb


@pytest.mark.parametrize(
    ("registry", "examples", "name"), [(TASKS, tiny.TASKS, "TASKS"), (MODELS, tiny.MODELS, "MODELS"), (RETRIEVERS, tiny.RETRIEVERS, "RETRIEVERS")]
)
def test_every_entry_has_an_example(registry: dict[str, str], examples: dict[str, Any], name: str) -> None:
    for kind in registry:
        example(examples, kind, name)
    assert set(examples) <= set(registry), f"tiny.{name} has examples of kinds that are not registered"


def test_a_kind_without_an_example_is_named() -> None:
    with pytest.raises(AssertionError, match=r"tests/tiny\.py has no example of 'essay_regression': add one to tiny\.TASKS"):
        example(tiny.TASKS, "essay_regression", "TASKS")


# models


@pytest.fixture(scope="module", params=sorted(MODELS))
def model_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(model_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of the kind, made by `invent`."""
    made = tmp_path_factory.mktemp(model_kind)
    entry(MODELS, model_kind).invent(made, lambda: tiny.TEXTS, seed=0, **example(tiny.MODELS, model_kind, "MODELS"))
    return made


@pytest.fixture
def model(model_kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    made = entry(MODELS, model_kind).create(folder, outputs=2)
    with torch.no_grad():
        for parameter in made.layer_groups()[-1]:
            parameter.add_(0.1 * torch.randn(parameter.shape))  # a head may start at zero
    return made


def encoded(tokens: Tokens) -> list[Any]:
    return [tokens.encode(tiny.TEXTS[row], tiny.TEXTS[row + 1][:20], max_length=40)[0] for row in range(N)]


def test_invent_gives_the_same_files_for_a_seed(model_kind: str, folder: Path, tmp_path: Path) -> None:
    entry(MODELS, model_kind).invent(tmp_path, lambda: tiny.TEXTS, seed=0, **tiny.MODELS[model_kind])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_forward_gives_what_the_model_says(model_kind: str, folder: Path, model: Any) -> None:
    tokens = entry(MODELS, model_kind).tokens(folder)
    batch = tokens.pad(encoded(tokens))
    output = model.eval()(batch)
    assert model.gives in NEEDS and output.dtype == torch.float32 and torch.isfinite(output).all()
    shapes = {"row": (N, 2), "token": (N, *batch.get("input_ids", torch.empty(0, 0)).shape[1:], 2)}
    assert tuple(output.shape) == shapes.get(model.gives, tuple(output.shape)) and output.shape[0] == N


def test_layer_groups_partition_the_parameters(model: Any) -> None:
    grouped = [id(parameter) for group in model.layer_groups() for parameter in group]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert len(model.layer_groups()) >= 2 and model.layer_groups()[-1]


def test_a_saved_model_and_its_tokens_come_back_equal(model_kind: str, folder: Path, model: Any, tmp_path: Path) -> None:
    kind = entry(MODELS, model_kind)
    tokens = kind.tokens(folder)
    model.save(tmp_path)
    tokens.save(tmp_path)
    loaded, again = kind.load(tmp_path, outputs=2), kind.tokens(tmp_path)
    first, second = tokens.pad(encoded(tokens)), again.pad(encoded(again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(second), model.eval()(first))
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_folder_without_weights_or_tokens_is_a_bundle_error(model_kind: str, tmp_path: Path) -> None:
    kind = entry(MODELS, model_kind)
    for open_it in (lambda: kind.load(tmp_path, outputs=1), lambda: kind.tokens(tmp_path)):
        with pytest.raises(BundleError, match=str(tmp_path)):
            open_it()


def test_what_training_may_ask_for_works_or_is_refused_by_name(model: Any) -> None:
    model.checkpoint_activations()
    model.reinit_layers(0)
    with pytest.raises(ConfigError, match=r"train\.reinit_layers = 99"):
        model.reinit_layers(99)
    if any(name.endswith("embeddings.weight") for name, _ in model.named_parameters()):
        table = model.input_embeddings
        assert any(parameter is table for parameter in model.parameters()) and table.ndim == 2
    else:
        with pytest.raises(ConfigError, match=r"train\.fgm"):
            model.input_embeddings  # noqa: B018


def test_tokens_keep_what_a_feature_counts_on(model_kind: str, folder: Path) -> None:
    tokens = entry(MODELS, model_kind).tokens(folder)
    encodings = encoded(tokens)
    assert all(encoding["input_ids"].ndim == 1 and len(encoding["input_ids"]) >= 1 for encoding in encodings)
    assert Feature(0, tuple(encodings)).tokens == sum(len(encoding["input_ids"]) for encoding in encodings)
    assert all(len(tensor) == N for tensor in tokens.pad(encodings).values())
    again = encoded(tokens)
    assert all((a[name] == b[name]).all() for a, b in zip(encodings, again, strict=True) for name in a)
    with pytest.raises(ConfigError, match="zzyzx"):
        tokens.id("zzyzx zzyzx")


# tasks, with every model that gives what they need


PAIRS = [(task, model) for task in sorted(TASKS) for model in sorted(MODELS)]


class Made:
    """A task, its examples, and a model that fits."""

    def __init__(self, task_kind: str, model_kind: str, folder: Path) -> None:
        sample = example(tiny.TASKS, task_kind, "TASKS")
        self.task = entry(TASKS, task_kind)(**sample.options)
        kind = entry(MODELS, model_kind)
        kind.invent(folder, lambda: tiny.TEXTS, seed=0, **example(tiny.MODELS, model_kind, "MODELS"))
        self.model = kind.create(folder, outputs=self.task.outputs)
        self.tokens = kind.tokens(folder)
        self.examples = sample.examples(N)
        self.write = sample.write


@pytest.fixture(params=PAIRS, ids=[f"{task}-{model}" for task, model in PAIRS])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    found = Made(*request.param, tmp_path)
    if found.model.gives != found.task.needs:
        pytest.skip(f"the task needs {found.task.needs!r}, this model gives {found.model.gives!r} with its defaults")
    return found


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_every_task_has_a_model_that_gives_what_it_needs(task_kind: str, tmp_path: Path) -> None:
    needs = entry(TASKS, task_kind).needs
    assert needs in NEEDS
    gives = {kind: Made(task_kind, kind, tmp_path / kind).model.gives for kind in MODELS}
    assert needs in gives.values(), f"no model gives {needs!r} with its defaults: {gives}"


def test_encode_gives_the_rows_in_order(made: Made) -> None:
    features = made.task.encode(made.examples, made.tokens)
    rows = [feature.row for feature in features]
    assert rows == sorted(rows) and set(rows) == set(range(N))
    assert all(feature.encodings for feature in features)
    assert made.task.encode([], made.tokens) == []


def test_scores_and_loss_are_finite_and_every_used_parameter_learns(made: Made) -> None:
    batch = made.task.collate(made.task.encode(made.examples, made.tokens), made.tokens)
    scores = made.task.scores(made.model.train()(batch), batch)
    loss = made.task.loss(scores, batch)
    assert loss.shape == () and torch.isfinite(loss) and torch.isfinite(scores).all()
    loss.backward()
    gradients = [parameter.grad for parameter in made.model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def test_a_few_steps_of_descent_lower_the_loss(made: Made) -> None:
    batch = made.task.collate(made.task.encode(made.examples, made.tokens), made.tokens)
    optimizer = torch.optim.Adam(made.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = made.task.loss(made.task.scores(made.model(batch), batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_decode_gives_a_prediction_per_example_and_nan_where_nobody_scored(made: Made) -> None:
    features = made.task.encode(made.examples, made.tokens)
    with torch.inference_mode():
        scores = []
        for feature in features:
            batch = made.task.collate([feature], made.tokens)
            scores.append(made.task.scores(made.model.eval()(batch), batch)[0].float().numpy())
    prediction = made.task.decode(scores, features, made.examples)
    assert prediction.shape == (N, made.task.width(made.examples)) and prediction.dtype == np.float32 and np.isfinite(prediction).all()
    some = [index for index, feature in enumerate(features) if feature.row != 2]
    partly = made.task.decode([scores[index] for index in some], [features[index] for index in some], made.examples)
    assert np.isnan(partly[2]).all()
    np.testing.assert_array_equal(np.delete(partly, 2, 0), np.delete(prediction, 2, 0))
    backwards = made.task.decode(scores[::-1], features[::-1], made.examples)
    np.testing.assert_array_equal(backwards, prediction)
    targets = made.task.targets(made.examples)
    assert len(targets) == len(made.task.strata(made.examples)) == N
    values = {name: metric(prediction, targets) for name, metric in made.task.metrics.items()}
    assert values and all(isinstance(value, float) and np.isfinite(value) for value in values.values())


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_a_written_table_is_read_back_and_its_submission_scores_the_same(task_kind: str, tmp_path: Path) -> None:
    sample = example(tiny.TASKS, task_kind, "TASKS")
    task, examples = entry(TASKS, task_kind)(**sample.options), sample.examples(N)
    read = task.read(read_table(sample.write(tmp_path / "table.csv", examples)))
    assert [one.id for one in read] == [one.id for one in examples]
    np.testing.assert_array_equal(task.targets(read), task.targets(examples))
    prediction = np.random.default_rng(0).random((N, task.width(examples)), np.float32)
    rows = task.rows(prediction, examples)
    assert rows["id"].tolist() == [one.id for one in examples] and rows.columns[0] == "id"
    rows.to_csv(tmp_path / "submission.csv", index=False)
    parsed, targets = task.parse(read_table(tmp_path / "submission.csv"), read_table(tmp_path / "table.csv"))
    name, metric = next(iter(task.metrics.items()))
    assert metric(parsed, targets) == pytest.approx(metric(prediction, task.targets(examples)), abs=1e-6), name
    partly = prediction.copy()
    partly[1:3] = np.nan
    assert task.parse(read_table(write(task.rows(partly, examples), tmp_path / "partly.csv")), read_table(tmp_path / "table.csv"))


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_a_written_submission_has_no_fault_and_a_spoiled_row_of_it_has_one(task_kind: str, tmp_path: Path) -> None:
    sample = example(tiny.TASKS, task_kind, "TASKS")
    task, examples = entry(TASKS, task_kind)(**sample.options), sample.examples(N)
    answers = read_table(sample.write(tmp_path / "table.csv", examples))
    rows = task.rows(np.random.default_rng(0).random((N, task.width(examples)), np.float32), examples).astype(str)
    for known in (answers, None):
        assert task.check(read_table(write(rows, tmp_path / "good.csv")), known) == []
    rows.iloc[2, 1:] = "no prediction at all"
    spoiled = read_table(write(rows, tmp_path / "spoiled.csv"))
    for known in (answers, None):
        (fault,) = task.check(spoiled, known)
        assert fault.row == 2 and fault.column in rows and fault.why
    with pytest.raises(DataError, match=r"spoiled\.csv: row 3") as error:
        task.parse(spoiled, answers)
    assert fault.why in str(error.value)
    with pytest.raises(DataError, match="is missing"):
        task.check(read_table(write(rows[["id"]], tmp_path / "bare.csv")), answers)


def write(rows: Any, path: Path) -> Path:
    rows.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_queries_and_augmented_examples_are_as_many_as_the_examples(task_kind: str) -> None:
    sample = example(tiny.TASKS, task_kind, "TASKS")
    task, examples = entry(TASKS, task_kind)(**sample.options), sample.examples(N)
    for form in ("prompt", "prompt_options"):
        queries = task.queries(examples, form)
        assert len(queries) == N and all(isinstance(query, str) and query for query in queries)
    before = repr(examples)
    augmented = task.augment(examples, np.random.default_rng(0))
    assert [one.id for one in augmented] == [one.id for one in examples] and repr(examples) == before
    again = task.augment(examples, np.random.default_rng(0))
    assert list(augmented) == list(again)


def tried(task_kind: str) -> tuple[Task, list[Any]]:
    sample = example(tiny.TASKS, task_kind, "TASKS")
    return entry(TASKS, task_kind)(**sample.options), sample.examples(N)


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_the_mean_merit_is_the_first_metric(task_kind: str) -> None:
    task, examples = tried(task_kind)
    prediction = np.random.default_rng(0).random((N, task.width(examples)), np.float32)
    prediction[1] = np.nan
    merit = task.merit(prediction, task.targets(examples))
    assert merit.shape == (N,) and merit.dtype == np.float64
    assert merit.mean() == pytest.approx(next(iter(task.metrics.values()))(prediction, task.targets(examples)), abs=1e-12)
    assert len({*merit.tolist()}) > 1


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_doubt_is_smallest_for_a_sure_row_and_largest_for_one_that_says_nothing(task_kind: str) -> None:
    task, examples = tried(task_kind)
    width = task.width(examples)
    rng = np.random.default_rng(0)
    sure, even = np.eye(width, dtype=np.float32), np.full((1, width), 1 / width, np.float32)
    others = rng.dirichlet(np.ones(width), 20).astype(np.float32)
    missing = others[:2] * np.array([[np.nan], [np.inf]], np.float32)
    doubt = task.doubt(np.concatenate([sure, even, others, missing]))
    assert doubt.shape == (width + 23,) and doubt.dtype == np.float64 and np.isfinite(doubt).all()
    assert doubt[:width] == pytest.approx([doubt[0]] * width) and doubt[-2:] == pytest.approx([doubt[width]] * 2)
    assert (doubt[0] < doubt[width + 1 : -2]).all() and (doubt[width + 1 : -2] < doubt[width]).all()
    assert task.doubt(even[:0]).shape == (0,)


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_sizes_grow_with_the_context_up_to_what_the_task_allows(task_kind: str) -> None:
    task, examples = tried(task_kind)
    sizes = [task.sizes(examples, np.full(N, chars)) for chars in (0, 40, 10**4, 10**8)]
    for size in (task.sizes(examples), *sizes):
        assert size.shape == (N,) and size.dtype == np.float64 and (size > 0).all()
    assert (sizes[0] < sizes[1]).all() and (sizes[1] < sizes[2]).all()
    np.testing.assert_array_equal(sizes[2], sizes[3])
    own = np.array([len(getattr(one, "context", "")) for one in examples])
    np.testing.assert_array_equal(task.sizes(examples), task.sizes(examples, own))
    assert task.sizes([]).shape == (0,)


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_a_view_is_a_task_for_the_same_weights_and_costs_no_more_unless_it_is_scored_beside(task_kind: str) -> None:
    task, examples = tried(task_kind)
    usual = task.sizes(examples, np.full(N, 1000))
    for name, view in task.views().items():
        assert name.isidentifier() and name != "full"
        assert (view.task.needs, view.task.outputs, view.task.width(examples)) == (task.needs, task.outputs, task.width(examples))
        assert [*view.task.metrics] == [*task.metrics]
        size = view.task.sizes(examples, np.full(N, 1000))
        assert view.more or ((size <= usual).all() and (size < usual).any()), name


def test_a_view_is_encoded_scored_and_decoded_as_the_task_is(made: Made) -> None:
    for view in made.task.views().values():
        features = view.task.encode(made.examples, made.tokens)
        batch = view.task.collate(features, made.tokens)
        with torch.inference_mode():
            scores = view.task.scores(made.model.eval()(batch), batch).float().numpy()
        prediction = view.task.decode([*scores], features, made.examples)
        assert prediction.shape == (N, made.task.width(made.examples)) and np.isfinite(prediction).all()


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_hints_have_a_number_for_every_column_of_a_prediction(task_kind: str) -> None:
    task, examples = tried(task_kind)
    hints = task.hints(examples)
    assert hints and all(name.isidentifier() and not name[-1].isdigit() for name in hints)
    for name, values in hints.items():
        assert values.shape == (N, task.width(examples)) and values.dtype == np.float32, name
        assert not np.isinf(values).any(), name
    (first, *_) = hints.values()
    assert np.isfinite(first).all() and (first.std(1) > 0).any()
    assert {name: values.shape for name, values in task.hints([]).items()} == dict.fromkeys(hints, (0, 0))


WITHOUT_TORCH = """
import sys
from pathlib import Path
import numpy as np
from kit.data.tables import read_table
from kit.tasks.{module} import {name}
task = {name}(**{options})
examples = task.read(read_table(Path(sys.argv[1])))
prediction = np.full((len(examples), task.width(examples)), 0.5, np.float32)
for view in (task, *(view.task for view in task.views().values())):
    view.sizes(examples), view.merit(prediction, view.targets(examples)), view.doubt(prediction), view.hints(examples)
    view.rows(prediction, examples), view.decode([], [], examples), view.metrics, view.queries(examples, "prompt")
print(len(examples), sorted({{"torch", "transformers"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("task_kind", sorted(TASKS))
def test_what_scores_nothing_needs_no_torch(task_kind: str, tmp_path: Path) -> None:
    sample = example(tiny.TASKS, task_kind, "TASKS")
    path = sample.write(tmp_path / "table.csv", sample.examples(N))
    module, name = TASKS[task_kind].removeprefix("kit.tasks.").split(":")
    code = WITHOUT_TORCH.format(module=module, name=name, options=sample.options)
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{N} []\n", "")


# retrievers (tests/retrieval/test_contract.py looks closer)


@pytest.mark.parametrize("kind", sorted(RETRIEVERS))
def test_a_retriever_is_built_loaded_and_searched(kind: str, tmp_path: Path) -> None:
    folder = tiny.encoder_folder(tmp_path / "encoder")
    options = filled(example(tiny.RETRIEVERS, kind, "RETRIEVERS"), str(folder))
    corpus = Corpus.build(tiny.write_corpus(tmp_path / "passages.csv"), tmp_path / "corpus")
    built = entry(RETRIEVERS, kind).build(corpus, tmp_path / "index", **options).search(list(tiny.TEXTS), 3)
    loaded = entry(RETRIEVERS, kind).load(tmp_path / "index").search(list(tiny.TEXTS), 3)
    assert isinstance(built, Hits) and built.ids.shape == built.scores.shape == (len(tiny.TEXTS), 3)
    assert (built.ids.dtype, built.scores.dtype) == (np.int64, np.float32)
    assert (built.ids == loaded.ids).all() and (built.scores == loaded.scores).all()
    assert built.ids[:, 0].tolist() == list(range(len(tiny.TEXTS)))
    with pytest.raises(BundleError, match="nowhere"):
        entry(RETRIEVERS, kind).load(tmp_path / "nowhere")


def filled(options: dict[str, Any], folder: str) -> dict[str, Any]:
    return {name: filled(value, folder) if isinstance(value, dict) else folder if value == "{encoder}" else value for name, value in options.items()}
