"""What can go wrong between a trained run and its submission, really made and met through the commands: the exit code, and one line that helps.

Exit code 2: the input was refused. 1: work that had begun failed, as every rehearsal and proof does.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

import kit
from kit import manifest
from kit.cli import main
from kit.rehearsal import guard
from kit.rehearsal.box import INPUT
from kit.runtime import INPUT_ROOT
from kit.vendor.dataset import stage
from kit.vendor.profile import Package, Profile
from kit.vendor.wheels import pack_code
from tests import crews, packed
from tests.packed import LAYOUTS, Workshop
from tests.staging import stage_dataset
from tests.tiny_wheels import ROOT, make_image, write_house, write_requirements, write_wheel

OWNER = "owner"
OUTSIDE = "192.0.2.1"  # TEST-NET-1, RFC 5737: nobody's address
KEY = '{"username": "me", "ke' + f'y": "{"0123456789abcdef" * 2}"' + "}"  # put together here, so that no scanner takes this file for a leak


class Bench(NamedTuple):
    """folder: of one test. root: kit-wheels, kit-code, a workshop all of whose members count, and `datasets`, staged with its bundles; not to be changed."""

    folder: Path
    root: Path

    @property
    def shop(self) -> Workshop:
        """Shared, too."""
        return Workshop(self.root / "shop")

    @property
    def staged(self) -> Path:
        """The datasets."""
        return self.root / "datasets"

    @property
    def out(self) -> Path:
        """Where a command that is refused must make nothing."""
        return self.folder / "out"

    @property
    def mounts(self) -> Path:
        """What KIT_INPUT names."""
        return self.folder / "input"

    @property
    def index(self) -> str:
        """The index that two of the three members use."""
        return str(manifest.read(self.shop.members["reader"]).meta["index"])

    @property
    def members(self) -> list[str]:
        """Names of the member bundles."""
        return [member.name for member in self.shop.members.values()]

    def copy(self, *, without: str = "nothing") -> Path:
        """Datasets of its own."""
        return Path(shutil.copytree(self.staged, self.folder / "datasets", ignore=shutil.ignore_patterns(without)))


Arguments = list[object]
Build = Callable[[Bench], Arguments]


def leave(path: Path) -> None:
    """Spoil nothing."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See Bench."""
    folder = tmp_path_factory.mktemp("root")
    shop = packed.copy(folder)
    packed.complement(list(shop.members.values()))
    house = write_house(folder, write_wheel(folder / "index", "tiny-extra"))
    stage([*sorted(shop.bundles.iterdir()), house, pack_code(folder)], folder / "datasets", owner=OWNER)
    return folder


@pytest.fixture
def bench(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv(INPUT_ROOT, str(tmp_path / "input"))
    return Bench(tmp_path, root)


# --- wheels and weights ----------------------------------------------------------------------------------------------------------


def prove(spoil: Callable[[Path], object] = leave, *, tag: str = "py3-none-any") -> Build:
    """Prove a wheelhouse of two, one of them spoiled, for an image with this Python."""

    def build(bench: Bench) -> Arguments:
        python = "{}.{}.{}".format(*sys.version_info)
        Profile(name="mine", source="test", python=python, glibc="2.35", packages={}).save(bench.folder / "mine.json")
        wheels = [write_wheel(bench.folder, "tiny-app", tag=tag), write_wheel(bench.folder, "tiny-base", "2.0")]
        spoil(write_house(bench.folder / "bundles", *wheels) / wheels[0].name)
        return ["vendor", "prove", bench.folder / "bundles", "--profile", bench.folder / "mine.json", "--no-index"]

    return build


def wheels(*requirements: str) -> Build:
    """Vendor for an image with numpy 2.0.2 and nothing of CUDA, from an index of another numpy, what needs it, and what needs CUDA."""

    def build(bench: Bench) -> Arguments:
        index = bench.folder / "index"
        write_wheel(index, "numpy", "2.9.0")
        write_wheel(index, "tiny-new", requires=["numpy>=2.9"])
        write_wheel(index, "nvidia-tiny")
        write_wheel(index, "tiny-gpu", requires=["nvidia-tiny"])
        make_image(numpy=Package(version="2.0.2", requires=())).save(bench.folder / "image.json")
        asked = write_requirements(bench.folder / "asked.in", *requirements)
        return ["vendor", "wheels", "--requirements", asked, "--profile", bench.folder / "image.json", "--find-links", index, "--no-index", "--out", bench.out]

    return build


class Command:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def weights(name: str, dump: Callable[[object, Path], object]) -> Build:
    """Vendor a model folder whose weights are a pickle that runs a command."""

    def build(bench: Bench) -> Arguments:
        model = bench.folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "bert"}')
        dump({"weight": Command(bench.folder / "ran")}, model / name)
        return ["vendor", "weights", model, "--licence", "mit", "--out", bench.out]

    return build


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


