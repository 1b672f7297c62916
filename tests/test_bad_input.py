"""What a user can get wrong, through the commands: exit code 2 and one line that names the place and the way out."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kit import manifest
from kit.cli import main
from tests import packed
from tests.packed import Workshop, read_rows, write_rows

Arguments = list[object]
Build = Callable[[Workshop, Path], Arguments]
OPTIONS = ("one", "two", "three", "four", "five")
HEADER = ("id", "prompt", "A", "B", "C", "D", "E", "answer")


def question(id_: str, answer: str = "A", options: tuple[str, ...] = OPTIONS) -> tuple[str, ...]:
    return (id_, f"Which number is {id_}?", *options, answer)


def train_table(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> Build:
    """Train on this table."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        write_rows(shop.competition / "train.csv", [header, *rows])
        return train(shop)

    return build


def train_bytes(name: str, data: bytes) -> Build:
    """Train on a file of these bytes."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        (shop.competition / name).write_bytes(data)
        return train(shop, f"data.train={name}")

    return build


def train(shop: Workshop, *overrides: str, name: str = "plain") -> Arguments:
    settings = [part for override in overrides for part in ("--set", override)]
    return ["train", shop.root / f"{name}.toml", "--artifacts", shop.artifacts, *settings]


def train_with(*overrides: str, name: str = "plain") -> Build:
    """Train with these settings."""
    return lambda shop, folder: train(shop, *overrides, name=name)


def recipe_bytes(data: bytes) -> Build:
    """Train a recipe file of this content."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        (folder / "mine.toml").write_bytes(data)
        return ["train", folder / "mine.toml", "--artifacts", shop.artifacts, "--set", f"data.folder={shop.competition}", "--set", "data.folds=2"]

    return build


def corpus(name: str, data: str | bytes) -> Build:
    """Index a corpus file of this content."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        (shop.competition / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return ["index", shop.root / "reader.toml", "--artifacts", folder, "--set", f"retrieve.corpus={name}"]

    return build


def index_with(*overrides: str) -> Build:
    """Build the index with these settings."""
    settings = [part for override in overrides for part in ("--set", override)]
    return lambda shop, folder: ["index", shop.root / "reader.toml", "--artifacts", folder, *settings]


def infer(shop: Workshop, folder: Path, *bundles: object) -> Arguments:
    return ["infer", *bundles, "--test", shop.competition / "test.csv", "--out", folder / "submission.csv"]


def member(spoil: Callable[[Path], object], name: str = "reader") -> Build:
    """Infer with a member bundle, spoiled."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        spoil(shop.members[name])
        return infer(shop, folder, shop.members[name])

    return build


def run_folder(spoil: Callable[[Path], object]) -> Build:
    """Pack a run folder, spoiled."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        spoil(shop.runs["plain"])
        return ["pack", shop.runs["plain"], "--artifacts", shop.artifacts]

    return build


def unfinished(spoil: Callable[[Path], object]) -> Build:
    """Go on with a fold that was interrupted, its state spoiled."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        fold = shop.runs["plain"] / "fold0"
        (fold / "metrics.json").unlink()
        spoil(fold)
        return train(shop)

    return build


def submission(rows: list[tuple[str, ...]], header: tuple[str, ...] = ("id", "prediction")) -> Build:
    """Score these rows against the answers of three questions."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        answers = write_rows(folder / "answers.csv", [HEADER, *(question(id_) for id_ in "123")])
        return ["score", write_rows(folder / "mine.csv", [header, *rows]), answers]

    return build


def test_set(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Build:
    """Infer on a changed test set."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        path = shop.competition / "test.csv"
        change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
        return infer(shop, folder, shop.members["plain"])

    return build


def sample_submission(change: Callable[[list[list[str]]], list[list[str]]]) -> Build:
    """Infer with a changed sample submission."""

    def build(shop: Workshop, folder: Path) -> Arguments:
        path = shop.competition / "sample_submission.csv"
        write_rows(path, change(read_rows(path)))
        return [*infer(shop, folder, shop.members["plain"]), "--sample-submission", path]

    return build


def damaged_backbone(shop: Workshop, folder: Path) -> Arguments:
    """Train on a model folder whose weights are cut off."""
    shutil.copytree(next((shop.artifacts / "backbones").iterdir()), folder / "bert")
    weights = folder / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return [*recipe_bytes(TINY)(shop, folder), "--set", f"model.source={folder / 'bert'}"]


def with_state(fold: Path, data: bytes) -> None:
    (fold / "state").mkdir(exist_ok=True)
    (fold / "state" / "last.pt").write_bytes(data)


