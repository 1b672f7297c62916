"""The commands. One function per verb: parse, call one library function, print. The only file that prints or chooses an exit code.

Exit codes: 0 done, 1 done in part or failed inside, 2 the input was refused. Errors are one line; --debug shows the traceback.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kit import runtime
from kit.budget import NINE_HOURS_S, Budget
from kit.config import Recipe, shipped_recipes
from kit.errors import DataError, KitError

if TYPE_CHECKING:
    from kit.rehearsal.findings import Findings

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe setting, e.g. train.lr=1e-5. Repeatable.")]
Artifacts = Annotated[Path, typer.Option(help="Folder for everything that is made.")]
ProfileNames = Annotated[list[str], typer.Option("--profile", metavar="NAME", help="What the image has: a shipped name, a JSON file, or here. Repeatable.")]
ProfileName = Annotated[str, typer.Option("--profile", metavar="NAME", help="What the image has: a shipped name, a JSON file, or here.")]
FindLinks = Annotated[list[Path] | None, typer.Option(help="Folder of wheels to look in, too. Repeatable.")]
NoIndex = Annotated[bool, typer.Option("--no-index", help="Look in --find-links only.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]

_TASK = "multiple_choice"
_IMAGE = "kaggle-py312"
_INTERRUPTED = 130

vendor = typer.Typer(help="Build: wheels, weights and code → bundles → datasets that install offline.", rich_markup_mode=None)
profile = typer.Typer(help="What an image already has: capture and show.", rich_markup_mode=None)
app.add_typer(vendor, name="vendor")
app.add_typer(profile, name="profile")


def _text_of(path: Path) -> str:
    """What a file, or standard input, holds. Raises DataError."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Before the verb: show the traceback of an error.")] = False) -> None:
    """Offline competition submission kit: sample → index → train → vendor → rehearse → push, and infer → score without internet."""
    runtime.go_offline()  # before anything imports a library that reads the switches
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@app.command(epilog="Example: kit sample artifacts/sample")
def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write the competition folder.")],
    family: Annotated[str, typer.Option(help="What kind of competition: exam, essays or readings.")] = "exam",
    as_json: AsJson = False,
) -> None:
    """Write an embedded sample competition: training table, test set, sample submission, answers, and for the exam a corpus."""
    from kit.sample import write_sample

    _show({"folder": write_sample(folder, family)}, as_json)