# --- bundles and datasets --------------------------------------------------------------------------------------------------------


def bundle(spoil: Callable[[Workshop], object]) -> Build:
    """Stage a run, once something in its workshop is spoiled."""

    def build(bench: Bench) -> Arguments:
        shop = packed.copy(bench.folder)
        for name in ("kit-wheels", "kit-code"):
            shutil.copytree(bench.root / name, shop.bundles / name)
        spoil(shop)
        places = ["--artifacts", shop.artifacts, "--notebooks", ROOT / "notebooks", "--out", bench.out, "--kernels", bench.out]
        return ["vendor", "bundle", shop.runs["plain"], "--owner", OWNER, *places]

    return build


def leak(name: str, content: str = "") -> Callable[[Workshop], object]:
    """A file of this name in the bundle of the wheels."""
    return lambda shop: (shop.bundles / "kit-wheels" / name).write_text(content)


def link(place: str) -> Callable[[Workshop], None]:
    """A link at this place of the workshop to a key outside of it; `*` stands for the run."""

    def spoil(shop: Workshop) -> None:
        path, secret = shop.root / place.replace("*", shop.runs["plain"].name), shop.root.parent / "key.txt"
        secret.write_text(KEY)
        path.unlink(missing_ok=True)
        path.symlink_to(secret)

    return spoil


def push(spoil: Callable[[Path], object] = leave) -> Build:
    """What would be sent of one staged dataset, spoiled."""

    def build(bench: Bench) -> Arguments:
        spoil(stage_dataset(bench.folder / "datasets", f"{OWNER}/kit-member", model__safetensors=b"weights"))
        return ["push", bench.folder / "datasets", "--kernel", "none", "--dry-run", "--artifacts", bench.folder]

    return build


def infer(spoil: Callable[[Path], object] = leave, *, without: str = "nothing") -> Build:
    """Infer from mounted datasets, after spoiling them."""

    def build(bench: Bench) -> Arguments:
        datasets = bench.copy(without=without)
        spoil(datasets)
        packed.mount(datasets.iterdir(), bench.mounts)
        return ["infer", *bench.members, "--test", bench.shop.competition / "test.csv", "--out", bench.folder / "submission.csv"]

    return build


def rehearse(spoil: Callable[[Path], object] = leave, *, without: str = "nothing") -> Build:
    """Rehearse the project's own notebook with datasets that were spoiled."""

    def build(bench: Bench) -> Arguments:
        datasets = bench.copy(without=without)
        spoil(datasets)
        return rehearsed(bench, datasets, ROOT / "notebooks" / "infer.ipynb")

    return build


def damage(datasets: Path) -> None:
    """Change a byte of the weights of a member."""
    packed.damage(next(datasets.glob("plain-*/fold1--model.safetensors")))


# --- the box ---------------------------------------------------------------------------------------------------------------------

MOUNTED = f"import os, pathlib, socket, time\nMOUNTED = pathlib.Path(os.environ.get({INPUT_ROOT!r}, {INPUT!r}))\n"
CONNECT = f"socket.socket().connect(({OUTSIDE!r}, 443))"


def rehearsed(bench: Bench, datasets: Path, notebook: Path, *options: object) -> Arguments:
    places = ["--competition", bench.shop.competition, "--notebook", notebook, "--artifacts", bench.folder / "artifacts"]
    return ["rehearse", datasets, *places, "--profile", "here", "--rows", 20, *options]


