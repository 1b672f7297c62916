"""What every registered task, model and retriever promises, tried on the examples of tests/tiny.py.

A new entry of a registry is picked up by itself; tests/tiny.py then needs an example of it.
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kit.data.tables import read_table
from kit.errors import BundleError, ConfigError, DataError
from kit.models import MODELS, Model
from kit.retrieval import RETRIEVERS, Hits, Retriever
from kit.retrieval.corpus import Corpus
from kit.tasks import TASKS, Feature, Task, Tokens, suffices
from kit.vendor.bundle import fit_files
from tests import tiny

ROOT = Path(__file__).parents[1]
N = 5
NEEDS = {"row", "token", "place", "answer_token", "next_token"}


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
        for verb in verbs(protocol) - (OF_TRAINING if kind in {*tiny.UNTRAINED, *tiny.AT_ONCE} else set()):
            assert hasattr(made, verb), f"{kind} has no {verb}"
            promised, given = vars(protocol)[verb], inspect.getattr_static(made, verb)
            if not isinstance(promised, property):
                assert_takes(getattr(given, "__func__", given), getattr(promised, "__func__", promised), f"{kind}.{verb}")
            assert isinstance(given, classmethod) == isinstance(promised, classmethod), f"{kind}.{verb}"


OF_TRAINING = {"layer_groups", "input_embeddings", "checkpoint_activations", "reinit_layers"}


def assert_takes(given: Any, promised: Any, verb: str) -> None:
    """A call that the contract allows fits: the same positional names, every keyword, and nothing else that has no default."""
    wanted, actual = (list(inspect.signature(function).parameters.values()) for function in (promised, given))
    names = [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
    places = [p for p in actual if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in places][: len(names)] == names, verb
    assert all(p.default is not p.empty for p in places[len(names) :]), f"{verb} asks for more than the contract"
    assert {p.name for p in wanted if p.kind is p.KEYWORD_ONLY} <= {p.name for p in actual if p.kind is p.KEYWORD_ONLY}, verb


@pytest.mark.parametrize(
    ("registry", "examples", "name"), [(TASKS, tiny.TASKS, "TASKS"), (MODELS, tiny.WAYS, "WAYS"), (RETRIEVERS, tiny.RETRIEVERS, "RETRIEVERS")]
)
def test_every_entry_has_an_example(registry: dict[str, str], examples: dict[str, Any], name: str) -> None:
    for kind in registry:
        example(examples, kind, name)
    assert set(examples) <= set(registry), f"tiny.{name} has examples of kinds that are not registered"


def test_a_kind_without_an_example_is_named() -> None:
    with pytest.raises(AssertionError, match=r"tests/tiny\.py has no example of 'unheard_of': add one to tiny\.TASKS"):
        example(tiny.TASKS, "unheard_of", "TASKS")


# models


class Way(NamedTuple):
    """A kind of model with options, and what it gives then."""

    kind: str
    gives: str
    options: dict[str, Any]

    @property
    def is_trained(self) -> bool:
        return self.kind not in {*tiny.UNTRAINED, *tiny.AT_ONCE}

    @property
    def base(self) -> str:
        """The kind of the folders it is made of."""
        return tiny.UNTRAINED.get(self.kind, self.kind)

    def load(self, folder: Path, base: Path) -> Any:
        beside = {"base": base} if "adapter" in self.options or self.kind in tiny.UNTRAINED else {}
        return entry(MODELS, self.kind).load(folder, outputs=2, **beside, **self.options)

    def __str__(self) -> str:
        return "-".join([self.kind, *self.options])


MODEL_WAYS = [Way(kind, *way) for kind in sorted(MODELS) for way in example(tiny.WAYS, kind, "WAYS")]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A backbone of every kind that is trained, made by `invent`."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in sorted(MODELS) if kind not in tiny.UNTRAINED}
    for kind, folder in folders.items():
        entry(MODELS, kind).invent(folder, lambda: tiny.TEXTS, seed=0, **example(tiny.MODELS, kind, "MODELS"))
    return folders


@pytest.fixture(params=MODEL_WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def folder(way: Way, backbones: dict[str, Path]) -> Path:
    return backbones[way.base]


@pytest.fixture
def tokens(way: Way, folder: Path) -> Any:
    return entry(MODELS, way.kind).tokens(folder)


@pytest.fixture
def model(way: Way, folder: Path, tokens: Any) -> Any:
    torch.manual_seed(0)
    made = entry(MODELS, way.kind).create(folder, outputs=2, **way.options)
    with torch.no_grad():
        for parameter in made.layer_groups()[-1] if way.is_trained and "adapter" not in way.options else ():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # a head may start at zero
    if way.kind in tiny.AT_ONCE:
        made.fit_at_once([batch_of(way, tokens)], np.random.default_rng(0).random((N, 2), np.float32))
    return made


def encoded(tokens: Tokens) -> list[Any]:
    return [tokens.encode(tiny.TEXTS[row], tiny.TEXTS[row + 1][:20], max_length=40)[0] for row in range(N)]


def batch_of(way: Way, tokens: Any) -> dict[str, torch.Tensor]:
    """N texts in pairs, or N trees of one branch, each asked at its last token."""
    if way.gives in ("row", "token"):
        return tokens.pad(encoded(tokens))
    texts = [[tokens.prompt(tiny.TEXTS[row], (0, 0), max_length=40), tokens.branch(tiny.TEXTS[row + 1][:20])] for row in range(N)]
    batch = tokens.join(texts)
    lengths = torch.tensor([sum(len(part["input_ids"]) for part in text) for text in texts])
    at = torch.arange(N) * batch["branch"].shape[1] + lengths - 1
    return batch | {"at": at, "token": batch["input_ids"].flatten()[at]}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_invent_gives_the_same_files_for_a_seed_or_is_refused(kind: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    invent = entry(MODELS, kind).invent
    if kind in tiny.UNTRAINED:
        with pytest.raises(ConfigError, match=rf'model\.kind = "{kind}"'):
            invent(tmp_path, lambda: tiny.TEXTS, seed=0)
        return
    invent(tmp_path, lambda: tiny.TEXTS, seed=0, **tiny.MODELS[kind])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {path.name: path.read_bytes() for path in backbones[kind].iterdir()}


def test_forward_gives_what_the_model_says(way: Way, tokens: Tokens, model: Any) -> None:
    batch = batch_of(way, tokens)
    output = model.eval()(batch)
    assert model.gives == way.gives in NEEDS and output.dtype == torch.float32 and torch.isfinite(output).all()
    shapes = {"row": (N, 2), "token": (N, *batch.get("input_ids", torch.empty(0, 0)).shape[1:], 2), "place": (N, 2)}
    assert tuple(output.shape) == shapes.get(model.gives, (N,))


def test_layer_groups_partition_the_parameters(way: Way, model: Any) -> None:
    if not way.is_trained:
        return
    grouped = [id(parameter) for group in model.layer_groups() for parameter in group]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert len(model.layer_groups()) >= 2 and (model.layer_groups()[-1] or way.gives.endswith("_token"))  # a vocabulary's head may be the embeddings


def test_a_saved_model_and_its_tokens_come_back_equal(way: Way, folder: Path, tokens: Tokens, model: Any, tmp_path: Path) -> None:
    fit, packed = tmp_path / "fit", tmp_path / "packed"
    fit.mkdir()
    model.save(fit)
    tokens.save(fit)
    for path in fit_files(fit):  # nothing else travels in a bundle
        (packed / path.relative_to(fit)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, packed / path.relative_to(fit))
    loaded, again = way.load(packed, folder), entry(MODELS, way.kind).tokens(packed)
    first, second = batch_of(way, tokens), batch_of(way, again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(second), model.eval()(first))
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_folder_without_weights_or_tokens_is_a_bundle_error(way: Way, folder: Path, tmp_path: Path) -> None:
    for open_it in (lambda: way.load(tmp_path, folder), lambda: entry(MODELS, way.kind).tokens(tmp_path)):
        with pytest.raises(BundleError, match=str(tmp_path)) as error:
            open_it()
        assert "\n" not in str(error.value)


def test_what_training_may_ask_for_works_or_is_refused_by_name(way: Way, model: Any) -> None:
    if not way.is_trained:
        return
    model.checkpoint_activations()
    model.reinit_layers(0)
    with pytest.raises(ConfigError, match=r"train\.reinit_layers = 99"):
        model.reinit_layers(99)
    if any(isinstance(module, torch.nn.Embedding) for module in model.modules()):
        table = model.input_embeddings
        assert any(parameter is table for parameter in model.parameters()) and table.ndim == 2
    else:
        with pytest.raises(ConfigError, match=r"train\.fgm"):
            model.input_embeddings  # noqa: B018


def test_tokens_keep_what_a_feature_counts_on(tokens: Tokens) -> None:
    encodings = encoded(tokens)
    assert all(encoding["input_ids"].ndim == 1 and len(encoding["input_ids"]) >= 1 for encoding in encodings)
    assert Feature(0, tuple(encodings)).tokens == sum(len(encoding["input_ids"]) for encoding in encodings)
    assert all(len(tensor) == N for tensor in tokens.pad(encodings).values())
    again = encoded(tokens)
    assert all((a[name] == b[name]).all() for a, b in zip(encodings, again, strict=True) for name in a)
    with pytest.raises(ConfigError, match="zzyzx"):
        tokens.id("zzyzx zzyzx")


# tasks, with every model that gives what they need


class Tried(NamedTuple):
    """A task and examples of it."""

    task: Any
    examples: list[Any]
    sample: tiny.TaskExample


CASES = {f"{kind}-{name}": (kind, name) for kind in sorted(TASKS) for name in example(tiny.TASKS, kind, "TASKS").settings}


def tried(case: str) -> Tried:
    kind, name = CASES[case]
    sample = tiny.TASKS[kind]
    return Tried(entry(TASKS, kind)(**sample.settings[name]), sample.examples(N), sample)


PAIRS = [(case, way) for case in CASES for way in MODEL_WAYS if way.is_trained and suffices(way.gives, tried(case).task.needs)]


class Made:
    """A task, its examples, and a model that fits."""

    def __init__(self, case: str, way: Way, folder: Path) -> None:
        self.task, self.examples, _ = tried(case)
        torch.manual_seed(0)
        self.model = entry(MODELS, way.kind).create(folder, outputs=self.task.outputs, **way.options)
        self.tokens = entry(MODELS, way.kind).tokens(folder)


@pytest.fixture(params=PAIRS, ids=[f"{case}-{way}" for case, way in PAIRS])
def made(request: pytest.FixtureRequest, backbones: dict[str, Path]) -> Made:
    case, way = request.param
    return Made(case, way, backbones[way.base])


def test_every_task_has_a_model_that_gives_what_it_needs() -> None:
    assert {tried(case).task.needs for case in CASES} <= NEEDS
    assert {case for case, _ in PAIRS} == {*CASES}
    assert {way.kind for case, way in PAIRS if case == "multiple_choice_prompt-likelihood"} == {"causal", "seq2seq"}
    assert {way.kind for case, way in PAIRS if case.startswith("causal_lm")} == {"causal"}


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


@pytest.mark.parametrize("case", CASES)
def test_a_written_table_is_read_back_and_its_submission_scores_the_same(case: str, tmp_path: Path) -> None:
    task, examples, sample = tried(case)
    if not task.submits:
        assert_refuses(task, examples, sample, tmp_path)
        return
    known = read_table(sample.write(tmp_path / "table.csv", examples), ids=task.id_column)
    read = task.read(known)
    assert [one.id for one in read] == [one.id for one in examples]
    np.testing.assert_array_equal(task.targets(read), task.targets(examples))
    prediction = sample.predictions(task.width(examples)).others[:N].copy()
    rows = task.rows(prediction, examples)
    assert rows[task.id_column].tolist() == [one.id for one in examples] and rows.columns[0] == task.id_column
    rows.to_csv(tmp_path / "submission.csv", index=False)
    parsed, targets = task.parse(read_table(tmp_path / "submission.csv", ids=task.id_column), known)
    name, metric = next(iter(task.metrics.items()))
    assert metric(parsed, targets) == pytest.approx(metric(prediction, task.targets(examples)), abs=1e-6), name
    partly = prediction.copy()
    partly[1:3] = np.nan
    assert task.parse(read_table(write(task.rows(partly, examples), tmp_path / "partly.csv"), ids=task.id_column), known)


@pytest.mark.parametrize("case", CASES)
def test_a_written_submission_has_no_fault_and_a_spoiled_row_of_it_has_one(case: str, tmp_path: Path) -> None:
    task, examples, sample = tried(case)
    if not task.submits:
        return
    answers = read_table(sample.write(tmp_path / "table.csv", examples), ids=task.id_column)
    rows = task.rows(sample.predictions(task.width(examples)).others[:N], examples).astype(str)
    for known in (answers, None):
        assert task.check(read_table(write(rows, tmp_path / "good.csv"), ids=task.id_column), known) == []
    rows.iloc[2, 1:] = sample.spoilt
    spoiled = read_table(write(rows, tmp_path / "spoiled.csv"), ids=task.id_column)
    for known in (answers, None):
        (fault,) = task.check(spoiled, known)
        assert fault.row == 2 and fault.column in rows and fault.why
    with pytest.raises(DataError, match=r"spoiled\.csv: row 3") as error:
        task.parse(spoiled, answers)
    assert fault.why in str(error.value)
    with pytest.raises(DataError, match="is missing"):
        task.check(read_table(write(rows[[task.id_column]], tmp_path / "bare.csv"), ids=task.id_column), answers)


def assert_refuses(task: Any, examples: list[Any], sample: tiny.TaskExample, folder: Path) -> None:
    """A task without a submission says so, whatever is asked."""
    table = read_table(sample.write(folder / "table.csv", examples))
    prediction = np.zeros((N, task.width(examples)), np.float32)
    for verb in (lambda: task.check(table, None), lambda: task.check(table, table), lambda: task.parse(table, table), lambda: task.rows(prediction, examples)):
        with pytest.raises(ConfigError, match=r"has no submission") as error:
            verb()
        assert "\n" not in str(error.value)


def write(rows: Any, path: Path) -> Path:
    rows.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("case", CASES)
def test_queries_and_augmented_examples_are_as_many_as_the_examples(case: str) -> None:
    task, examples, _ = tried(case)
    for form in ("prompt", "prompt_options"):
        queries = task.queries(examples, form)
        assert len(queries) == N and all(isinstance(query, str) and query for query in queries)
    before = repr(examples)
    augmented = task.augment(examples, np.random.default_rng(0))
    assert [one.id for one in augmented] == [one.id for one in examples] and repr(examples) == before
    again = task.augment(examples, np.random.default_rng(0))
    assert list(augmented) == list(again)


@pytest.mark.parametrize("case", CASES)
def test_the_mean_merit_is_the_first_metric_or_rises_with_it(case: str) -> None:
    task, examples, sample = tried(case)
    prediction = sample.predictions(task.width(examples)).others[:N].copy()
    prediction[1] = np.nan
    merit = task.merit(prediction, task.targets(examples))
    assert merit.shape == (N,) and merit.dtype == np.float64
    if task.blends == "values":
        nearer = np.where(np.isfinite(prediction), (prediction + task.targets(examples)) / 2, prediction)
        assert (np.delete(task.merit(nearer, task.targets(examples)) - merit, 1) > 0).all()
        assert next(iter(task.metrics.values()))(nearer, task.targets(examples)) > next(iter(task.metrics.values()))(prediction, task.targets(examples))
        return
    assert merit.mean() == pytest.approx(next(iter(task.metrics.values()))(prediction, task.targets(examples)), abs=1e-12)
    assert len({*merit.tolist()}) > 1


@pytest.mark.parametrize("case", CASES)
def test_doubt_is_smallest_for_a_sure_row_and_largest_for_one_that_says_nothing(case: str) -> None:
    task, examples, sample = tried(case)
    sure, others, nothing = sample.predictions(task.width(examples))
    missing = others[:2] * np.array([[np.nan], [np.inf]], np.float32)
    doubt = task.doubt(np.concatenate([sure, others, nothing, missing]))
    assert doubt.shape == (len(sure) + 23,) and doubt.dtype == np.float64 and np.isfinite(doubt).all()
    surest, between, most = doubt[: len(sure)], doubt[len(sure) : -3], doubt[-3]
    if task.blends == "values":  # nothing tells how sure they are
        assert len({*surest.tolist(), *between.tolist()}) == 1 and doubt[0] < most and doubt[-2:] == pytest.approx([most] * 2)
        return
    assert surest == pytest.approx([doubt[0]] * len(sure)) and doubt[-2:] == pytest.approx([most] * 2)
    assert (doubt[0] < between).all() and (between < most).all()
    assert task.doubt(nothing[:0]).shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_sizes_grow_with_the_context_up_to_what_the_task_allows(case: str) -> None:
    task, examples, _ = tried(case)
    sizes = [task.sizes(examples, np.full(N, chars)) for chars in (0, 40, 10**4, 10**8)]
    for size in (task.sizes(examples), *sizes):
        assert size.shape == (N,) and size.dtype == np.float64 and (size > 0).all()
    if hasattr(examples[0], "context"):
        assert (sizes[0] < sizes[1]).all() and (sizes[1] < sizes[2]).all()
        assert (sizes[2] <= sizes[3]).all()  # windows go on, everything else is cut
    else:  # examples have no context
        assert all((size == task.sizes(examples)).all() for size in sizes)
    own = np.array([len(getattr(one, "context", "")) for one in examples])
    np.testing.assert_array_equal(task.sizes(examples), task.sizes(examples, own))
    assert task.sizes([]).shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_a_view_is_a_task_for_the_same_weights_and_costs_no_more_unless_it_is_scored_beside(case: str) -> None:
    task, examples, _ = tried(case)
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


@pytest.mark.parametrize("case", CASES)
def test_hints_have_a_number_for_every_column_of_a_prediction(case: str) -> None:
    task, examples, _ = tried(case)
    hints = task.hints(examples)
    assert hints and all(name.isidentifier() and not name[-1].isdigit() for name in hints)
    for name, values in hints.items():
        assert values.shape == (N, task.width(examples)) and values.dtype == np.float32, name
        assert not np.isinf(values).any(), name
    (first, *_) = hints.values()
    assert np.isfinite(first).all() and first.std() > 0
    assert {name: values.shape for name, values in task.hints([]).items()} == dict.fromkeys(hints, (0, task.width([])))


WITHOUT_TORCH = """
import sys
from pathlib import Path
import numpy as np
from kit.data.tables import read_table
from kit.tasks.{module} import {name}
task = {name}(**{options})
examples = task.read(read_table(Path(sys.argv[1]), ids=task.id_column))
prediction = np.full((len(examples), task.width(examples)), 0.5, np.float32)
for view in (task, *(view.task for view in task.views().values())):
    view.sizes(examples), view.merit(prediction, view.targets(examples)), view.doubt(prediction), view.hints(examples)
    view.submits and view.rows(prediction, examples), view.decode([], [], examples), view.metrics, view.queries(examples, "prompt")
print(len(examples), sorted({{"torch", "transformers"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("case", CASES)
def test_what_scores_nothing_needs_no_torch(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    sample = tiny.TASKS[kind]
    path = sample.write(tmp_path / "table.csv", sample.examples(N))
    module, name = TASKS[kind].removeprefix("kit.tasks.").split(":")
    code = WITHOUT_TORCH.format(module=module, name=name, options=sample.settings[settings])
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
