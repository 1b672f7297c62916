"""The commands. One function per verb: parse, call one library function, print. The only file that prints or chooses an exit code.

Exit codes: 0 done, 1 done in part or failed inside, 2 the input was refused. Errors are one line; --debug shows the traceback.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from kit import runtime
from kit.budget import NINE_HOURS_S, Budget
from kit.config import Recipe, shipped_recipes
from kit.errors import KitError

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe setting, e.g. train.lr=1e-5. Repeatable.")]
Artifacts = Annotated[Path, typer.Option(help="Folder for everything that is made.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]

_TASK = "multiple_choice"
_INTERRUPTED = 130


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Before the verb: show the traceback of an error.")] = False) -> None:
    """Offline competition submission kit: sample → index → train → pack → infer → score, without internet."""
    runtime.go_offline()  # before anything imports a library that reads the switches
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@app.command(epilog="Example: kit sample artifacts/sample")
def sample(folder: Annotated[Path, typer.Argument(help="Where to write the competition folder.")], as_json: AsJson = False) -> None:
    """Write the embedded sample competition: train.csv, test.csv, sample_submission.csv, test_answers.csv, passages.jsonl."""
    from kit.sample import write_sample

    _show({"folder": write_sample(folder)}, as_json)


@app.command(epilog="Example: kit recipes")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes shipped with the kit."""
    _show({name: Recipe.load(name).digest for name in shipped_recipes()}, as_json)


@app.command(epilog="Example: kit index sample_minilm")
def index(recipe: RecipeName, set_: Set = None, artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False) -> None:
    """Build the recipe's retrieval index (corpus and retriever), unless it is there already."""
    from kit import assemble

    loaded = Recipe.load(recipe, set_ or ())
    assemble.check(loaded)
    _show({"index": assemble.build_index(loaded, artifacts)}, as_json)