def cell(code: str, *options: object) -> Build:
    """Rehearse a notebook of one cell."""

    def build(bench: Bench) -> Arguments:
        notebook = new_notebook(cells=[new_code_cell(MOUNTED + code)])
        nbformat.write(notebook, bench.folder / "mine.ipynb")
        return rehearsed(bench, bench.staged, bench.folder / "mine.ipynb", *options)

    return build


FAULTS: dict[str, tuple[int, Build, tuple[str, ...]]] = {
    # wheels and weights
    "wheel is tampered with": (1, prove(packed.damage), ("tiny_app-1.0-py3-none-any.whl", "sha256 differs", "vendor again")),
    "wheel is missing": (1, prove(Path.unlink), ("wheel of tiny-app 1.0 is missing", "vendor again, or attach the dataset")),
    "wheel is for another Python": (
        1, prove(tag="cp39-cp39-manylinux_2_17_x86_64"), ("tiny_app-1.0-cp39-cp39-manylinux_2_17_x86_64.whl", "Python {}.{}".format(*sys.version_info), "vendor for"),
    ),
    "delta replaces a package of the image": (2, wheels("numpy==2.9.0"), ("profile 'image'", "numpy==2.0.2", "--allow NAME")),
    "delta needs another package of the image": (2, wheels("tiny-new"), ("profile 'image'", "tiny-new", "numpy==2.0.2", "--allow NAME")),
    "delta brings CUDA": (2, wheels("tiny-gpu"), ("profile 'image'", "nvidia-tiny 1.0", "only the image should bring", "--allow nvidia-tiny")),
    "pickle in weights": (2, weights("pytorch_model.bin", as_pickle), ("pytorch_model.bin", "arbitrary code", "safetensors")),
    "pickle in an archive of torch": (2, weights("pytorch_model.bin", torch.save), ("pytorch_model.bin", "arbitrary code", "safetensors")),
    "pickle of its own kind": (2, weights("model.pkl", as_pickle), ("model.pkl", "a pickle", "save_pretrained")),
    # bundles and datasets
    "link to a secret": (2, bundle(link("artifacts/bundles/kit-wheels/notes.txt")), ("kit-wheels/notes.txt", "link that leads out", "key.txt", "remove it")),
    "link to a key in a run": (2, bundle(link("artifacts/runs/*/fold0/config.json")), ("runs/plain-", "fold0/config.json", "link that leads out", "key.txt")),
    ".env": (2, bundle(leak(".env")), ("kit-wheels/.env", "may hold credentials", "move it out")),
    "kaggle.json": (2, bundle(leak("kaggle.json", KEY)), ("kit-wheels/kaggle.json", "may hold credentials", "move it out")),
    "key in a text": (2, bundle(leak("notes.txt", f"\n\n{KEY}")), ("kit-wheels/notes.txt:3", "a Kaggle key", "revoke it")),
    "wheels were not vendored": (2, bundle(lambda shop: shutil.rmtree(shop.bundles / "kit-wheels")), ("no bundle kit-wheels", "kit vendor wheels")),
    ".env among what is staged": (2, push(lambda dataset: (dataset / ".env").touch()), (".env", "no plain file listed in MANIFEST.json", "stage it again")),
    "nothing is staged": (2, lambda bench: ["push", "--dry-run", "--artifacts", bench.folder], ("no staged", "kit vendor bundle")),
    "no dataset is staged": (2, lambda bench: ["push", "--dry-run", "--kernel", "none", "--artifacts", bench.folder], ("no staged dataset", "MANIFEST.json")),
    "nothing is staged to rehearse": (2, lambda bench: rehearsed(bench, bench.out, ROOT / "notebooks" / "infer.ipynb"), ("no datasets", "kit vendor bundle")),
    # what is mounted
    "byte of the weights has changed, rehearsed": (2, rehearse(damage), ("plain-", "fold1/model.safetensors is damaged")),
    "index is not mounted, rehearsed": (
        1, rehearse(without="passages-*"), ("public run: member ", "scored without contexts", "'passages-", "found bundles [kit-code"),
    ),
    "no member is mounted": (2, infer(without="[prs][el]*"), ("'plain-", "nor mounted under", "found bundles [kit-code")),
    # the box
    "writing to what is mounted": (1, cell("next(MOUNTED.glob('kit-code/*')).open('ab')"), ("mine.ipynb, cell 1", "Read-only file system", "/kit-code/")),
    "writing to what is mounted, guarded": (
        1, cell("next(MOUNTED.glob('kit-code/*')).open('ab')", "--level", "guard"), ("mine.ipynb, cell 1", "Read-only file system", "/kit-code/"),
    ),
    "connection": (1, cell(CONNECT), ("mine.ipynb, cell 1", "Network is unreachable", OUTSIDE)),
    "looking up a name": (1, cell("socket.getaddrinfo('example.com', 443)"), ("mine.ipynb, cell 1", "name resolution", "example.com")),
    "connection, guarded": (1, cell(CONNECT, "--level", "guard"), ("mine.ipynb, cell 1", "Network is unreachable", OUTSIDE)),
    "memory limit": (1, cell("held = b'x' * 2**29\ntime.sleep(60)", "--memory-mb", 300), ("cell 1: memory limit 300 MB reached", "smaller batches")),
    "time limit": (1, cell("time.sleep(60)", "--hours", 0.001), ("mine.ipynb", "time limit 4 s reached", "do less")),
    "disk limit": (1, cell("open('large', 'wb').write(b'x' * 2**25)\ntime.sleep(60)", "--disk-mb", 20), ("cell 1: disk limit 20 MB reached", "write less")),
}  # fmt: skip
SLOW = {"index is not mounted, rehearsed"}