def forget(*columns: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.drop(columns=list(columns))


test_set.__test__ = False  # type: ignore[attr-defined]
THREE = [question("1"), question("2", "B"), question("3", "C")]
GOOD = [("1", "A B C"), ("2", "B"), ("3", "C D E")]
PASSAGE = '{"id": "p1", "title": "T", "text": "some words"}\n'
TINY = b'[task]\nkind = "multiple_choice"\n[model]\nkind = "encoder"\n'

CASES: dict[str, tuple[Build, tuple[str, ...]]] = {
    # tables
    "table is missing": (train_with("data.train=no-such.csv"), ("no-such.csv", "no such file")),
    "table is a folder": (train_with("data.train=."), ("kind of table is unknown", ".csv")),
    "table of unknown kind": (train_bytes("train.xlsx", b"PK"), ("train.xlsx", ".csv, .csv.gz, .parquet, .jsonl")),
    "table is empty": (train_bytes("empty.csv", b""), ("empty.csv", "is empty")),
    "table has no rows": (train_table([]), ("train.csv", "no rows")),
    "table is not UTF-8": (train_bytes("latin.csv", b"id,prompt\n1,caf\xe9\n"), ("latin.csv", "line 2", "UTF-8")),
    "table is cut off in a quote": (train_bytes("cut.csv", b'id,prompt,A,B,answer\n1,"why'), ("cut.csv", "line 2", "never closed")),
    "table is ragged": (train_bytes("ragged.csv", b"id,prompt,A,B,answer\n1,p,a,b,A\n2,p,a,b\n"), ("ragged.csv", "line 3", "4 values")),
    "gzip is damaged": (train_bytes("t.csv.gz", gzip.compress(b"id,prompt\n1,p\n" * 99)[:40]), ("t.csv.gz", "gzip")),
    "parquet is damaged": (train_bytes("t.parquet", b"PAR1 but no more"), ("t.parquet", "Parquet")),
    "JSON line is no object": (train_bytes("t.jsonl", b'{"id": 1}\n[2]\n'), ("t.jsonl", "line 2")),
    "column is missing": (train_table([row[1:] for row in THREE], HEADER[1:]), ("train.csv", "column 'id'")),
    "column stands twice": (train_table([(*row, "A") for row in THREE], (*HEADER, "A")), ("train.csv", "'A' stands twice")),
    "options have a gap": (train_table([(*r[:4], *r[5:]) for r in THREE], (*HEADER[:4], *HEADER[5:])), ("train.csv", "column 'C'")),
    "id stands twice": (train_table([*THREE, question("2")]), ("train.csv", "row 4", "'2'", "row 2")),
    "id is empty": (train_table([*THREE, question(" ")]), ("train.csv", "row 4", "id is empty")),
    "answer is no option": (train_table([*THREE, question("4", "F")]), ("train.csv", "row 4", "'F'", "A, B, C, D, E")),
    "answer is in lower case": (train_table([*THREE, question("4", "a")]), ("row 4", "'a'", "A, B, C, D, E")),
    "answer is empty": (train_table([*THREE, question("4", "")]), ("row 4", "column 'answer' = ''")),
    "answer is a blank option": (train_table([question("1", "B", ("a", " ", "c", "d", "e"))]), ("row 1", "blank option")),
    "every option is blank": (train_table([question("1", "A", ("",) * 5)]), ("row 1", "every option is blank")),
    "no answers to train on": (train_table([row[:-1] for row in THREE], HEADER[:-1]), ("data.train", "no answer", "answer column")),
    "fewer rows than folds": (train_table(THREE[:1]), ("data.folds = 2", "1 row")),
    "group column is missing": (train_with("data.fold_by=grouped", "data.group=topic"), ("data.group", "'topic'", "columns: id")),
    # recipes and overrides
    "recipe is unknown": (lambda shop, folder: ["train", "sample_minlm"], ("sample_minlm", "did you mean 'sample_minilm'")),
    "recipe is no TOML": (recipe_bytes(b"[task\n"), ("mine.toml", "TOML")),
    "recipe is not UTF-8": (recipe_bytes(b"name = '\xff'"), ("mine.toml", "TOML")),
    "recipe lacks a part": (recipe_bytes(b"[task]\nkind = 'multiple_choice'\n"), ("mine.toml", "'model' is missing")),
    "key is misspelt": (train_with("train.epoch=3"), ("train.epoch", "did you mean 'epochs'")),
    "part is misspelt": (train_with("trian.epochs=3"), ("trian", "did you mean 'train'")),
    "value has the wrong type": (train_with("train.epochs=many"), ("train.epochs", "'many'", "integer")),
    "value is out of range": (train_with("train.lr=-1"), ("train.lr", "-1", "greater than 0")),
    "override has no value": (train_with("train.lr"), ("train.lr", "key.path=value")),
    "task is unknown": (train_with("task.kind=multi_choice"), ("task.kind", "'multi_choice'", "'multiple_choice'")),
    "task setting is unknown": (train_with("task.max_len=9"), ("task.max_len", "'max_length'")),
    "task setting is out of range": (train_with("task.max_length=2"), ("task.max_length = 2", "at least 8")),
    "model is unknown": (train_with("model.kind=encoders"), ("model.kind", "'encoder'")),
    "model setting is unknown": (train_with("model.pool=mean"), ("model.pool", "'pooling'")),
    "pooling is unknown": (train_with("model.pooling=meen"), ("model.pooling", "'meen'", "'mean'")),
    "model does not fit the task": (train_with("model.pooling=none"), ("needs 'row'", "gives 'token'")),
    "model source and config disagree": (train_with("model.source=some/folder"), ("model.source", "model.config", "disagree")),
    "model source is missing": (recipe_bytes(TINY), ("model.source is missing", "package:NAME")),
    "model folder is missing": (recipe_bytes(TINY + b'source = "no/such"\n'), ("no/such", "config.json")),
    "model package is missing": (recipe_bytes(TINY + b'source = "package:no_such"\n'), ("pip install no-such",)),
    "model type is unknown": (train_with("model.config.model_type=bertt"), ("model.config", "bertt")),
    "two settings contradict": (train_with("train.fgm=0.5", "train.freeze_embeddings=true"), ("train.fgm", "train.freeze_embeddings")),
    "too many layers to freeze": (train_with("train.freeze_layers=9"), ("train.freeze_layers", "9")),
    "fold does not exist": (lambda shop, folder: [*train(shop), "--folds", "0,7"], ("--folds 7", "0 to 1")),
    "folds are no numbers": (lambda shop, folder: [*train(shop), "--folds", "all"], ("'all'", "0,2")),
    # corpora and indexes
    "corpus is missing": (index_with("retrieve.corpus=no.jsonl"), ("no.jsonl", "retrieve.corpus")),
    "corpus of unknown kind": (corpus("p.txt", "words"), ("p.txt", ".parquet, .jsonl, .csv")),
    "corpus has no passage": (corpus("p.jsonl", "\n"), ("p.jsonl", "no passage")),
    "passage is empty": (corpus("p.jsonl", PASSAGE + '{"id": "p2", "text": " "}\n'), ("p.jsonl", "line 2", "column 'text'", "must not be empty")),
    "passage id stands twice": (corpus("p.jsonl", PASSAGE * 2), ("p.jsonl", "line 2", "'p1'", "line 1")),
    "passage has no text": (corpus("p.csv", "id,title\n1,T\n"), ("p.csv", "column 'text' is missing")),
    "corpus is cut off": (corpus("p.jsonl", PASSAGE + '{"id": "p2", "te'), ("p.jsonl", "line 2", "JSON")),
    "retriever is unknown": (index_with("retrieve.retriever.kind=bm52"), ("retrieve.retriever.kind", "'bm25'")),
    "retriever setting without its kind": (index_with("retrieve.retriever.b=7"), ("retrieve.retriever.kind", "missing")),
    "retriever setting is unknown": (index_with("retrieve.retriever.kind=bm25", "retrieve.retriever.k=1"), ("retrieve.retriever.k", "k1")),
    "retriever setting is out of range": (index_with("retrieve.retriever.kind=bm25", "retrieve.retriever.b=7"), ("b = 7", "between 0 and 1")),
    "recipe has no index": (lambda shop, folder: ["index", shop.root / "plain.toml", "--artifacts", folder], ("'plain'", "[retrieve]")),
    # checkpoints and runs
    "interrupted fit is damaged": (unfinished(lambda fold: with_state(fold, b"no checkpoint")), ("last.pt", "delete")),
    "run is none": (lambda shop, folder: ["pack", folder], ("no finished fit", "kit train")),
    "run lacks folds": (run_folder(lambda run: (run / "oof.parquet").unlink()), ("oof.parquet", "train every fold")),
    "backbone is damaged": (damaged_backbone, ("bert", "cannot be loaded")),
    # bundles
    "bundle is none": (lambda shop, folder: infer(shop, folder, folder), ("MANIFEST.json", "found bundles")),
    "bundle is not mounted": (lambda shop, folder: infer(shop, folder, "my-member"), ("'my-member'", "nor mounted under")),
    "bundle is no member": (
        lambda shop, folder: infer(shop, folder, shop.bundles / manifest.read(shop.members["reader"]).meta["index"]),
        ("no member bundle", "pack a trained run"),
    ),
    "bundle lacks a file": (member(lambda bundle: (bundle / "fold0" / "tokenizer.json").unlink()), ("fold0/tokenizer.json", "missing")),
    "bundle is cut off": (member(lambda bundle: (bundle / "oof.parquet").write_bytes(b"x")), ("oof.parquet", "1 bytes instead of")),
    "bundle is damaged": (member(lambda bundle: packed.damage(bundle / "fold1" / "model.safetensors")), ("fold1/model.safetensors", "damaged")),
    "manifest is damaged": (member(lambda bundle: (bundle / "MANIFEST.json").write_text("{")), ("MANIFEST.json", "pack the bundle again")),
    "recipe in a bundle is damaged": (member(lambda bundle: (bundle / "recipe.toml").write_text("[")), ("recipe.toml", "TOML")),
    # test sets, budgets, submissions
    "test set lacks a column": (test_set(forget("prompt")), ("test.csv", "'prompt' is missing")),
    "test set lacks its options": (test_set(forget(*"ABCDE")), ("test.csv", "column 'A' is missing")),
    "test set is missing": (lambda shop, folder: ["infer", shop.members["plain"], "--test", "no.csv"], ("no.csv", "no such file")),
    "sample submission lacks rows": (sample_submission(lambda rows: rows[:-1]), ("sample_submission.csv", "not in the sample submission")),
    "sample submission has other rows": (sample_submission(lambda rows: [*rows, ["x", "A"]]), ("'x'", "not in the test set")),
    "no time": (lambda shop, folder: [*infer(shop, folder, shop.members["plain"]), "--hours", "0"], ("budget of 0.0 s",)),
    "reserve above the budget": (
        lambda shop, folder: [*infer(shop, folder, shop.members["plain"]), "--hours", "1", "--reserve", "9999"],
        ("9999", "3600", "lower the reserve"),
    ),
    "submission lacks a row": (submission(GOOD[:2]), ("mine.csv", "id '3'", "missing")),
    "submission has a row more": (submission([*GOOD, ("4", "A")]), ("mine.csv", "row 4", "'4'")),
    "submission has a row twice": (submission([*GOOD, ("1", "A")]), ("mine.csv", "row 4", "'1'", "row 1")),
    "prediction of four letters": (submission([*GOOD[:2], ("3", "A B C D")]), ("mine.csv", "row 3", "'A B C D'", "1 to 3")),
    "prediction names a letter twice": (submission([*GOOD[:2], ("3", "A A B")]), ("row 3", "'A A B'", "twice")),
    "prediction in lower case": (submission([*GOOD[:2], ("3", "a b c")]), ("row 3", "'a'", "A to E")),
    "prediction of no option": (submission([*GOOD[:2], ("3", "A F")]), ("row 3", "'F'", "A to E")),
    "prediction is empty": (submission([*GOOD[:2], ("3", "")]), ("row 3", "column 'prediction' = ''")),
    "submission lacks its column": (submission(GOOD, ("id", "answers")), ("mine.csv", "column 'prediction'")),
    "task to score is unknown": (lambda shop, folder: [*submission(GOOD)(shop, folder), "--task", "essay"], ("'essay'", "multiple_choice")),
    # commands
    "command is unknown": (lambda shop, folder: ["trian"], ("'trian'",)),
    "option is unknown": (lambda shop, folder: ["recipes", "--jsn"], ("--jsn",)),
    "argument is missing": (lambda shop, folder: ["score"], ("Missing argument",)),
    "notebooks are missing": (lambda shop, folder: ["dry-run", "--artifacts", folder, "--notebooks", folder], ("train.ipynb", "--notebooks")),
    "folder is a file": (lambda shop, folder: ["sample", write_rows(folder / "file", [])], ("file",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_refused_in_one_line_that_helps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, words = CASES[name]
    shop = packed.copy(tmp_path / "x")
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = [str(argument) for argument in build(shop, folder)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "it/s]" not in line and line.strip()]
    assert left.value.code == 2, printed.err
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in printed.err
    missing = [word for word in words if word not in lines[0]]
    assert not missing, lines[0]
    assert printed.out == ""
