"""Scoring processes: what they answer, that whatever happens to one costs its order alone, and that none outlives the run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kit import assemble, manifest, runtime
from kit.config import Recipe
from kit.data.tables import read_table
from kit.inference.crew import Event, Fetch, Order, Processes
from kit.inference.scorer import Contexts
from kit.predict import predict
from tests import packed

ROOT = Path(__file__).parents[2]
KEY = "found"
ROWS = tuple(range(packed.TEST_ROWS))
LONG = (0,) * 20_000  # scored in minutes


def prepare(run: Path) -> Path:
    """A run folder with the setup.json of the workshop's members."""
    shop = packed.workshop()
    members, contexts = {}, {}
    for name, folder in shop.members.items():
        recipe, index = Recipe.load(folder / "recipe.toml"), manifest.read(folder).meta["index"]
        members[name] = {"folder": str(folder), "key": KEY if index else None}
        if index and recipe.retrieve:
            contexts[KEY] = {"index": str(shop.bundles / index), "settings": recipe.retrieve.model_dump(mode="json")}
    task = {"kind": "multiple_choice", "max_length": 64}
    setup = {"test": str(shop.competition / "test.csv"), "task": task, "members": members, "contexts": contexts}
    run.mkdir(parents=True, exist_ok=True)
    (run / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
    return run


def with_member(run: Path, name: str, folder: Path) -> None:
    """Add a member to a run's setup.json."""
    setup = json.loads((run / "setup.json").read_text(encoding="utf-8"))
    setup["members"][name] = {"folder": str(folder), "key": None}
    (run / "setup.json").write_text(json.dumps(setup), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("crew") / "submission.run")


@pytest.fixture(scope="module")
def opened(run: Path) -> Iterator[Processes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")  # bm25s compiles for seconds, which so few passages are not worth
        patch.setenv("OMP_NUM_THREADS", "1")
        crew = Processes.open(run, devices=("cpu", "cpu"))
        with contextlib.closing(crew):
            yield crew


@pytest.fixture
def crew(opened: Processes) -> Iterator[Processes]:
    yield opened
    opened.dismiss(0)
    opened.dismiss(1)
    opened.wait(0)


def order(member: str = "plain", fit: str = "fold0", rows: tuple[int, ...] = ROWS, *, view: str = "full", serial: int = 1) -> Order:
    return Order(serial, member, fit, view, rows, 4096, "fp32")


def answer(crew: Processes, slot: int, what: Order | Fetch) -> Event:
    """What becomes of an order."""
    crew.send(slot, what)
    return finish(crew, 1)[0]


def finish(crew: Processes, count: int) -> list[Event]:
    """The next events that are no beats."""
    events: list[Event] = []
    until = time.monotonic() + 120
    while len(events) < count and time.monotonic() < until:
        events += [event for event in crew.wait(1) if event.kind != "beat"]
    return events


def begin(crew: Processes, slot: int = 0, rows: tuple[int, ...] = LONG) -> None:
    """Send a long order and wait until it is being scored."""
    crew.send(slot, order(rows=rows))
    beats = 0
    while beats < 4:
        beats += len(crew.wait(60))


def processes(run: Path) -> list[int]:
    """Process ids of what works for a run and lives."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run).encode() in (place / "cmdline").read_bytes() and state(int(place.name)) not in "ZX":
                found.append(int(place.name))
    return found


def appear(run: Path) -> list[int]:
    """`processes`, as soon as there are any."""
    until = time.monotonic() + 10
    while not (found := processes(run)) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def state(pid: int) -> str:
    return fields(pid)[0]


def parent(pid: int) -> int:
    return int(fields(pid)[1])


def fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def workers(run: Path) -> list[int]:
    """Those that score: children of another one."""
    every = processes(run)
    return [pid for pid in every if parent(pid) in every]


def keepers(run: Path) -> list[int]:
    return sorted(set(processes(run)) - set(workers(run)))


def gone(pids: list[int], run: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while set(pids) & set(processes(run)) and time.monotonic() < until:
        time.sleep(0.02)
    return not set(pids) & set(processes(run))


# --- what they answer ------------------------------------------------------------------------------------------------------------


def test_rows_get_the_predictions_of_the_model_itself(crew: Processes) -> None:
    folder = packed.workshop().members["plain"]
    recipe = Recipe.load(folder / "recipe.toml")
    task = assemble.make_task(recipe)
    examples = [task.read(read_table(packed.workshop().competition / "test.csv"))[row] for row in (7, 2, 2, 5)]
    tokens = assemble.load_tokens(recipe, folder / "fold1")
    features = task.encode(examples, tokens)
    chosen = runtime.choose("fp32", "cpu")
    scores = predict(assemble.load_model(recipe, task, folder / "fold1"), task, features, tokens, runtime=chosen, batch_tokens=4096)
    event = answer(crew, 0, order(fit="fold1", rows=(7, 2, 2, 5), serial=12))
    assert (event.slot, event.serial, event.kind, event.rows, event.why) == (0, 12, "scored", (7, 2, 2, 5), "")
    assert event.prediction is not None and event.prediction.dtype == np.float32
    np.testing.assert_allclose(event.prediction, task.decode(scores, features, examples), rtol=1e-5)
    assert event.tokens == sum(feature.tokens for feature in features)
    assert event.seconds > 0 and event.load_s > 0


def test_rows_that_are_encoded_in_parts_keep_their_places(crew: Processes) -> None:
    event = answer(crew, 0, order(rows=(1,) * 300 + ROWS))
    few = answer(crew, 0, order())
    assert event.prediction is not None and few.prediction is not None and event.prediction.shape == (310, 5)
    np.testing.assert_allclose(event.prediction, few.prediction[[1] * 300 + list(ROWS)], rtol=1e-4)


def test_a_view_encodes_the_rows_in_another_way(crew: Processes) -> None:
    assert answer(crew, 0, Fetch(1, KEY, (5, 6))).kind == "fetched"
    full, short = (answer(crew, 0, order("reader", rows=(5, 6), view=view)) for view in ("full", "short"))
    assert short.kind == "scored" and 0 < short.tokens < full.tokens
    assert full.prediction is not None and short.prediction is not None and not np.allclose(full.prediction, short.prediction)


def test_slots_work_at_once_and_give_equal_results_for_equal_orders(crew: Processes, run: Path) -> None:
    rows = ROWS * 15
    begin(crew, 0, rows)
    begin(crew, 1, rows)
    until = time.monotonic() + 60
    while len(workers(run)) < 2 and time.monotonic() < until:  # the signs of life that `begin` saw may all be of the first
        time.sleep(0.02)
    assert len(workers(run)) == 2
    first, second = sorted(finish(crew, 2), key=lambda event: event.slot)
    assert (first.slot, second.slot) == (0, 1)
    np.testing.assert_array_equal(first.prediction, second.prediction)
    crew.dismiss(0)
    np.testing.assert_array_equal(answer(crew, 0, order(rows=rows)).prediction, first.prediction)


def test_a_workers_pipes_are_its_own(crew: Processes, run: Path) -> None:
    answer(crew, 0, order())
    answer(crew, 1, order())
    every = keepers(run) + workers(run)
    sockets = [{os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(path).startswith("socket")} for pid in every]
    assert len(every) == 4 and all(sockets) and len(set().union(*sockets)) == sum(map(len, sockets))


def test_a_member_keeps_its_process_for_all_fits_and_gives_it_back_to_the_next(crew: Processes, run: Path) -> None:
    answer(crew, 0, order(fit="fold0"))
    plain, keeper = workers(run), keepers(run)
    again = answer(crew, 0, order(fit="fold0"))
    answer(crew, 0, order(fit="fold1"))
    assert workers(run) == plain and again.load_s < again.seconds + 0.05, "what is loaded is not loaded again"
    assert answer(crew, 0, order("reader")).kind == "scored"
    reader = workers(run)
    assert len(reader) == 1 and reader != plain and keepers(run) == keeper and parent(reader[0]) in keeper


def test_a_keeper_has_no_thread_when_it_forks(crew: Processes, run: Path) -> None:
    answer(crew, 0, order())
    answer(crew, 1, order("reader"))
    assert [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in keepers(run)] == [1, 1]
    assert "fork" not in (run / "worker-0.log").read_text(encoding="utf-8"), "Python 3.12 warns of threads"


def test_contexts_are_fetched_once_and_read_by_the_members(crew: Processes, run: Path) -> None:
    before = answer(crew, 1, order("reader"))
    fetched = answer(crew, 0, Fetch(5, KEY, (4, 0, 1)))
    assert (fetched.kind, fetched.serial, fetched.rows, fetched.why) == ("fetched", 5, (4, 0, 1), "")
    assert fetched.chars is not None and (fetched.chars > 20).all() and fetched.hints is not None
    assert {name: values.shape for name, values in fetched.hints.items()} == {"overlap": (3, 5), "length": (3, 5)}
    known = json.loads((run / "contexts" / KEY / "4-3.json").read_text(encoding="utf-8"))
    assert [len(known[str(row)]) for row in (4, 0, 1)] == fetched.chars.tolist()
    after = answer(crew, 1, order("reader"))
    assert before.prediction is not None and after.prediction is not None and after.tokens > before.tokens
    changed = (np.abs(after.prediction - before.prediction) > 2e-6).any(1)
    assert set(np.flatnonzero(changed)) & {4, 0, 1} and set(np.flatnonzero(changed)) <= {4, 0, 1}

    (run / "contexts" / KEY / "4-3.json").write_text(json.dumps(known | {"0": "other"}), encoding="utf-8")
    crew.dismiss(0)
    more = answer(crew, 0, Fetch(6, KEY, (0, 2, 0)))
    assert more.chars is not None and more.chars[[0, 2]].tolist() == [5, 5] and more.chars[1] > 20, "what is on disk is not fetched again"
    assert sorted(path.name for path in (run / "contexts" / KEY).iterdir()) == ["2-1.json", "4-3.json", "5-2.json"]


def test_a_context_file_that_cannot_be_read_is_fetched_again(crew: Processes, run: Path) -> None:
    assert answer(crew, 0, Fetch(1, KEY, (8,))).kind == "fetched"
    (run / "contexts" / KEY / "8-1.json").write_text('{"8": "Alb', encoding="utf-8")
    crew.dismiss(0)
    again = answer(crew, 0, Fetch(2, KEY, (8,)))
    assert again.chars is not None and again.chars[0] > 20
    assert len(json.loads((run / "contexts" / KEY / "8-1.json").read_text(encoding="utf-8"))["8"]) == again.chars[0]


def test_megabytes_come_through_the_pipe_and_work_is_heard_of(crew: Processes) -> None:
    crew.send(0, Fetch(1, KEY, (3,) * 20_000))
    events = crew.wait(30)
    while events[-1].kind == "beat":
        events += crew.wait(30)
    *beats, last = events
    assert last.hints is not None and last.hints["length"].shape == (20_000, 5) and last.rows == (3,) * 20_000
    assert beats and {(beat.kind, beat.serial, beat.slot) for beat in beats} == {("beat", 1, 0)}


def test_rows_that_do_not_come_out_finite_are_nan_and_the_others_are_not(crew: Processes, run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shop = packed.copy(tmp_path)
    folder = shop.members["plain"]
    recipe = Recipe.load(folder / "recipe.toml")
    task, tokens = assemble.make_task(recipe), assemble.load_tokens(recipe, folder / "fold0")
    features = task.encode(task.read(read_table(shop.competition / "test.csv")), tokens)
    used = [set(np.concatenate([encoding["input_ids"] for encoding in feature.encodings]).tolist()) for feature in features]
    rare = max(used[3] - set().union(*(ids for row, ids in enumerate(used) if row != 3)))
    weights = load_file(folder / "fold0" / "model.safetensors")
    weights["backbone.embeddings.word_embeddings.weight"][rare] = float("nan")
    save_file(weights, folder / "fold0" / "model.safetensors")
    with_member(run, "broken", folder)
    event = answer(crew, 0, order("broken"))
    assert event.kind == "scored" and event.prediction is not None
    assert np.isnan(event.prediction).all(1).tolist() == [row == 3 for row in ROWS] and np.isfinite(np.delete(event.prediction, 3, 0)).all()


# --- what can happen to them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (order(fit="fold9"), "BundleError: .*fold9"),
        (order("nobody"), "KeyError: 'nobody'"),
        (order(view="upside-down"), "KeyError: 'upside-down'"),
        (order(rows=(0, 99)), "IndexError"),
        (Fetch(1, "nothing", (0,)), "KeyError: 'nothing'"),
    ],
)
def test_an_order_that_cannot_be_done_fails_alone(crew: Processes, run: Path, wrong: Order | Fetch, why: str) -> None:
    event = answer(crew, 0, wrong)
    assert (event.slot, event.serial, event.kind, event.memory) == (0, 1, "failed", False)
    assert re.search(why, event.why) and "\n" not in event.why
    assert not workers(run), "what failed gives its memory back"
    assert answer(crew, 0, order()).kind == "scored"


def test_lack_of_memory_is_told_from_other_failures(crew: Processes, run: Path, tmp_path: Path) -> None:
    folder = packed.copy(tmp_path).members["plain"]
    config = json.loads((folder / "fold0" / "config.json").read_text(encoding="utf-8"))
    (folder / "fold0" / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}), encoding="utf-8")
    with_member(run, "huge", folder)
    event = answer(crew, 0, order("huge"))
    assert event.kind == "failed" and event.memory and "allocate memory" in event.why and "\n" not in event.why


@pytest.mark.parametrize(("number", "why", "memory"), [(signal.SIGKILL, "out of memory?", True), (signal.SIGSEGV, "Segmentation", False)])
def test_a_worker_that_is_killed_costs_its_order(crew: Processes, run: Path, number: int, why: str, memory: bool) -> None:
    begin(crew)
    os.kill(workers(run)[0], number)
    [event] = finish(crew, 1)
    assert (event.kind, event.serial, event.memory) == ("failed", 1, memory) and f"signal {int(number)}" in event.why and why in event.why
    assert answer(crew, 0, order()).kind == "scored"


def test_a_worker_that_dies_without_an_order_is_replaced(crew: Processes, run: Path) -> None:
    answer(crew, 0, order())
    [worker] = workers(run)
    os.kill(worker, signal.SIGKILL)
    assert gone([worker], run, 5) and crew.wait(0.2) == []
    assert answer(crew, 0, order()).kind == "scored"


def test_a_hung_worker_is_silent_and_can_be_dismissed(crew: Processes, run: Path) -> None:
    begin(crew)
    hung = workers(run)
    os.kill(hung[0], signal.SIGSTOP)
    time.sleep(0.1)
    crew.wait(0)
    assert crew.wait(0.5) == []
    crew.dismiss(0)
    assert gone(hung, run, 0) and crew.wait(0.1) == [], "a dismissed order gives no event"
    assert answer(crew, 0, order()).kind == "scored"


def test_a_long_order_can_be_given_to_a_worker_that_hangs(crew: Processes, run: Path) -> None:
    answer(crew, 0, order())
    os.kill(workers(run)[0], signal.SIGSTOP)
    began = time.monotonic()
    crew.send(0, order(rows=tuple(range(100_000, 120_000))))
    assert time.monotonic() - began < 1
    crew.dismiss(0)
    assert not workers(run)


def test_a_keeper_that_hangs_while_it_starts_is_not_waited_for(tmp_path: Path) -> None:
    run = prepare(tmp_path / "submission.run")
    with contextlib.closing(Processes.open(run, start_s=0.5)) as crew:
        while not (hung := keepers(run)):
            time.sleep(0.01)
        os.kill(hung[0], signal.SIGSTOP)
        began = time.monotonic()
        assert crew.slots == ("cpu",)
        assert time.monotonic() - began < 5
        assert gone(hung, run, 1)
        assert answer(crew, 0, order()).kind == "scored", "the first order starts another one"


def test_a_hung_keeper_is_replaced(crew: Processes, run: Path) -> None:
    begin(crew)
    [worker] = workers(run)
    keeper = parent(worker)
    os.kill(keeper, signal.SIGSTOP)
    crew.dismiss(0)
    assert gone([worker, keeper], run, 1)
    assert answer(crew, 0, order()).kind == "scored"


def test_a_worker_ends_with_its_keeper(crew: Processes, run: Path) -> None:
    begin(crew)
    [worker] = workers(run)
    keeper = parent(worker)
    os.kill(keeper, signal.SIGKILL)
    [event] = finish(crew, 1)
    assert event.kind == "failed" and event.memory and gone([worker, keeper], run, 1)
    assert answer(crew, 0, order()).kind == "scored"


PARENT = """
import sys, time
from pathlib import Path
from kit.inference.crew import Order, Processes
crew = Processes.open(Path(sys.argv[1]), devices=("cpu", "cpu"))
beats = [0, 0]
for slot in (0, 1):
    crew.send(slot, Order(1, "plain", "fold0", "full", (0,) * 20_000, 4096, "fp32"))
while min(beats) < 4:
    for event in crew.wait(60):
        beats[event.slot] += 1
print("scoring", "torch" in sys.modules, flush=True)
time.sleep(600)
"""


def test_no_process_outlives_a_run_that_is_killed_not_even_one_that_hangs(tmp_path: Path) -> None:
    run = prepare(tmp_path / "killed.run")
    with start_parent(run) as script:
        assert script.stdout is not None and script.stdout.readline() == "scoring False\n", "the run itself never imports torch"
        others = [pid for pid in processes(run) if pid != script.pid]
        scoring = [pid for pid in others if parent(pid) != script.pid]
        assert len(others) == 4 and len(scoring) == 2
        os.kill(scoring[1], signal.SIGSTOP)
        script.kill()
        assert gone(others, run, 1)


def test_a_process_that_still_imports_ends_with_the_run(tmp_path: Path) -> None:
    run = prepare(tmp_path / "killed.run")
    with start_parent(run) as script:
        everything: list[int] = []
        while not everything:
            everything = [pid for pid in processes(run) if b"inference.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.3)
        script.kill()
        assert gone(everything, run, 1.5)


@contextlib.contextmanager
def start_parent(run: Path) -> Iterator[subprocess.Popen[str]]:
    environment = runtime.worker_environment("cpu") | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(run)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as script:
        try:
            yield script
        finally:
            script.kill()
            for pid in processes(run):  # none, unless the test fails
                os.kill(pid, signal.SIGKILL)


# --- how they start --------------------------------------------------------------------------------------------------------------


def test_with_cuda_the_first_process_scores_itself_and_is_replaced_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    run = prepare(tmp_path / "cuda.run")
    with contextlib.closing(Processes.open(run, devices=("cuda:0",))) as crew:
        assert answer(crew, 0, Fetch(1, KEY, (0,))).kind == "fetched"
        first = processes(run)
        assert len(first) == 1
        crew.dismiss(0)
        assert not processes(run)
        crew.send(0, Fetch(2, KEY, (1,)))
        assert len(appear(run)) == 1
    assert not processes(run)


def test_a_process_that_dies_while_importing_is_reported_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so.1 is too old')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with contextlib.closing(Processes.open(prepare(tmp_path / "x.run"))) as crew:
        assert crew.slots == ("cpu",)
        for _ in range(2):
            event = answer(crew, 0, order())
            assert (event.kind, event.memory) == ("failed", False)
            assert event.why == "ended with exit code 1: ImportError: libcuda.so.1 is too old"


def test_a_process_that_cannot_be_started_is_a_failed_order(tmp_path: Path) -> None:
    run = prepare(tmp_path / "x.run")
    (run / "worker-0.log").mkdir()
    with contextlib.closing(Processes.open(run, devices=("cpu",))) as crew:
        event = answer(crew, 0, order())
    assert event.kind == "failed" and "cannot be started" in event.why and "worker-0.log" in event.why


def test_a_closed_crew_leaves_no_process_and_no_pipe(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    run = prepare(tmp_path / "x.run")
    with contextlib.closing(Processes.open(run)) as crew:
        assert crew.slots == ("cpu",) * (not runtime.gpus()) + tuple(f"cuda:{number}" for number in range(len(runtime.gpus())))
        crew.send(0, order())
        assert appear(run)
    assert not processes(run) and len(os.listdir("/proc/self/fd")) == before


def test_contexts_that_the_disk_has_no_room_for_are_kept_elsewhere_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    run = prepare(tmp_path / "submission.run")
    (run / "contexts").write_text("no folder can be made here")
    Contexts(run, "key").write({3: "albedo", 5: "entropy"})
    assert Contexts(run, "key").read() == {3: "albedo", 5: "entropy"}
    assert Contexts(run, "other").read() == {}