def complaint(printed: str) -> str:
    """The one line of an error."""
    (line,) = printed.splitlines()
    assert line.startswith("error: ")
    return line


def missing(words: tuple[str, ...], line: str) -> list[str]:
    return [word for word in words if word not in line]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAULTS])
def test_a_fault_is_met_with_its_exit_code_and_one_line_that_helps(
    name: str, bench: Bench, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code, build, words = FAULTS[name]
    arguments = [str(argument) for argument in build(bench)]
    capsys.readouterr()
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    line = complaint(printed.err)
    assert (left.value.code, missing(words, line), printed.out) == (code, [], ""), line
    assert [record.getMessage() for record in caplog.records] == []  # would be lines on stderr, too
    assert not (bench.folder / "ran").exists()
    assert not [path for path in bench.out.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("code", "words"),
    [(f"try:\n    {CONNECT}\nexcept OSError:\n    pass", "the notebook wrote no outcome.json"), (CONNECT, "Network is unreachable")],
    ids=["in secret", "and fails"],
)
def test_a_connection_that_is_tried_is_counted(code: str, words: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    build = cell(code)
    shutil.copytree(bench.staged / "kit-code", bench.folder / "datasets" / "kit-code")
    verb, _, *options = build(bench)
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in (verb, bench.folder / "datasets", *options)])
    assert left.value.code == 1
    assert words in complaint(capsys.readouterr().err)
    summary = json.loads((bench.folder / "artifacts" / "rehearsals" / "latest" / "summary.json").read_text())
    assert (summary["sockets"], summary["attempts"]) == (1, [f"public run: socket.connect {OUTSIDE}:443"])


MET: dict[str, tuple[Build, tuple[str, ...], int]] = {  # words of a warning, and how many warnings there are
    "byte of the weights has changed": (infer(damage), ("member plain-", "fold1/model.safetensors is damaged", "pack or upload it again"), 1),
    "index is not mounted": (infer(without="passages-*"), ("reader-", "scored without contexts", "'passages-", "nor mounted under"), 2),
    "member is not mounted": (infer(without="plain-*"), ("'plain-", "nor mounted under", "found bundles [kit-code"), 1),
}


