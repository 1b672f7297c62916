"""kit.rehearsal.chaos and kit.rehearsal.injure: what is done to a run really happens, and what comes of it is judged rightly."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from kit import assemble, manifest
from kit.config import Recipe
from kit.errors import BundleError, ConfigError, RehearsalError
from kit.rehearsal import injure
from kit.rehearsal.chaos import PROMISED_S, Bench, Kill, Story, Tally, _bury, _strike, chaos, draw
from kit.rehearsal.injure import FAULTS, SUBMISSION, Fault, Run, lives, own_disk
from tests import packed

SLEEP = "import time; time.sleep(60)"
CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}, sys.argv[1]]); {SLEEP}"
WRITE = "import sys, time\nfile = open(sys.argv[1], 'ab', buffering=0)\nwhile True:\n    file.write(bytes(100)); time.sleep(0.02)"


def start(code: str, folder: Path, *arguments: object) -> Run:
    return Run.start([sys.executable, "-c", code, *map(str, arguments)], folder, folder.with_suffix(".log"))


def eventually(met: Callable[[], object], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(met())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A member bundle beside the others, to be spoiled."""
    folder = shutil.copytree(packed.workshop().bundles, tmp_path / "bundles")
    return Path(folder) / packed.workshop().members["reader"].name


# --- what is promised ------------------------------------------------------------------------------------------------------------


def test_kills_fall_over_a_whole_run_and_a_little_after_it_on_all_kinds_of_targets() -> None:
    rng = np.random.default_rng(0)
    blows = [draw(rng, 10.0) for _ in range(4000)]
    times = np.array([blow.after_s for blow in blows])
    assert times.min() >= 0.2
    assert times.max() <= 11.0
    assert np.histogram(times, bins=10, range=(0.2, 11.0))[0].min() > 300
    shares = {target: count / 4000 for target, count in Counter(blow.target for blow in blows).items()}
    assert shares == pytest.approx({"run": 0.5, "worker": 0.25, "group": 0.25}, abs=0.03)
    assert draw(np.random.default_rng(1), 10.0) == draw(np.random.default_rng(1), 10.0)


def test_a_submission_is_valid_only_with_every_id_and_letters_that_are_options(tmp_path: Path) -> None:
    competition = packed.write_competition(tmp_path / "competition")
    bench = Bench(packed.workshop().bundles, competition, tmp_path)
    out = tmp_path / SUBMISSION
    assert "no such file" in bench.objection(out)
    shutil.copyfile(competition / "sample_submission.csv", out)
    assert bench.objection(out) == ""
    rows = packed.read_rows(out)
    packed.write_rows(out, rows[:-1])
    assert "9 rows" in bench.objection(out)
    packed.write_rows(out, [*rows[:-1], [rows[-1][0], "A B X"]])
    assert "'A B X'" in bench.objection(out)
    packed.write_rows(out, [*rows[:-1], [rows[-1][0], ""]])
    assert "empty" in bench.objection(out)
    out.write_bytes(b"")
    assert bench.objection(out)


def test_nothing_is_promised_in_the_first_seconds_of_a_start_and_a_valid_file_always_after_it() -> None:
    story = Story(Path("0000"))
    story.begin(100.0)
    assert not story.look("no such file", 104.9)
    story.kills.append(Kill(4.9, "run", had_file=False))
    story.begin(105.0)
    assert not story.look("no such file", 105.0 + PROMISED_S - 0.1)
    assert (story.kills[0].is_valid, story.broken) == (None, [])
    assert story.look("", 105.0 + PROMISED_S - 0.05)
    assert story.kills[0].is_valid
    story.kills.append(Kill(10.0, "run", had_file=False))
    assert not story.look("it is empty", 110.0)
    assert [kill.is_valid for kill in story.kills] == [True, False]
    assert story.broken == ["0000: no valid submission 10.0 s after the first start: it is empty"]


def test_a_file_that_is_late_breaks_the_promise_of_every_kill_before() -> None:
    story = Story(Path("0000"))
    story.begin(100.0)
    story.kills.append(Kill(1.0, "run", had_file=False))
    story.begin(101.5)
    story.look("no such file", 101.5 + PROMISED_S)
    assert [kill.is_valid for kill in story.kills] == [False]
    assert len(story.broken) == 1