@app.command(epilog="Example: kit corpus /usr/lib/python3 --out corpus.jsonl --word numpy --word pandas")
def corpus(
    sources: Annotated[list[Path], typer.Argument(help=".jsonl or text files, or folders of .py files.")],
    out: Annotated[Path, typer.Option(help="Where to write the documents, one JSON object a line.")] = Path("corpus.jsonl"),
    words: Annotated[list[str] | None, typer.Option("--word", help="Keep only documents with one of these words. Repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Collect the texts that a language model is to learn from: filtered, and freed of those that stand twice."""
    from kit.data.texts import write_corpus

    _show(write_corpus(sources, out, words=words or ()).summary(), as_json)


@app.command(epilog='Example: kit answer artifacts/runs/sample_reading-1a2b3c4d "Who built the bridge?" --text report.txt')
def answer(
    run: Annotated[Path, typer.Argument(help="A run or member bundle that was trained to read.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    text: Annotated[Path, typer.Option(help="File with the text that is asked about; - for standard input.")] = Path("-"),
    count: Annotated[int, typer.Option(min=1, help="How many answers.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Ask a trained reader one question about a text."""
    from kit.inference.reader import Reader

    found = Reader.open(run).ask(question, _text_of(text), count=count)
    _show({"answers": [one._asdict() for one in found]}, as_json)


@app.command(epilog='Example: kit generate artifacts/runs/code_gpt2-1a2b3c4d "import numpy"')
def generate(
    run: Annotated[Path, typer.Argument(help="A run, or the folder of a decoder.")],
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that together have this share.")] = 1.0,
    returns: Annotated[int, typer.Option(help="Completions.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this word. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Complete a prompt with a trained language model."""
    from kit.models.generate import Decoding, complete

    found = complete(run, prompt, Decoding(tokens, temperature, top_p, returns, tuple(stop or ()), seed))
    _show({"completions": [one._asdict() for one in found]}, as_json)


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
    read = read_table(table, ids=assemble.make_task(loaded).id_column)
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
    """Pack trained runs and the indexes they use into bundles: folders with a sha256 manifest."""
    from kit.vendor.bundle import pack as pack_runs

    _show({"bundles": pack_runs(runs, artifacts=artifacts, out=out)}, as_json)


@app.command(epilog="Example: kit infer artifacts/bundles/* --test artifacts/sample/test.csv --out submission.csv")
def infer(
    bundles: Annotated[list[Path] | None, typer.Argument(metavar="BUNDLE...", help="Folders or names of bundles. [default: all that are mounted]")] = None,
    test: Annotated[Path | None, typer.Option(help="The test set. [default: the mounted competition's]")] = None,
    out: Annotated[Path, typer.Option(help="The submission to write: .csv, or for answers also .json.")] = Path("submission.csv"),
    sample_submission: Annotated[Path | None, typer.Option(help="Decides the order of the rows.")] = None,
    hours: Annotated[float, typer.Option(help="Time allowed from the start of this process.")] = NINE_HOURS_S / 3600,
    reserve: Annotated[float | None, typer.Option(help="Seconds kept back at the end. [default: 3 %, at least 60]")] = None,
    contexts: Annotated[bool, typer.Option(help="Retrieve contexts; without, to see what they are worth.")] = True,
    blend: Annotated[str, typer.Option(help="How members are blended: auto; options: pool, hill, ranker; numbers: linear, free, hill; spans: hill.")] = "auto",
    patience: Annotated[float, typer.Option(help="Seconds without a sign of life after which a scoring process hangs.")] = 60,
    as_json: AsJson = False,
) -> None:
    """Score a test set with packed members inside the time allowed, and write the submission.

    Interrupted or killed, the same command goes on: what was scored is kept in the folder OUT.run, with timeline.png and decisions.log.
    """
    from kit.inference.pipeline import infer as infer_bundles

    budget = Budget(hours * 3600, reserve)
    root = bundles[0].parent if bundles and bundles[0].is_dir() else None  # indexes lie beside the members, or are mounted
    outcome = infer_bundles(
        bundles, test=test, out=out, sample=sample_submission, budget=budget, root=root, use_contexts=contexts, method=blend, patience_s=patience
    )  # fmt: skip
    _draw_timeline(outcome.run)
    _show(outcome.summary(), as_json)
    for member, reason in outcome.failures.items():
        print(f"warning: member {member}: {reason}", file=sys.stderr)
    if not outcome.finished:
        raise typer.Exit(1)


@app.command(epilog="Example: kit plan sample_minilm sample_rules --rows 4000 --device t4x2")
def plan(
    members: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipes, run folders or member bundles.")],
    rows: Annotated[int, typer.Option(help="Rows of the test set.")] = 4000,
    device: Annotated[str, typer.Option(help="The machine: cpu, t4, t4x2, p100, l4, l4x4, a100 or h100.")] = "t4x2",
    hours: Annotated[float, typer.Option(help="Time allowed.")] = NINE_HOURS_S / 3600,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Predict the timeline of inference on a stated machine: what is scored when, and what does not fit."""
    from kit.inference.plan import plan as plan_run

    _show(plan_run(members, rows, device, budget_s=hours * 3600, artifacts=artifacts).summary(), as_json)


@app.command(epilog="Example: kit simulate --runs 2000 --json")
def simulate(
    runs: Annotated[int, typer.Option(help="How many runs.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which made-up competitions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the real planner on a fake clock, with made-up members, devices and faults: how often it ends in time, and how much of it is used."""
    from kit.inference.simulate import simulate as simulate_runs

    _show(simulate_runs(runs, seed).summary(), as_json)


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
    """The whole main job on the sample competition, both notebooks sealed off from the network; the other families, short; and a table of what came out."""
    from kit.rehearsal.dryrun import dry_run as rehearse

    summary, table = rehearse(artifacts, notebooks)
    print(table)
    if as_json:
        _show(summary, as_json)
    if summary["failures"]:
        raise typer.Exit(1)


@vendor.command(epilog="Example: kit vendor wheels --profile kaggle-py312 --profile kaggle-py313")
def wheels(
    requirements: Annotated[Path, typer.Option(help="What the competition machine must have.")] = Path("wheels/requirements.in"),
    profiles: ProfileNames = [_IMAGE],  # noqa: B006  # typer wants a list
    out: Annotated[Path, typer.Option(help="Where the bundles kit-wheels and kit-code go.")] = Path("artifacts/bundles"),
    allow: Annotated[list[str] | None, typer.Option(metavar="PACKAGE", help="A package of the image that may change. Repeatable.")] = None,
    find_links: FindLinks = None, no_index: NoIndex = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Vendor the wheels that the images lack, locked by hash, and the kit's own."""
    from kit.vendor.profile import Profile
    from kit.vendor.resolve import Index
    from kit.vendor.wheels import vendor as vendor_wheels

    index = Index(tuple(find_links or ()), no_index)
    house = vendor_wheels(requirements, [Profile.load(name) for name in profiles], out, allow=allow or (), index=index)
    *delta, own = [{"name": wheel.name, "version": wheel.version, "bytes": wheel.bytes} for wheel in house.wheels]
    _show({"delta": delta, "kit": own, "mb": round(house.mb, 1), "seconds": round(house.seconds, 2), "bundles": house.folders, "unknown": house.unknown}, as_json)


@vendor.command(epilog="Example: kit vendor prove artifacts/bundles --profile kaggle-py312")
def prove(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder with kit-wheels and kit-code.")] = Path("artifacts/bundles"),
    profile_name: ProfileName = _IMAGE, find_links: FindLinks = None, no_index: NoIndex = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Install the vendored wheels, without network, into an environment that looks like the image, and import them."""
    from kit.vendor.profile import Profile
    from kit.vendor.prove import prove as prove_wheels
    from kit.vendor.resolve import Index

    proof = prove_wheels(folder, Profile.load(profile_name), index=Index(tuple(find_links or ()), no_index))
    _show(asdict(proof), as_json)


@vendor.command(epilog="Example: kit vendor weights ~/models/deberta-v3-base --licence mit")
def weights(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model, adapter or sentence-transformers folder.")],
    out: Annotated[Path, typer.Option(help="Where the bundle goes.")] = Path("artifacts/bundles"),
    name: Annotated[str | None, typer.Option(help="Name of the bundle. [default: the folder's]")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights. [default: what the folder says]")] = None,
    base: Annotated[str | None, typer.Option(help="For an adapter: the bundle of the model it belongs to.")] = None,
    shard_mb: Annotated[int, typer.Option(help="Largest weights file, in MB.")] = 4000,
    as_json: AsJson = False,
) -> None:
    """Make a bundle of what inference needs from a model folder: safetensors and tokenizer.json only, no remote code."""
    from kit import manifest
    from kit.vendor.weights import vendor_weights

    folder = vendor_weights(model, out, name=name, licence=licence, shard_mb=shard_mb, base=base)
    _show({"bundle": folder, **manifest.read(folder).meta}, as_json)


@vendor.command(epilog="Example: kit vendor bundle artifacts/runs/my-run-1a2b3c4d --owner me --competition kaggle-llm-science-exam")
def bundle(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    owner: Annotated[str, typer.Option(help="Your name on the site, as in its addresses.")],
    competition: Annotated[str | None, typer.Option(help="The competition, as in its address.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the datasets go. [default: ARTIFACTS/datasets]")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Where the notebooks go. [default: ARTIFACTS/kernels]")] = None,
    notebooks: Annotated[Path, typer.Option(help="Folder with train.ipynb and infer.ipynb.")] = Path("notebooks"),
    accelerator: Annotated[str, typer.Option(help="What the notebooks run on; none for the CPU.")] = "NvidiaTeslaT4",
    licence: Annotated[str, typer.Option(help="Licence of datasets whose contents name none.")] = "other",
    part_mb: Annotated[float, typer.Option(help="Split what is larger into datasets of this many MB.")] = 20_000,
    public: Annotated[bool, typer.Option("--public", help="Publish the datasets for everybody.")] = False,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Stage trained runs, their indexes, the wheels and the code as datasets, and both notebooks with what they attach."""
    from kit.vendor.dataset import prepare

    prepared = prepare(
        runs, owner=owner, competition=competition, artifacts=artifacts, out=out, kernels=kernels, notebooks=notebooks,
        accelerator=None if accelerator == "none" else accelerator, licence=licence, part_mb=part_mb, public=public,
    )  # fmt: skip
    _show({"datasets": prepared.datasets, "kernels": prepared.kernels}, as_json)


@app.command(epilog="Example: kit rehearse --competition llm-science")
def rehearse(
    datasets: Annotated[Path | None, typer.Argument(help="Staged datasets. [default: ARTIFACTS/datasets, or where there are none the sample's]")] = None,
    competition: Annotated[Path | None, typer.Option(help="The competition's folder, with the test set. [default: what a member was trained on]")] = None,
    notebook: Annotated[Path, typer.Option(help="What is to be submitted.")] = Path("notebooks/infer.ipynb"),
    profile_name: ProfileName = _IMAGE,
    rows: Annotated[int, typer.Option(help="Rows of the hidden test set's look-alike.")] = 2400,
    level: Annotated[str | None, typer.Option(help="How to seal the box. [default: the best that works here]")] = None,
    hours: Annotated[float, typer.Option(help="Time limit of each run.")] = NINE_HOURS_S / 3600,
    memory_mb: Annotated[int, typer.Option(help="Memory limit, in MB.")] = 30_000,
    disk_mb: Annotated[int, typer.Option(help="Limit for what is written, in MB.")] = 20_000,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the notebook in a sealed box, on the public test set and on a look-alike of the hidden one, and judge its submissions."""
    from kit.rehearsal.limits import Limits
    from kit.rehearsal.rehearse import rehearse as rehearse_notebook
    from kit.rehearsal.rehearse import staged_or_sample
    from kit.vendor.profile import Profile

    image, limits = Profile.load(profile_name), Limits(hours * 3600, memory_mb, disk_mb)
    datasets, competition = staged_or_sample(datasets, competition, artifacts, image)
    done = rehearse_notebook(datasets, notebook, competition, profile=image, artifacts=artifacts, rows=rows, limits=limits, level=level)
    _show({"folder": done.folder, **done.summary}, as_json)


@app.command(epilog="Example: kit push --dry-run")
def push(
    datasets: Annotated[Path | None, typer.Argument(help="Staged datasets. [default: ARTIFACTS/datasets]")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Staged notebooks. [default: ARTIFACTS/kernels]")] = None,
    kernel: Annotated[str, typer.Option(help="The staged notebook to run; none for the datasets only.")] = "infer",
    competition: Annotated[str | None, typer.Option(help="Where to submit. [default: the notebook's own]")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit what the run wrote.")] = False,
    message: Annotated[str, typer.Option(help="Notes of new versions, description of the submission.")] = "sent by kit",
    follow: Annotated[bool, typer.Option(help="Wait for the run and fetch its output.")] = True,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Publish what has changed: datasets, then the notebook pinned to their versions; follow its run, fetch its output, submit it."""
    from kit.vendor.publish import publish

    report = publish(
        datasets or artifacts / "datasets", kernels or artifacts / "kernels", state=artifacts / "publish.json", output=artifacts / "output",
        kernel=None if kernel == "none" else kernel, competition=competition, submit=submit, message=message, follow=follow, dry_run=dry,
    )  # fmt: skip
    _show(report.summary(), as_json)


@app.command(epilog="Example: kit chaos --kills 30 --fault nan --fault hang")
def chaos(
    kills: Annotated[int, typer.Option(help="How many times a run is killed, at random moments.")] = 300,
    seed: Annotated[int, typer.Option(help="Which moments.")] = 0,
    fault: Annotated[list[str] | None, typer.Option(help="A fault to try. Repeatable. [default: all]")] = None,
    artifacts: Artifacts = Path("artifacts"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Kill and injure real runs on the sample competition, and see whether there is a valid submission, in time, and nothing is lost."""
    from kit.rehearsal.chaos import chaos as injure

    _show(injure(artifacts, kills=kills, seed=seed, faults=fault), as_json)


@app.command(epilog="Example: kit doctor --input /kaggle/input")
def doctor(
    root: Annotated[Path | None, typer.Option("--input", help="Where the bundles and the competition are mounted.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes, not hashes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything that can be found out about this machine and its mounts before a run; exit code 1 if something will fail."""
    from kit.rehearsal.doctor import doctor as examine

    _show_findings(examine(root, full=not quick), as_json)


@app.command("lint-submission", epilog="Example: kit lint-submission submission.csv --test test.csv --log notebook.log")
def lint_submission(
    submission: Annotated[Path, typer.Argument(help="The submission, whether or not it is there.")],
    sample_submission: Annotated[Path | None, typer.Option(help="The competition's sample submission.")] = None,
    test: Annotated[Path | None, typer.Option(help="The test set.")] = None,
    log_file: Annotated[Path | None, typer.Option("--log", help="The run's log, as the site gives it.")] = None,
    task: Annotated[str, typer.Option(help="Kind of task.")] = _TASK,
    as_json: AsJson = False,
) -> None:
    """Say which of the site's errors a submission or a log would lead to or has led to, why, and the way out."""
    from kit.rehearsal.findings import Findings
    from kit.rehearsal.lint import lint

    _show_findings(Findings(lint(submission, sample=sample_submission, test=test, log=log_file, task=task)), as_json)


@profile.command(epilog="Example: kit profile capture --cell")
def capture(
    cell: Annotated[bool, typer.Option("--cell", help="Print the cell that captures the profile of the notebook it is pasted into.")] = False,
    freeze: Annotated[Path | None, typer.Option(help="Make it from the output of pip freeze instead.")] = None,
    python: Annotated[str | None, typer.Option(help="With --freeze: the image's Python, e.g. 3.12.13.")] = None,
    glibc: Annotated[str | None, typer.Option(help="With --freeze: the image's glibc, e.g. 2.35.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("artifacts/profile.json"),
    name: Annotated[str | None, typer.Option(help="Its name. [default: that of the file written]")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the profile of this environment, of a bare freeze, or print the cell that captures one elsewhere."""
    from kit.vendor.profile import Profile, capture_cell

    if cell:
        print(capture_cell())
        return
    label = name or out.stem
    captured = Profile.from_freeze(freeze, name=label, python=python, glibc=glibc) if freeze else Profile.capture(label)
    captured.save(out)
    _show({"profile": out, "packages": len(captured.packages), "unknown": captured.unknown()}, as_json)


@profile.command("show", epilog="Example: kit profile show kaggle-py312")
def show_profile(name: Annotated[str, typer.Argument(help="A shipped name, a JSON file, or here.")] = _IMAGE, as_json: AsJson = False) -> None:
    """Show what an image has, and what its profile cannot know."""
    from kit.vendor.profile import Profile

    loaded = Profile.load(name)
    versions = {name: package.version for name, package in loaded.packages.items()}
    _show({**loaded.model_dump(mode="json", exclude={"packages", "gaps"}), "packages": versions, "unknown": loaded.unknown()}, as_json)


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


def _draw_timeline(run: Path) -> None:
    """The picture of a run, where it can be drawn: it must not cost the run."""
    from kit.report.plots import draw_timeline

    try:
        draw_timeline(run)
    except (KitError, OSError) as error:
        print(f"warning: no timeline.png: {error}", file=sys.stderr)


def _show_findings(findings: Findings, as_json: bool) -> None:
    """Exit code 1 where one is an error."""
    if as_json:
        print(json.dumps({"findings": [found._asdict() for found in findings]}))
    else:
        print(findings)
    if any(found.level == "error" for found in findings):
        raise typer.Exit(1)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, default=str))
        return
    for name, value in values.items():
        if isinstance(value, list | tuple):
            print(f"{name}:", *(f"\n  {_short(item)}" for item in value), sep="")
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