@pytest.mark.parametrize("name", MET)
def test_a_fault_that_the_others_make_up_for_is_a_warning_and_a_submission(
    name: str, bench: Bench, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    build, words, count = MET[name]
    arguments = [str(argument) for argument in build(bench)]
    capsys.readouterr()
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    printed = capsys.readouterr()
    warnings = printed.err.splitlines()
    assert (left.value.code, len(warnings)) == (1, count), printed.err
    assert not [line for line in warnings if not line.startswith("warning: ") or missing(words, line)]
    assert [record.getMessage() for record in caplog.records] == []
    assert not json.loads(printed.out.splitlines()[-1])["finished"]
    assert len(packed.read_rows(bench.folder / "submission.csv")) == 1 + packed.TEST_ROWS
    assert (bench.folder / "submission.csv").read_text() != packed.fallback(bench.shop.competition / "test.csv")


# --- what is no error line -------------------------------------------------------------------------------------------------------


def in_two_layouts(datasets: list[Path], root: Path) -> None:
    """Every other one under the old, the rest under the new."""
    for number, layout in enumerate(LAYOUTS):
        packed.mount(datasets[number::2], root, layout)


def in_each_layout(datasets: list[Path], root: Path) -> None:
    for layout in LAYOUTS:
        packed.mount(datasets, root, layout)


MOUNTS: dict[str, Callable[[list[Path], Path], object]] = {
    "old": lambda datasets, root: packed.mount(datasets, root, LAYOUTS[0]),
    "new": lambda datasets, root: packed.mount(datasets, root, LAYOUTS[1]),
    "some each": in_two_layouts,
    "all both": in_each_layout,
}


@pytest.fixture(scope="module")
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The submission from the bundles as they were packed."""
    shop, out = Workshop(root / "shop"), tmp_path_factory.mktemp("expected") / "submission.csv"
    outcome = kit.infer(list(shop.members.values()), test=shop.competition / "test.csv", out=out, root=shop.bundles, open_crew=crews.Thread)
    assert outcome.finished
    return out.read_bytes()


@pytest.mark.parametrize("layout", MOUNTS)
def test_under_every_mount_layout_the_submission_is_the_same(layout: str, bench: Bench, expected: bytes) -> None:
    MOUNTS[layout](sorted(bench.staged.iterdir()), bench.mounts)
    out = bench.folder / "submission.csv"
    outcome = kit.infer(test=bench.shop.competition / "test.csv", out=out, open_crew=crews.Thread)
    assert outcome.finished
    assert set(outcome.scored) == set(bench.members)
    assert out.read_bytes() == expected


def test_the_doctor_names_an_index_that_is_not_mounted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    packed.mount((folder for folder in bench.staged.iterdir() if folder.name != bench.index), bench.mounts)
    with pytest.raises(SystemExit) as left:
        main(["doctor"])
    printed = capsys.readouterr()
    assert (left.value.code, printed.err) == (1, "")
    found = [line for line in printed.out.splitlines() if line.startswith("✗")]
    assert len(found) == 2  # the members that use it
    assert not [line for line in found if missing((f"its index {bench.index} is not mounted", f"→ attach the dataset {bench.index}"), line)]


@pytest.mark.skipif(find_spec("kaggle") is None, reason="needs the extra `publish`")
def test_without_credentials_nothing_is_sent_and_the_ways_to_sign_in_are_named(bench: Bench) -> None:
    """In a process of its own, as the client signs in when it is imported; guarded, so that a connection would be seen."""
    push()(bench)
    shutil.copyfile(guard.__file__, bench.folder / "sitecustomize.py")
    home = bench.folder / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE_", "XDG_"))}
    command = [sys.executable, "-m", "kit", "push", str(bench.folder / "datasets"), "--kernel", "none", "--artifacts", str(bench.folder)]
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(bench.folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    words = ("no valid credentials", "kaggle auth login", "KAGGLE_API_TOKEN", "~/.kaggle/access_token", "KAGGLE_USERNAME and KAGGLE_KEY", "kaggle.json")
    assert (done.returncode, done.stdout, missing(words, complaint(done.stderr))) == (2, "", [])
    assert not (bench.folder / guard.LOG).exists()
    assert not (bench.folder / "publish.json").exists()