def test_the_tally_counts_kills_by_what_was_there_when_it_was_due() -> None:
    equal = Story(Path("0000"), kills=[Kill(1.0, "run", False, True), Kill(4.0, "group", True, True)], first_valid_s=1.5, is_equal=True)
    other = Story(Path("0001"), kills=[Kill(7.0, "worker", True, True), Kill(9.0, "run", False, False)], first_valid_s=2.5, broken=["0001: bad"])
    alone = Story(Path("0002"), is_equal=True)
    summary = Tally([equal, other, alone]).summary()
    assert (summary["kills"], summary["valid"], summary["valid_early"]) == (4, 3, {"kills": 2, "valid": 1})
    assert (summary["resumed_equal"], summary["resumed"], summary["runs"]) == (False, {"runs": 2, "equal": 1}, 3)
    assert summary["first_valid_s"] == {"median": 2.0, "max": 2.5}
    assert summary["targets"] == {"run": 2, "group": 1, "worker": 1}
    assert summary["broken"] == ["0001: bad"]
    assert Tally([equal]).summary()["resumed_equal"]


# --- what is done to processes ---------------------------------------------------------------------------------------------------


def test_each_target_is_killed_and_what_outlives_the_run_is_told_and_killed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for target, left in (("worker", 0), ("group", 0), ("run", 1)):
        folder = tmp_path / target
        with start(CHILD, folder, folder / injure.RUN) as run:
            assert eventually(run.family)
            (child,) = run.family()
            assert _strike(run, target, rng)
            assert run.is_over == (target != "worker")
            assert eventually(lambda child=child, left=left: lives(child) == bool(left))
        orphans = _bury(run, [])
        assert orphans == (f"processes [{child.pid}] outlived the run by 2 s" if left else "")
        assert eventually(lambda child=child: not lives(child))


def test_a_blow_that_comes_too_late_does_not_count(tmp_path: Path) -> None:
    with start("pass", tmp_path / "run") as run:
        run.process.wait()
        assert not any(_strike(run, target, np.random.default_rng(0)) for target in ("run", "worker", "group"))


def test_a_run_ends_with_whoever_watches_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start(CHILD, tmp_path / "run", "child") as run:
        assert eventually(run.family)
        family = run.family()
        raise KeyboardInterrupt
    assert run.is_over
    assert eventually(lambda: not any(map(lives, family)))


def test_a_throttled_process_does_little_and_goes_on_afterwards(tmp_path: Path) -> None:
    out = tmp_path / "written"
    with start(WRITE, tmp_path / "run", out) as run:
        assert eventually(out.is_file)
        begun, before = time.monotonic(), out.stat().st_size
        injure._throttle(lambda: [run.process], 0.8, until=lambda: time.monotonic() > begun + 2)
        slow = out.stat().st_size - before
        assert run.process.status() != psutil.STATUS_STOPPED
        assert 0 < slow < 100 * 2 / 0.02 / 2  # less than half of what it would have written
        assert eventually(lambda: out.stat().st_size > before + slow)


def test_a_full_disk_takes_nothing_more_and_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with own_disk(folder, 1):
        if not os.path.ismount(folder):
            pytest.skip("this machine lets nobody mount a disk")
        (folder / SUBMISSION).write_text("there")
        with start(WRITE, folder, folder / "more") as run:
            injure.fill_disk(run)
        assert (folder / SUBMISSION).read_text() == "there"
        assert "No space left" in folder.with_suffix(".log").read_text()
    assert not os.path.ismount(folder)


def test_where_no_disk_can_be_made_the_run_is_forbidden_to_write(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / SUBMISSION).write_text("there")
    with start(WRITE, folder, tmp_path / "written") as run:
        assert eventually((tmp_path / "written").is_file)
        injure.fill_disk(run)
        assert eventually(lambda: run.is_over)
    assert run.process.returncode == 1  # of an exception, which it could not even log


# --- what is done to bundles -----------------------------------------------------------------------------------------------------


