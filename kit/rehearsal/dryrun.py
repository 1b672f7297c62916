"""The whole main job on the sample competition, as on the competition machine, and a summary of what came out.

Two boxes below artifacts/dry-run, each with input/, working/ and a python/ without the kit, which the notebooks install: `train` runs
notebooks/train.ipynb, `infer` runs notebooks/infer.ipynb on what `train` packed. Then the other task families, without notebooks, by the kit that `train`
installed. A stage whose inputs have not changed is not run again. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kit import manifest, runtime
from kit.config import Recipe
from kit.data.tables import read_table
from kit.errors import KitError
from kit.metrics import Estimate, bootstrap
from kit.rehearsal import box as sealed
from kit.rehearsal import guard
from kit.rehearsal.baselines import longest, overlap, random_map
from kit.rehearsal.families import FAMILIES, Family, judge, play
from kit.rehearsal.limits import Limits
from kit.retrieval.bm25 import BM25
from kit.retrieval.corpus import Corpus
from kit.sample import write_sample
from kit.tasks.multiple_choice import MultipleChoice
from kit.vendor.lookalike import Lookalike
from kit.vendor.wheels import CODE, DISTRIBUTION, pack_code

_LIMITS = Limits(wall_s=3600)
_ANSWERS = "test_answers.csv"
_WITHOUT = "infer without contexts"


def dry_run(artifacts: Path, notebooks: Path, families: Sequence[Family] = FAMILIES) -> tuple[dict[str, Any], str]:
    """Run both notebooks and the families; gives the summary (also in artifacts/dry-run/summary.json) and a table to print.

    Raises KitError where a notebook fails; members and families that fail are among the summary's failures.
    """
    for name in ("train.ipynb", "infer.ipynb"):
        if not (notebooks / name).is_file():
            raise KitError(f"{notebooks / name} is missing: give --notebooks the folder that holds train.ipynb and infer.ipynb")
    return _DryRun((artifacts / "dry-run").resolve(), notebooks.resolve(), families).run()


@dataclass
class _DryRun:
    root: Path
    notebooks: Path
    families: Sequence[Family]
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> tuple[dict[str, Any], str]:
        self.answers = write_sample(self.root / "answers") / _ANSWERS
        train, infer = self.root / "train", self.root / "infer"
        self._mount_competition(train)
        self._mount_competition(infer)
        code = pack_code(train / "input" / "datasets" / "owner")  # the newer mount layout
        shutil.copytree(code, infer / "input" / CODE, dirs_exist_ok=True)
        made = manifest.read(code).digest
        notebook = self.notebooks / "train.ipynb"
        self._stage("train", [made, manifest.sha256(notebook)], lambda: self._train(notebook, train))
        bundles = self._mount_bundles(train / "working" / "artifacts" / "bundles", infer / "input")
        notebook = self.notebooks / "infer.ipynb"
        self._stage("infer", [made, bundles, manifest.sha256(notebook)], lambda: self._submit(notebook, infer))
        members = {path.parent.name: path.parent for path in sorted((infer / "input").glob(f"*/{manifest.FILE}")) if manifest.read(path.parent).kind == "member"}
        self._stage(_WITHOUT, [made, bundles], lambda: self._infer(infer, _WITHOUT, [*members.values()], "--no-contexts"))
        for name in sorted(members.keys() - _predictions(infer / "working").keys()):  # one that the blend does not use is rehearsed, too
            self._stage(f"infer {name} alone", [made, bundles], partial(self._infer, infer, f"infer {name} alone", [members[name]]))
            self.alone.append(self._again(f"infer {name} alone") / "submission.run")
        shutil.copyfile(infer / "working" / "submission.csv", self.root / "submission.csv")
        for family in self.families:
            self._family(family, made, train)
        summary = self._summary(train, infer)
        manifest.write_atomically(self.root / "summary.json", json.dumps(summary, indent=1))
        return summary, _table(summary)

    def _stage(self, name: str, key: list[str], work: Callable[[], None]) -> None:
        """Do the work unless it was done with the same key; keep how long it took."""
        path = self.root / "stages" / f"{manifest.slug(name)}.json"
        done = json.loads(path.read_text()) if path.is_file() else {}
        if done.get("key") == key:
            self.reused.append(name)
            self.seconds[name] = done["seconds"]
            return
        path.unlink(missing_ok=True)
        begun = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - begun, 1)
        manifest.write_atomically(path, json.dumps({"key": key, "seconds": self.seconds[name]}))

    def _notebook(self, notebook: Path, box: Path) -> None:
        shutil.rmtree(box / "python", ignore_errors=True)
        lookalike = Lookalike.create(box / "python", hide={DISTRIBUTION})
        self.attempts += sealed.run(notebook, mounts=box / "input", working=box / "working", lookalike=lookalike, limits=_LIMITS).attempts

    def _train(self, notebook: Path, box: Path) -> None:
        """Without bundles of an earlier run: they may have been trained on what is a test row now."""
        shutil.rmtree(box / "working" / "artifacts" / "bundles", ignore_errors=True)
        self._notebook(notebook, box)

    def _submit(self, notebook: Path, box: Path) -> None:
        """In an empty folder: a run that another version of the kit left there would be resumed."""
        shutil.rmtree(box / "working", ignore_errors=True)
        self._notebook(notebook, box)

    def _again(self, stage: str) -> Path:
        """Where a run of inference without the notebook writes."""
        return self.root / manifest.slug(stage)

    def _infer(self, box: Path, stage: str, members: Sequence[Path], *options: str) -> None:
        """The rows of the test set once more, by the kit that the notebook installed, and guarded as it was."""
        out = self._again(stage)
        shutil.rmtree(out, ignore_errors=True)
        test = next((box / "input").rglob("test.csv"))
        try:
            self._kit(box, "infer", *members, f"--test={test}", f"--out={out / 'submission.csv'}", *options)
        except KitError as error:
            raise KitError(f"{stage}: {error}") from None

    def _family(self, family: Family, made: str, box: Path) -> None:
        """A family's sample by the kit that the notebook installed; one that fails is named, and costs nothing else."""
        folder = self._again(family.name)
        try:
            key = [made, Recipe.load(family.recipe).digest]
            self._stage(family.name, key, lambda: play(family, folder, partial(self._kit, box)))
            judged = judge(family, folder)
            self.judged[judged.pop("task")] = judged | {"seconds": self.seconds[family.name]}
        except (KitError, OSError) as error:
            self.failures[family.name] = str(error)

    def _kit(self, box: Path, *arguments: object) -> dict[str, Any]:
        """What a verb of the kit says that the notebook installed, guarded as the notebook was. Raises KitError."""
        python = box / "python"
        log = next(python.glob("lib/python*/site-packages")) / guard.LOG
        log.unlink(missing_ok=True)
        command = [str(part) for part in (python / "bin" / "python", "-m", "kit", *arguments, "--json")]
        done = subprocess.run(command, env=runtime.clean_environment(), cwd=python, capture_output=True, text=True, check=False)
        self.attempts += log.read_text().splitlines() if log.is_file() else []
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise KitError(f"kit {arguments[0]} failed: {said[-1]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _mount_competition(self, box: Path) -> None:
        folder = write_sample(box / "input" / "competitions" / "kit-sample")
        (folder / _ANSWERS).unlink()

    def _mount_bundles(self, packed: Path, mounts: Path) -> str:
        """Copy what was packed under the older mount layout; gives a digest of it all."""
        digests = {}
        for bundle in sorted(packed.iterdir()):
            if (bundle / manifest.FILE).is_file():
                digests[bundle.name] = manifest.read(bundle).digest
                if not (mounts / bundle.name / manifest.FILE).is_file() or manifest.read(mounts / bundle.name).digest != digests[bundle.name]:
                    shutil.rmtree(mounts / bundle.name, ignore_errors=True)
                    shutil.copytree(bundle, mounts / bundle.name)
        for mounted in [path for path in mounts.iterdir() if (path / manifest.FILE).is_file() and path.name not in {*digests, CODE}]:
            shutil.rmtree(mounted)  # packed by an earlier run
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _summary(self, train: Path, infer: Path) -> dict[str, Any]:
        task = MultipleChoice()
        questions = task.read(read_table(next((infer / "input").rglob("test.csv"))))
        answers = read_table(self.answers).frame.set_index("id")["answer"]
        targets = np.array(["ABCDE".index(answers[question.id]) for question in questions])
        places = [infer / "working", *self.alone]
        outcome = json.loads((infer / "working" / "outcome.json").read_text())
        members = {name: values for place in places for name, values in _predictions(place).items()}
        runs = {path.parent.name: json.loads(path.read_text()) for path in sorted((train / "working/artifacts/runs").glob("*/metrics.json"))}
        runs = {name: values for name, values in runs.items() if manifest.slug(name) in outcome["weights"]}
        metric = task.metrics["map@3"]
        text = self._best_passages(train, [question.prompt for question in questions])
        scored = {"longest": longest(questions), "overlap": overlap(questions, text), **members}
        maps: dict[str, Any] = {name: bootstrap(metric, prediction, targets)._asdict() for name, prediction in scored.items()}
        maps["random"] = {"value": random_map(5)}
        maps["test"] = self._file_score(task, infer / "working" / "submission.csv")._asdict()
        maps["without_context"] = self._file_score(task, self._again(_WITHOUT) / "submission.csv")._asdict()
        maps["oof"] = {**{name: values["oof"]["map@3"] for name, values in runs.items()}, "blend": outcome["oof"]["blend"]}
        maps["folds"] = {name: {fit: row["map@3"] for fit, row in values["folds"].items()} for name, values in runs.items()}
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
        return {
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)}, "parts": _parts(train, outcome), "reused": self.reused, "sockets": self.attempts,
            "peak_mb": round(peak), "rows": len(questions), "weights": outcome["weights"], "map@3": maps, "families": self.judged,
            "failures": outcome["failures"] | self.failures,
        }  # fmt: skip

    def _file_score(self, task: MultipleChoice, path: Path) -> Estimate:
        prediction, targets = task.parse(read_table(path), read_table(self.answers))
        return bootstrap(task.metrics["map@3"], prediction, targets)

    def _best_passages(self, train: Path, prompts: list[str]) -> list[str]:
        """The best BM25 passage for each prompt, for the overlap rule."""
        source = next((train / "input").rglob("passages.jsonl"))
        corpus = Corpus.build(source, self.root / "baseline" / "corpus")
        hits = BM25.build(corpus, self.root / "baseline" / "bm25").search(prompts, 1)
        return [corpus[int(row[0])].text if row[0] >= 0 else "" for row in hits.ids]