@app.command(epilog="Example: kit context sample_minilm --table artifacts/sample/test.csv --out test_with_context.csv")
def context(
    recipe: RecipeName,
    table: Annotated[Path, typer.Option(help="A table of questions.")],
    out: Annotated[Path, typer.Option(help="CSV to write: the same table with a context column.")],
    set_: Set = None, artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Retrieve a context for every row of a table, as training and inference do, and write it out to look at."""
    from kit import assemble
    from kit.data.tables import read_table
    from kit.manifest import write_atomically

    loaded = Recipe.load(recipe, set_ or ())
    assemble.check(loaded)
    read = read_table(table)
    task = assemble.make_task(loaded)
    examples = assemble.cached_contexts(task.read(read), task, loaded, artifacts)
    frame = read.frame.assign(context=[example.context for example in examples])
    write_atomically(out, frame.to_csv(index=False, lineterminator="\n"))
    _show({"out": out, "rows": len(frame), "empty": int((frame["context"] == "").sum())}, as_json)


@app.command(epilog="Examples: kit train sample_minilm   |   kit train my.toml --folds 3,4 --set train.lr=1e-5   |   accelerate launch -m kit train my.toml")
def train(
    recipe: RecipeName,
    folds: Annotated[str | None, typer.Option(help="Only these folds, e.g. 0,2.")] = None,
    full: Annotated[bool, typer.Option("--full", help="One fit on everything, for the final model.")] = False,
    debug_rows: Annotated[bool, typer.Option("--debug", help="A few rows and one epoch, to see that it runs; also shows tracebacks.")] = False,
    set_: Set = None, artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a recipe's folds, as far as they are not trained yet, and write out-of-fold predictions, metrics and curves."""
    from kit.report.plots import draw_curves
    from kit.training.crossval import train as train_recipe

    run = train_recipe(Recipe.load(recipe, set_ or ()), artifacts=artifacts, folds=_numbers(folds), full=full, debug=debug_rows)
    if runtime.is_main_process():
        _show({"run": run.folder, "curves": draw_curves(run.folder), **run.metrics}, as_json)


@app.command(epilog="Example: kit pack artifacts/runs/sample_minilm-1a2b3c4d")
def pack(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Where the bundles go. [default: ARTIFACTS/bundles]")] = None,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Pack trained runs, the indexes they use and the code into bundles: folders with a sha256 manifest."""
    from kit.vendor.bundle import pack as pack_runs

    _show({"bundles": pack_runs(runs, artifacts=artifacts, out=out)}, as_json)


@app.command(epilog="Example: kit infer artifacts/bundles/* --test artifacts/sample/test.csv --out submission.csv")
def infer(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle folders, or names of mounted bundles.")],
    test: Annotated[Path, typer.Option(help="The test set.")],
    out: Annotated[Path, typer.Option(help="The submission to write.")] = Path("submission.csv"),
    sample_submission: Annotated[Path | None, typer.Option(help="Decides the order of the rows.")] = None,
    hours: Annotated[float, typer.Option(help="Time allowed from the start of this process.")] = NINE_HOURS_S / 3600,
    reserve: Annotated[float | None, typer.Option(help="Seconds kept back at the end. [default: 3 %, at least 60]")] = None,
    contexts: Annotated[bool, typer.Option(help="Retrieve contexts; without, to see what they are worth.")] = True,
    details: Annotated[Path | None, typer.Option(help="Folder for outcome.json and each member's predictions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a test set with packed members inside the time allowed, and write the submission."""
    from kit.inference.pipeline import infer as infer_bundles

    budget = Budget(hours * 3600, reserve)
    root = bundles[0].parent if bundles[0].is_dir() else None  # indexes lie beside the members, or are mounted
    outcome = infer_bundles(list(bundles), test=test, out=out, sample=sample_submission, budget=budget, root=root, use_contexts=contexts)
    if details:
        outcome.save(details)
    _show(outcome.summary(), as_json)
    for member, reason in outcome.failures.items():
        print(f"warning: member {member}: {reason}", file=sys.stderr)
    if not outcome.finished:
        raise typer.Exit(1)


@app.command(epilog="Example: kit score submission.csv artifacts/sample/test_answers.csv --json")
def score(
    submission: Annotated[Path, typer.Argument(help="The submission.")],
    answers: Annotated[Path, typer.Argument(help="Table with the right answers.")],
    task: Annotated[str, typer.Option(help="Kind of task the files belong to.")] = _TASK,
    as_json: AsJson = False,
) -> None:
    """Compute the competition's metric of a submission; an invalid one is refused with the row and the reason."""
    from kit.assemble import task_of_kind
    from kit.inference.submission import score as score_file

    _show(score_file(submission, answers, task_of_kind(task)), as_json)


@app.command("dry-run", epilog="Example: kit dry-run")
def dry_run(
    artifacts: Artifacts = Path("artifacts"),
    notebooks: Annotated[Path, typer.Option(help="Folder with train.ipynb and infer.ipynb.")] = Path("notebooks"),
    as_json: AsJson = False,
) -> None:
    """The whole main job on the sample competition: both notebooks, sealed off from the network, and a table of what came out."""
    from kit.rehearsal.dryrun import dry_run as rehearse

    summary, table = rehearse(artifacts, notebooks)
    print(table)
    if as_json:
        _show(summary, as_json)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; turn errors into one line and an exit code."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, standalone_mode=False, prog_name="kit")  # gives 130 for Ctrl-C
    except KitError as error:
        code = _fail(error, arguments, error.exit_code)
    except typer.Exit as error:
        code = error.exit_code
    except Exception as error:  # the last resort: anything unexpected
        code = _fail(error, arguments, 1)
    if code == _INTERRUPTED:
        print("interrupted: what was finished is kept; run the same command again to go on", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, arguments: list[str], code: int) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    show = getattr(error, "format_message", None)  # click's usage errors
    text = show() if show else str(error) or type(error).__name__
    kind = "" if show or isinstance(error, KitError) else f"{type(error).__name__}: "
    print(f"error: {kind}{' '.join(text.split())}", file=sys.stderr)
    return 2 if show else code


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--folds {text!r}: give fold numbers separated by commas, e.g. 0,2") from None


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, default=str))
        return
    for name, value in values.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"\n  {item}" for item in value), sep="")
        elif isinstance(value, dict):
            print(f"{name}:", *(f"\n  {key}: {_short(item)}" for key, item in value.items()), sep="")
        else:
            print(f"{name}: {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return str(value)
