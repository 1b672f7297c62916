"""kit.config: TOML in, checked values out, every mistake named by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kit.config import Recipe, shipped_recipes
from kit.errors import ConfigError

TOML = """
[task]
kind = "multiple_choice"
max_length = 384

[model]
kind = "encoder"
backbone = "deberta-v3-base"

[data]
train = "exam.csv"
extra = ["more.csv"]

[retrieve]
corpus = "passages.parquet"
retriever = { kind = "hybrid", bm25 = { k1 = 1.2 } }

[train]
lr = 2e-5
seeds = [0, 1]
"""


def recipe(**parts: Any) -> Recipe:
    return Recipe.of({"name": "r", "task": {"kind": "t"}, "model": {"kind": "m"}, **parts})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "exam_base.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def test_values_of_the_file_and_defaults_are_resolved(path: Path) -> None:
    read = Recipe.load(path)
    assert read.name == "exam_base"
    assert (read.task.kind, read.task.options) == ("multiple_choice", {"max_length": 384})
    assert (read.data.train, read.data.extra, read.data.folds) == ("exam.csv", ("more.csv",), 5)
    assert (read.train.lr, read.train.seeds, read.train.schedule) == (2e-5, (0, 1), "linear")
    assert read.retrieve is not None
    assert (read.retrieve.retriever.kind, read.retrieve.retriever.options) == ("hybrid", {"bm25": {"k1": 1.2}})
    assert read.retrieve.context.passages == 5


def test_a_recipe_is_frozen(path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe.load(path).train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=8", r"unknown key 'train.batchsize' \(did you mean 'batch_size'\?\)"),
        ("trian.lr=1", r"unknown key 'trian' \(did you mean 'train'\?\)"),
        ("retrieve.context.passage=3", r"unknown key 'retrieve.context.passage' \(did you mean 'passages'\?\)"),
        ("infer.zzz=3", r"unknown key 'infer.zzz' \(known: batch_tokens, precision\)"),
        ("train.epochs=-1", r"train.epochs = -1: input should be greater than or equal to 0"),
        ("train.lr=fast", r"train.lr = 'fast': input should be a valid number"),
        ("train.lr=inf", r"train.lr = inf: input should be a finite number"),
        ("train.schedule=liner", r"train.schedule = 'liner': input should be 'linear', 'cosine'"),
        ("data.folds=1", r"data.folds = 1: input should be greater than or equal to 2"),
        ("name=My Recipe", r"name = 'My Recipe': string should match pattern"),
        ("train.seeds=[0, 1.5]", r"train.seeds.1 = 1.5"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Recipe.load(path, [override])
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("key", ["task", "model"])
def test_a_missing_part_is_named(key: str) -> None:
    values = {"name": "r", "task": {"kind": "t"}, "model": {"kind": "m"}}
    del values[key]
    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        Recipe.of(values)


def test_a_part_without_its_kind_or_corpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"key 'model.kind' is missing"):
        recipe(model={"backbone": "x"})
    with pytest.raises(ConfigError, match=r"key 'retrieve.corpus' is missing"):
        recipe(retrieve={})


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ({"data": {"fold_by": "grouped"}}, ("data.fold_by", "data.group")),
        ({"data": {"group": "title"}}, ("data.fold_by", "data.group")),
        ({"train": {"fgm": 0.5, "freeze_embeddings": True}}, ("train.fgm", "train.freeze_embeddings")),
        ({"train": {"fgm": 0.5, "freeze_layers": 2}}, ("train.fgm", "train.freeze_layers")),
        ({"train": {"patience": 1, "keep": "last"}}, ("train.patience", "train.keep")),
        ({"train": {"fgm": 0.5, "awp": 0.1}}, ("train.fgm", "train.awp")),
        ({"train": {"awp_from": 1}}, ("train.awp_from = 1", "train.awp = 0")),
        ({"train": {"awp": 0.1, "awp_from": 3}}, ("train.awp_from = 3", "train.epochs = 3")),
        ({"train": {"swa": 4}}, ("train.swa = 4", "train.epochs = 3")),
        ({"train": {"ema": 0.9, "swa": 1}}, ("train.ema", "train.swa")),
        ({"train": {"swa": 1, "patience": 1}}, ("train.swa", "train.patience")),
        ({"train": {"pretrain_epochs": 1}}, ("data.pretrain", "train.pretrain_epochs")),
        ({"data": {"pretrain": ["a.csv"]}}, ("data.pretrain", "train.pretrain_epochs")),
        ({"train": {"pretrain_epochs": 1, "epochs": 0}, "data": {"pretrain": ["a.csv"]}}, ("train.pretrain_epochs = 1", "train.epochs = 0")),
        ({"train": {"seeds": []}}, ("train.seeds",)),
        ({"train": {"seeds": [1, 1]}}, ("train.seeds",)),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(parts: dict[str, Any], keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe(**parts)
    assert all(key in str(refused.value) for key in keys)


def test_settings_that_agree_are_accepted() -> None:
    agreed = recipe(data={"fold_by": "grouped", "group": "title"}, train={"fgm": 0.5, "patience": 1})
    assert (agreed.data.group, agreed.train.fgm) == ("title", 0.5)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-5", 1e-5),
        ("train.seeds=[3, 4]", (3, 4)),
        ("train.gradient_checkpointing=true", True),
        ("train.schedule=cosine", "cosine"),
        ('train.schedule="cosine"', "cosine"),
        (" train.schedule = cosine ", "cosine"),
        ("data.folder=/kaggle/input/exam", "/kaggle/input/exam"),
        ("data.train=a=b.csv", "a=b.csv"),
        ("retrieve.context.max_chars=900", 900),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(path: Path, override: str, value: object) -> None:
    for changed in (Recipe.load(path, [override]), Recipe.load(path).with_overrides([override])):
        found: Any = changed
        for name in override.partition("=")[0].strip().split("."):
            found = getattr(found, name)
        assert found == value


def test_an_override_reaches_a_kinds_own_settings_and_the_last_one_wins(path: Path) -> None:
    changed = Recipe.load(path).with_overrides(["task.max_length=10", "task.max_length=512", "model.pooling=mean"])
    assert (changed.task.options, changed.model.options) == ({"max_length": 512}, {"backbone": "deberta-v3-base", "pooling": "mean"})


def test_overrides_leave_the_recipe_they_come_from_as_it_was(path: Path) -> None:
    read = Recipe.load(path)
    read.with_overrides(["task.max_length=1", "retrieve.retriever.bm25.k1=2.0"])
    assert read == Recipe.load(path)
    assert read.with_overrides([]) == read


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3", ""])
def test_a_malformed_override_shows_how_to_write_one(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"write key.path=value, for example train.lr=1e-5"):
        Recipe.load(path, [override])


def test_an_override_below_a_value_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="'lr' is a value, not a table"):
        Recipe.load(path, ["train.lr.x=3"])


@pytest.mark.parametrize("content", [b"[task\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"r.toml: cannot be read as TOML"):
        Recipe.load(path)


def test_an_unknown_recipe_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="recipe 'no-such' is neither a file nor shipped with the kit"):
        Recipe.load("no-such")


def test_shipped_recipes_load_by_name_and_survive_a_round_trip(tmp_path: Path) -> None:
    for name, path in shipped_recipes().items():
        shipped = Recipe.load(name)
        assert shipped.name == name
        assert shipped == Recipe.load(path)
        assert_survives(shipped, tmp_path)


def test_toml_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    read = Recipe.load(path)
    assert_survives(read, tmp_path)
    assert_survives(read.with_overrides(["train.head_lr=1e-4", "data.fold_by=grouped", "data.group=title"]), tmp_path)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = texts | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)


@given(st.dictionaries(texts.filter(lambda key: key not in ("kind", "options") and not key.startswith("model_")), values, max_size=4))
def test_any_settings_of_a_kind_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    made = recipe(model={"kind": "m", **options}, train={"lr": 1e-7, "clip": 1e16})
    assert_survives(made, tmp_path_factory.getbasetemp())


def assert_survives(made: Recipe, folder: Path) -> None:
    path = folder / "written.toml"
    path.write_bytes(made.to_toml().encode())
    read = Recipe.load(path)
    assert read == made
    assert read.digest == made.digest


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=1e-6",
        "train.seeds=[1]",
        "task.max_length=10",
        "model.backbone=other",
        "data.fold_seed=1",
        "data.train=other.csv",
        "retrieve.context.passages=2",
        "retrieve.retriever.bm25.k1=2.0",
        "data.teacher=run:other",
        "train.optimizer=paged_adamw_8bit",
        "train.awp=0.1",
        "train.ema=0.9",
        "train.swa=2",
    ],
)
def test_the_digest_changes_with_what_is_trained(path: Path, override: str) -> None:
    assert Recipe.load(path, [override]).digest != Recipe.load(path).digest


@pytest.mark.parametrize("override", ["infer.batch_tokens=64", "infer.precision=fp16", "data.test=other.csv", "train.tracker=wandb", "train.save_steps=9", "name=other"])
def test_the_digest_does_not_change_with_anything_else(path: Path, override: str) -> None:
    assert Recipe.load(path, [override]).digest == Recipe.load(path).digest


def test_the_digest_is_eight_hex_digits_whatever_the_order_of_keys() -> None:
    one = recipe(train={"lr": 1e-5, "epochs": 2})
    other = Recipe.of({"train": {"epochs": 2, "lr": 1e-5}, "model": {"kind": "m"}, "task": {"kind": "t"}, "name": "r"})
    assert one.digest == other.digest
    assert int(one.digest, 16) >= 0 and len(one.digest) == 8


def test_settings_that_came_later_leave_the_names_of_older_runs(path: Path) -> None:
    """The digest of a recipe without them, as it was before there were any; and of one that asks for what was always done."""
    assert Recipe.load("sample_minilm").digest == "f51ff8f7"
    assert Recipe.load("sample_minilm", ["train.optimizer=adamw"]).digest == "f51ff8f7"
    usual = ["train.awp=0.0", "train.awp_from=0", "train.ema=0.0", "train.swa=0", "train.save_steps=0", "train.pretrain_epochs=0", "data.pretrain=[]"]
    assert Recipe.load("sample_minilm", usual).digest == "f51ff8f7"


def test_pseudo_labels_and_their_epochs_change_the_digest() -> None:
    learnt = [recipe(data={"pretrain": ["a.csv"]}, train={"pretrain_epochs": epochs}).digest for epochs in (1, 2)]
    assert len({recipe().digest, *learnt, recipe(data={"pretrain": ["b.csv"]}, train={"pretrain_epochs": 1}).digest}) == 4
    late = [recipe(train={"awp": 0.1, "awp_from": epoch}).digest for epoch in (0, 1)]
    assert late[0] != late[1]