def _predictions(place: Path) -> dict[str, np.ndarray]:
    """Of the members that scored every row."""
    return {name: values for name, values in np.load(place / "predictions.npz").items() if np.isfinite(values).all()}


def _parts(train: Path, outcome: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds inside the two notebooks: of every fit, and of what inference measured."""
    logs = {path.parent.name: path.read_text().splitlines() for path in sorted((train / "working/artifacts/runs").glob("*/log.jsonl"))}
    logs = {name: lines for name, lines in logs.items() if manifest.slug(name) in outcome["weights"]}
    entries = [(run, key, value) for run, lines in logs.items() for line in lines for key, value in json.loads(line).items()]
    return {
        "train": {f"{run} {key.partition('/')[0]}": value for run, key, value in entries if key.endswith("/seconds")},
        "infer": {name: round(seconds, 1) for name, seconds in outcome["seconds"].items() if name != "total"},
    }


def _table(summary: dict[str, Any]) -> str:
    """What a person wants to see at the end."""
    maps = summary["map@3"]
    lines = ["", f"{'stage':<44} seconds"]
    for name, value in summary["seconds"].items():
        lines += [f"{name:<44} {value:>7.1f}{'  (kept)' if name in summary['reused'] else ''}"]
        lines += [f"  of this {part:<34} {seconds:>7.1f}" for part, seconds in summary["parts"].get(name, {}).items()]
    lines += ["", f"{'MAP@3 in cross-validation':<44} value ± SE"]
    for run, fits in maps["folds"].items():
        lines += [_line(f"{run} {fit}", estimate) for fit, estimate in fits.items()]
        lines += [_line(f"{run} OOF", maps["oof"][run])]
    lines += [_line("blend OOF", {"value": maps["oof"]["blend"]["map@3"], "se": maps["oof"]["blend"]["se"]})]
    lines += ["", f"{'MAP@3 on the test set, ' + str(summary['rows']) + ' rows':<44} value ± SE"]
    named = {"random": "random order", "longest": "longest option", "overlap": "word overlap with the best passage"}
    lines += [_line(label, maps[name]) for name, label in named.items()]
    lines += [_line(f"member {name}, weight {weight:.2f}", maps[name]) for name, weight in summary["weights"].items() if name in maps]
    lines += [_line("blend without contexts", maps["without_context"]), _line("blend = submission.csv", maps["test"])]
    lines += ["", f"{'other task families, each on its sample':<44} value ± SE"] if summary["families"] else []
    for kind, judged in summary["families"].items():
        lines += [_line(f"{kind}, {judged['metric']}", judged), _line(f"  {judged['baseline']['name']}", judged["baseline"])]
    lines += ["", *(f"FAILED: {name}: {reason}" for name, reason in summary["failures"].items())]
    lines += [f"peak memory of one process {summary['peak_mb']} MB, connections tried outside this machine: {len(summary['sockets'])}"]
    return "\n".join(lines)


def _line(label: str, estimate: dict[str, float]) -> str:
    return f"  {label:<42} {estimate['value']:.3f}" + (f" ± {estimate['se']:.3f}" if "se" in estimate else "")