def test_poisoned_weights_are_all_nan_in_a_bundle_that_verifies(bundle: Path) -> None:
    injure.poison(bundle)
    manifest.verify(bundle)
    weights = [tensor for path in bundle.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert weights
    assert all(np.isnan(tensor).all() for tensor in weights)


def test_a_garbled_bundle_verifies_and_cannot_be_loaded(bundle: Path) -> None:
    injure.garble(bundle)
    recipe = Recipe.load(manifest.verify(bundle).root / "recipe.toml")
    with pytest.raises(Exception, match=r"fold0/(config|tokenizer)\.json"):
        assemble.load_tokens(recipe, bundle / "fold0")
    with pytest.raises(Exception, match=r"fold0/config\.json"):
        assemble.load_model(recipe, assemble.make_task(recipe), bundle / "fold0")


@pytest.mark.parametrize(("injury", "said"), [(injure.flip, "sha256 differs"), (injure.truncate, r"\d+ bytes instead of \d+")])
def test_a_damaged_bundle_does_not_verify(injury: Callable[[Path], object], said: str, bundle: Path) -> None:
    injury(bundle)
    with pytest.raises(BundleError, match=said):
        manifest.verify(bundle)


def test_without_the_index_the_members_are_left(bundle: Path) -> None:
    injure.remove_index(bundle)
    assert {manifest.read(path).kind for path in bundle.parent.iterdir()} == {"member"}
    assert len(list(bundle.parent.iterdir())) == 3


# --- the whole -------------------------------------------------------------------------------------------------------------------


def test_an_unknown_fault_and_a_folder_without_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'hangs' is unknown .did you mean 'hang'"):
        chaos(tmp_path, kills=0, faults=["hangs"])
    (tmp_path / "bundles").mkdir()
    with pytest.raises(BundleError, match="no member bundle"):
        chaos(tmp_path, kills=0, faults=[], bundles=tmp_path / "bundles", competition=tmp_path)


def test_every_fault_says_what_it_does_in_one_line_and_starts_a_command() -> None:
    for fault in FAULTS.values():
        command = fault.command([Path("a"), Path("b")], Path("test.csv"), None, Path("out.csv"))
        assert "\n" not in fault.what
        assert command[0] == sys.executable
    clock = Fault("", clock="t + 5", seconds=7).command([Path("a/b")], Path("test.csv"), Path("s.csv"), Path("out.csv"))
    assert json.loads(clock[-1]) == [["a/b"], "test.csv", "s.csv", "out.csv", 7]
    compile(clock[2], "clock", "exec")


@pytest.mark.slow
def test_killed_and_injured_runs_keep_their_promises(tmp_path: Path) -> None:
    shop = packed.workshop()
    summary = chaos(tmp_path, kills=3, faults=["nan", "flipped-byte", "killed-twice"], bundles=shop.bundles, competition=shop.competition)
    assert summary == json.loads((tmp_path / "chaos" / "summary.json").read_text())
    assert (summary["kills"], summary["valid"], summary["resumed_equal"], summary["broken"]) == (3, 3, True, [])
    assert summary["runs"] >= summary["resumed"]["runs"] == summary["resumed"]["equal"] >= 1
    assert list(summary["faults"]) == ["killed-twice", "nan", "flipped-byte"]
    for fault in summary["faults"].values():
        assert (fault["valid"], fault["in_time"]) == (True, True), fault
        assert fault["lost"] == pytest.approx(summary["map@3"] - fault["map@3"], abs=1e-3)
    assert "sha256 differs" in summary["faults"]["flipped-byte"]["happened"]
    assert "not finite" in summary["faults"]["nan"]["happened"]
    assert not list((tmp_path / "chaos" / "runs").iterdir())


@pytest.mark.slow
def test_a_broken_promise_is_told_once_the_summary_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(run: Run) -> None:
        run.process.wait()
        run.submission.unlink()

    shop = packed.workshop()
    monkeypatch.setitem(FAULTS, "ruin", Fault("the submission is removed at the end", during=ruin))
    with pytest.raises(RehearsalError, match="fault ruin: no valid submission"):
        chaos(tmp_path, kills=0, faults=["ruin"], bundles=shop.bundles, competition=shop.competition)
    told = json.loads((tmp_path / "chaos" / "summary.json").read_text())["faults"]["ruin"]
    assert (told["valid"], told["map@3"], told["lost"]) == (False, None, None)
    assert "no such file" in told["happened"]
