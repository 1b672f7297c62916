"""kit.vendor.publish with the real kaggle client against a stub of the site: what arrives, what is refused, and that nothing is ever sent twice."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kit import manifest
from kit.errors import BundleError, ConfigError, PublishError
from kit.vendor.dataset import stage, stage_kernel
from kit.vendor.publish import Report, publish
from kit.vendor.site import DATASET_METADATA
from tests.kaggle_stub import KEY, SUBMISSION, TOKEN, USER, Dataset, Fault, Stub, interrupt
from tests.staging import change_json, stage_dataset, stage_notebook

pytestmark = pytest.mark.skipif(find_spec("kaggle") is None, reason="needs the extra `publish`")  # not imported here: that would sign in

ROOT = Path(__file__).parents[2]
WHEELS, MEMBER, NOTEBOOK = f"{USER}/kit-wheels", f"{USER}/kit-member", f"{USER}/kit-infer"
COMPETITION = "llm-science-exam"
SECRETS = (TOKEN, KEY, "signature=secret")


@dataclass
class Desk:
    """A workstation: staged datasets and a notebook, a home folder, and a clock that only runs while one sleeps."""

    root: Path
    slept: list[float] = field(default_factory=list)

    def stage(self, ref: str, **files: bytes) -> Path:
        """A dataset of these files; see stage_dataset."""
        return stage_dataset(self.root / "datasets", ref, **files)

    def stage_kernel(self, sources: list[str], **changes: Any) -> Path:
        """A notebook that uses these datasets; see stage_notebook."""
        return stage_notebook(self.root / "kernels", NOTEBOOK, dataset_sources=sources, competition_sources=[COMPETITION], **changes)

    @property
    def state(self) -> Path:
        return self.root / "publish.json"

    def remembered(self) -> Any:
        return json.loads(self.state.read_text())

    def publish(self, **options: Any) -> Report:
        """A push whose waiting takes no time."""
        named = {"state": self.state, "output": self.root / "output", "sleep": self.slept.append, "clock": lambda: sum(self.slept), **options}
        return publish(self.root / "datasets", self.root / "kernels", **named)

    def submit(self, **options: Any) -> Report:
        return self.publish(submit=True, **options)


@pytest.fixture
def site() -> Iterator[Stub]:
    with Stub() as stub:
        yield stub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without credentials, before anything imports the client."""
    home = tmp_path / "home"
    (home / ".kaggle").mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home / ".kaggle"))
    return home


@pytest.fixture
def signed_out(home: Path, site: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Without credentials; the client of this process talks to the stub, and keeps its upload state in a folder of the test."""
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import kaggle_env

    monkeypatch.setattr(KaggleApi, "args", ["--local"])  # settings that it reads when it is first imported
    monkeypatch.setattr(KaggleApi, "config_dir", str(home / ".kaggle"))
    monkeypatch.setattr(KaggleApi, "config", str(home / ".kaggle" / "kaggle.json"))
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, site.url)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return Desk(tmp_path)


@pytest.fixture
def desk(signed_out: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Signed in, with two datasets and a notebook staged."""
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    signed_out.stage(WHEELS, a__whl=b"wheel" * 100, requirements__lock=b"lock")
    signed_out.stage(MEMBER, model__safetensors=b"weights" * 1000)
    signed_out.stage_kernel([WHEELS, MEMBER])
    return signed_out


def held(site: Stub, ref: str, version: int = -1) -> dict[str, bytes]:
    return site.datasets[ref].versions[version]


def staged(desk: Desk, ref: str) -> dict[str, bytes]:
    folder = desk.root / "datasets" / ref.partition("/")[2]
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != DATASET_METADATA}


def assert_sent_once(desk: Desk, site: Stub) -> None:
    """Everything is there, and no byte, version, run or submission went twice."""
    for ref in (WHEELS, MEMBER):
        assert len(site.datasets[ref].versions) == 1
        assert held(site, ref) == staged(desk, ref)
    received = sum(blob.received for blob in site.blobs)
    assert received == sum(len(data) for ref in (WHEELS, MEMBER) for data in staged(desk, ref).values())
    assert len(site.kernels[NOTEBOOK]) == 1
    assert len(site.submissions) == 1


# --- what is sent ----------------------------------------------------------------------------------------------------------------


def test_a_first_push_creates_runs_fetches_and_submits(desk: Desk, site: Stub) -> None:
    report = desk.submit(message="first")
    assert_sent_once(desk, site)
    assert [(sent.ref, sent.action, sent.version) for sent in report.datasets] == [(MEMBER, "created", 1), (WHEELS, "created", 1)]
    assert report.kernel is not None and (report.kernel.version, report.kernel.status) == (1, "complete")
    assert report.output is not None and report.output.read_bytes() == SUBMISSION
    assert (report.output.parent / "kit-infer.log").read_text() == site.log
    assert report.submission is not None and report.submission.startswith("first [kit-") and report.submission.endswith(": pending")
    json.dumps(report.summary(), default=str)


def test_what_staging_makes_is_accepted_as_it_is(signed_out: Desk, site: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of nested files in two parts, and the notebook of this project."""
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    for name in ("fold0", "fold1"):
        (tmp_path / "my-member" / name).mkdir(parents=True)
        (tmp_path / "my-member" / name / "model.safetensors").write_bytes(name.encode() * 100)
    manifest.write(tmp_path / "my-member", "my-member", "member")
    folders = stage([tmp_path / "my-member"], tmp_path / "datasets", owner=USER, part_mb=0.0006)
    names = [folder.name for folder in folders]
    stage_kernel(ROOT / "notebooks" / "infer.ipynb", tmp_path / "kernels", owner=USER, title="Exam infer", competition=COMPETITION, datasets=names)
    report = signed_out.submit()
    assert report.kernel is not None
    assert report.kernel.sources == (f"{USER}/my-member-part1/1", f"{USER}/my-member-part2/1")
    assert held(site, f"{USER}/my-member-part2")["fold1--model.safetensors"] == b"fold1" * 100


def test_a_dataset_is_public_only_where_its_metadata_says_so(desk: Desk, site: Stub) -> None:
    change_json(desk.root / "datasets" / "kit-wheels" / DATASET_METADATA, isPrivate=False)
    desk.publish(kernel=None)
    assert [(body["slug"], body.get("isPrivate", False)) for body in site.asked("CreateDataset")] == [("kit-member", True), ("kit-wheels", False)]


def test_datasets_are_private_and_the_notebook_runs_their_versions_without_internet(desk: Desk, site: Stub) -> None:
    desk.publish()
    assert all(body["isPrivate"] for body in site.asked("CreateDataset"))
    saved = site.kernels[NOTEBOOK][0]
    assert saved["datasetDataSources"] == [f"{WHEELS}/1", f"{MEMBER}/1"]
    assert (saved["competitionDataSources"], saved.get("enableInternet"), saved["isPrivate"]) == ([COMPETITION], False, True)
    assert json.loads(saved["text"])["cells"][0]["source"] == "print(1)"


def test_the_submission_is_of_the_pushed_version(desk: Desk, site: Stub) -> None:
    desk.submit(message="try")
    (body,) = site.submissions
    assert (body["competitionName"], body["kernelOwner"], body["kernelSlug"]) == (COMPETITION, USER, "kit-infer")
    assert (body["kernelVersion"], body["fileName"]) == (1, "submission.csv")


def test_an_unchanged_push_sends_nothing(desk: Desk, site: Stub) -> None:
    first = desk.submit()
    site.requests.clear()
    second = desk.submit()
    assert not site.count("StartBlobUpload", "PUT", "PROBE", "CreateDataset", "CreateDatasetVersion", "SaveKernel", "CreateCodeSubmission")
    assert not site.count("DownloadDataset"), "the state file spares the comparison"
    assert [sent.action for sent in second.datasets] == ["unchanged", "unchanged"]
    assert (second.kernel, second.submission) == (first.kernel, first.submission)


def test_only_a_changed_dataset_becomes_a_new_version_and_the_notebook_follows_it(desk: Desk, site: Stub) -> None:
    desk.submit()
    desk.stage(MEMBER, model__safetensors=b"sthgiew" * 1000)
    report = desk.submit(message="better")
    assert [(sent.action, sent.version) for sent in report.datasets] == [("versioned", 2), ("unchanged", 1)]
    assert held(site, MEMBER) == staged(desk, MEMBER)
    assert site.asked("CreateDatasetVersion")[0]["body"]["versionNotes"] == "better"
    assert site.kernels[NOTEBOOK][1]["datasetDataSources"] == [f"{WHEELS}/1", f"{MEMBER}/2"]
    assert len(site.submissions) == 2


def test_a_lost_state_file_is_replaced_by_what_the_site_holds(desk: Desk, site: Stub) -> None:
    desk.submit()
    before = desk.remembered()
    desk.state.unlink()
    site.requests.clear()
    report = desk.submit()
    assert [sent.action for sent in report.datasets] == ["unchanged", "unchanged"]
    assert site.count("DownloadDataset") == 2
    assert_sent_once(desk, site)
    assert desk.remembered() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_an_unreadable_state_file_counts_as_lost(desk: Desk, site: Stub, content: str, caplog: pytest.LogCaptureFixture) -> None:
    desk.publish()
    desk.state.write_text(content)
    assert {sent.action for sent in desk.publish().datasets} == {"unchanged"}
    assert "unreadable" in caplog.text


def test_the_site_outranks_the_state_file(desk: Desk, site: Stub) -> None:
    """A version that somebody else made meanwhile is compared, and replaced; a deleted dataset is created again."""
    desk.publish(kernel=None)
    site.datasets[WHEELS].versions.append({"else.txt": b"other"})
    del site.datasets[MEMBER]
    report = desk.publish(kernel=None)
    assert [(sent.ref, sent.action, sent.version) for sent in report.datasets] == [(MEMBER, "created", 1), (WHEELS, "versioned", 3)]
    assert held(site, WHEELS) == staged(desk, WHEELS)


def test_a_manifest_that_the_site_gives_as_an_archive_is_read(desk: Desk, site: Stub) -> None:
    desk.publish(kernel=None)
    desk.state.unlink()
    site.zips = True
    assert {sent.action for sent in desk.publish(kernel=None).datasets} == {"unchanged"}


def test_what_the_manifest_says_beside_the_files_counts_as_a_change(desk: Desk, site: Stub) -> None:
    """A part of a bundle must be sent again when it becomes a part of another whole, though its own files are the same."""
    desk.publish(kernel=None)
    folder = desk.root / "datasets" / "kit-member"
    metadata = (folder / DATASET_METADATA).read_bytes()
    (folder / DATASET_METADATA).unlink()
    manifest.write(folder, "kit-member", "member", whole="0123abcd")
    (folder / DATASET_METADATA).write_bytes(metadata)
    assert [sent.action for sent in desk.publish(kernel=None).datasets] == ["versioned", "unchanged"]


def test_sources_that_are_not_staged_are_pinned_as_the_site_has_them(desk: Desk, site: Stub) -> None:
    desk.publish(kernel=None)
    site.datasets["other/corpus"] = other_dataset(3)
    desk.stage_kernel([WHEELS, "other/corpus", "other/corpus/2"])
    desk.publish()
    assert site.kernels[NOTEBOOK][0]["datasetDataSources"] == [f"{WHEELS}/1", "other/corpus/3", "other/corpus/2"]


def other_dataset(versions: int) -> Dataset:
    return Dataset("Corpus", [{"a": b"a"}] * versions)


def test_a_source_that_nobody_has_is_refused_before_the_push(desk: Desk, site: Stub) -> None:
    desk.stage_kernel([WHEELS, "other/corpus"])
    with pytest.raises(PublishError, match="dataset source other/corpus: neither staged nor on the site for tester"):
        desk.publish()
    assert not site.count("SaveKernel")


def test_without_following_nothing_is_waited_for(desk: Desk, site: Stub) -> None:
    report = desk.publish(follow=False)
    assert report.kernel is not None and report.kernel.status == "pushed" and report.output is None
    assert not site.count("GetKernelSessionStatus")


def test_the_submission_is_found_on_a_later_page_of_outputs(desk: Desk, site: Stub) -> None:
    site.page = 1
    assert desk.publish().output is not None
    assert site.count("ListKernelSessionOutput") == 2


# --- a dry run -------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_nobody_and_writes_nothing(signed_out: Desk, site: Stub) -> None:
    desk = signed_out
    desk.stage(WHEELS, a__whl=b"w" * 500_000)
    desk.stage_kernel([WHEELS, "other/corpus"])
    before = sorted(desk.root.rglob("*"))
    report = desk.submit(dry_run=True)
    (sent,) = report.datasets
    assert (sent.ref, sent.action, sent.version, sent.files) == (WHEELS, "create", 1, 2)
    assert sent.mb == pytest.approx(0.5, rel=0.01)
    assert report.kernel is not None and report.kernel.sources == (f"{WHEELS}/1", "other/corpus/?")
    assert report.submission == f"would submit submission.csv of {NOTEBOOK} to {COMPETITION}"
    assert site.requests == [] and sorted(desk.root.rglob("*")) == before


def test_a_dry_run_needs_no_client() -> None:
    """Nor signs in by importing it."""
    code = "import sys; import kit.vendor.publish as p; from pathlib import Path; n = Path('nowhere')\n"
    code += "try: p.publish(n, n, state=n, output=n, kernel=None, dry_run=True)\nexcept p.ConfigError: print('kaggle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_dry_run_tells_what_changed_by_the_state_file(desk: Desk) -> None:
    desk.publish(kernel=None)
    desk.stage(MEMBER, model__safetensors=b"other")
    report = desk.publish(kernel=None, dry_run=True)
    assert [(sent.action, sent.version) for sent in report.datasets] == [("version", 2), ("unchanged", 1)]


# --- refused before anything is sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["datasets/kit-wheels/dataset-metadata.json", "kernels/kit-infer/kernel-metadata.json"])
def test_everything_is_checked_before_anything_is_sent(desk: Desk, site: Stub, path: str) -> None:
    change_json(desk.root / path, title="Kit")
    with pytest.raises(ConfigError, match=f"{path}: title 'Kit' has 3 characters"):
        desk.publish()
    assert site.requests == []


def test_a_file_that_is_not_as_staged_is_not_sent(desk: Desk, site: Stub) -> None:
    (desk.root / "datasets" / "kit-wheels" / "a.whl").write_bytes(b"lehwe" * 100)
    with pytest.raises(BundleError, match="a.whl is damaged"):
        desk.publish()
    assert WHEELS not in site.datasets and "a.whl" not in {blob.name for blob in site.blobs}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "infre"}, "no staged notebook 'infre'.*did you mean 'infer'"),
        ({"kernel": None, "submit": True}, "a submission needs a finished run"),
        ({"follow": False, "submit": True}, "a submission needs a finished run"),
    ],
)
def test_options_that_do_not_fit(desk: Desk, site: Stub, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        desk.publish(**options)
    assert site.requests == []


def test_a_competition_is_needed_to_submit_and_named_where_there_are_several(desk: Desk, site: Stub) -> None:
    stage_notebook(desk.root / "kernels", NOTEBOOK, dataset_sources=[WHEELS], competition_sources=["one", "two"])
    with pytest.raises(ConfigError, match="--competition"):
        desk.submit()
    assert desk.submit(competition="two").submission
    assert site.submissions[0]["competitionName"] == "two"


def test_an_empty_folder_is_refused(signed_out: Desk) -> None:
    with pytest.raises(ConfigError, match="no staged dataset"):
        signed_out.publish(kernel=None)


# --- signing in ------------------------------------------------------------------------------------------------------------------


def with_token_in_environment(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)


def with_token_file(home: Path, _: pytest.MonkeyPatch) -> None:
    (home / ".kaggle" / "access_token").write_text(TOKEN)


def with_key_file(home: Path, _: pytest.MonkeyPatch) -> None:
    (home / ".kaggle" / "kaggle.json").write_text(json.dumps({"username": USER, "key": KEY}))
    (home / ".kaggle" / "kaggle.json").chmod(0o600)


def with_key_in_environment(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)


@pytest.mark.parametrize(
    ("sign_in", "auth"),
    [(with_token_in_environment, "Bearer"), (with_token_file, "Bearer"), (with_key_file, "Basic"), (with_key_in_environment, "Basic")],
)
def test_every_way_to_sign_in_works(
    sign_in: Callable[[Path, pytest.MonkeyPatch], None], auth: str, signed_out: Desk, site: Stub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(home, monkeypatch)
    signed_out.stage(WHEELS, a__whl=b"w")
    signed_out.publish(kernel=None)
    assert {request.auth for request in site.requests if request.op == "CreateDataset"} == {auth}
    assert {request.auth for request in site.requests if request.op == "PUT"} == {""}, "storage is not told who we are"


@pytest.mark.parametrize("token", [None, "KGAT_expired"])
def test_missing_or_expired_credentials_are_an_error_that_names_the_ways(
    token: str | None, signed_out: Desk, site: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if token:
        monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    signed_out.stage(WHEELS, a__whl=b"w")
    with pytest.raises(ConfigError, match="no valid credentials.*kaggle auth login.*KAGGLE_API_TOKEN.*access_token.*KAGGLE_KEY.*kaggle.json"):
        signed_out.publish(kernel=None)
    assert not site.count("CreateDataset", "GetDatasetStatus")
    assert capsys.readouterr().out == ""


def test_a_wrong_key_is_an_error_that_names_the_ways(signed_out: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", "wrong")
    signed_out.stage(WHEELS, a__whl=b"w")
    with pytest.raises(PublishError, match="401 .Unauthenticated.*kaggle auth login"):
        signed_out.publish(kernel=None)


def test_a_key_that_others_may_read_is_warned_of(
    signed_out: Desk, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_key_file(home, monkeypatch)
    (home / ".kaggle" / "kaggle.json").chmod(0o644)
    signed_out.stage(WHEELS, a__whl=b"w")
    signed_out.publish(kernel=None)
    assert [record.levelname for record in caplog.records if "readable by other users" in record.message] == ["WARNING"]


def test_credentials_and_signed_addresses_reach_no_log_output_or_file(
    desk: Desk, site: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even where the client is told to print its requests, and uploads and downloads fail."""
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "args", ["--local", "--verbose"])
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    site.faults = [Fault("PUT", keep=3), Fault("PROBE", status=500), Fault("GET", status=404)]
    with caplog.at_level(logging.DEBUG, logger="kit"), pytest.raises(PublishError, match="404") as error:
        desk.publish()
    assert "Authorization: Bearer ***" in caplog.text, "the client did print"
    said = capfd.readouterr()
    files = "".join(path.read_text() for path in [desk.state, *(desk.root / "output").iterdir()])
    assert [secret for secret in SECRETS if secret in "".join((caplog.text, str(error.value), said.out, said.err, files))] == []
    assert said.out == ""


@pytest.mark.parametrize("missing", ["kaggle", "six"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing: str, desk: Desk, tmp_path: Path) -> None:
    """In a process of its own, where the client is not imported yet: kaggle needs six without declaring it."""
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom pathlib import Path; from kit.errors import DependencyError\n"
    code += "from kit.vendor.publish import publish; root = Path(sys.argv[1])\n"
    code += "try: publish(root / 'datasets', root, kernel=None, state=root / 's', output=root)\nexcept DependencyError as error: print(error)"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"publishing needs package '{missing}': pip install kaggle six")


# --- what the site answers -------------------------------------------------------------------------------------------------------


def test_a_title_in_use_is_an_error(desk: Desk, site: Stub) -> None:
    site.datasets[f"{USER}/something-else"] = other_dataset(1)
    site.datasets[f"{USER}/something-else"].title = "Kit-Wheels"
    with pytest.raises(PublishError, match="dataset tester/kit-wheels: .*already in use.*change both in .*dataset-metadata.json"):
        desk.publish()
    assert not site.count("SaveKernel")


def test_a_dataset_of_somebody_else_is_refused_at_once(desk: Desk, site: Stub) -> None:
    ref = "somebody/kit-things"
    desk.stage(ref, a__txt=b"a")
    site.datasets[ref] = other_dataset(1)
    site.faults = [Fault("CreateDatasetVersion", times=99, status=403, message="Permission 'datasets.update' was denied")]
    with pytest.raises(PublishError, match="somebody/kit-things.*403.*denied.*signed in as tester"):
        desk.publish(kernel=None)
    assert site.count("CreateDatasetVersion") == 1


@pytest.mark.parametrize("answer", [{"status": "ok", "url": ""}, {"status": "pending", "url": "https://x"}, {"status": "error", "error": "quota exceeded"}])
@pytest.mark.parametrize("op", ["CreateDataset", "CreateDatasetVersion"])
def test_an_answer_that_is_no_success_is_an_error(desk: Desk, site: Stub, op: str, answer: dict[str, str]) -> None:
    if op == "CreateDatasetVersion":
        desk.publish(kernel=None)
        desk.stage(MEMBER, model__safetensors=b"other")
    site.changed[op] = answer
    with pytest.raises(PublishError, match="dataset tester/kit-member: the site refused it"):
        desk.publish()


def test_a_claimed_success_that_left_nothing_is_an_error(desk: Desk, site: Stub) -> None:
    desk.submit()
    desk.stage_kernel([WHEELS])
    site.changed["CreateCodeSubmission"] = {"message": "Successfully submitted", "ref": 7}
    with pytest.raises(PublishError, match="submission to llm-science-exam: the site answered success, but does not have it"):
        desk.submit()


def test_processing_is_waited_for_before_the_notebook_is_pushed(desk: Desk, site: Stub) -> None:
    site.looks = 3
    desk.publish()
    assert site.kernels[NOTEBOOK][0]["datasetDataSources"] == [f"{WHEELS}/1", f"{MEMBER}/1"]
    assert site.ops.index("SaveKernel") > max(number for number, op in enumerate(site.ops) if op == "GetDatasetStatus")
    assert desk.slept[:3] == [2, 5, 10], "with growing pauses"


def test_a_dataset_that_is_hidden_while_in_processing_is_waited_for(desk: Desk, site: Stub) -> None:
    site.looks, site.hides = 20, True
    desk.publish()
    assert_versions(site, 1)
    assert site.count("CreateDataset") == 2


def test_a_dataset_hidden_in_processing_is_waited_for_after_an_interruption_too(desk: Desk, site: Stub) -> None:
    site.looks, site.hides = 5, True
    site.faults = [Fault("GetDatasetStatus", skip=3, call=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        desk.submit()
    assert site.ops[-2:] == ["GetDatasetStatus", "GetDatasetStatus"] and len(site.datasets) == 1
    desk.submit()
    assert_sent_once(desk, site)
    assert site.count("CreateDataset") == 2


def assert_versions(site: Stub, number: int) -> None:
    assert {len(dataset.versions) for dataset in site.datasets.values()} == {number}


def test_a_version_refused_while_the_last_is_in_processing_is_sent_later_without_uploading_again(desk: Desk, site: Stub) -> None:
    desk.publish(kernel=None)
    desk.stage(MEMBER, model__safetensors=b"other" * 100)
    site.faults = [Fault("CreateDatasetVersion", times=2, status=403, message="still in processing")]
    uploads = site.count("PUT")
    desk.publish(kernel=None)
    assert len(site.datasets[MEMBER].versions) == 2
    assert site.count("PUT") == uploads + 2, "the weights and the manifest, once each"


def test_a_dataset_that_never_gets_ready_is_an_error_after_the_time_allowed(desk: Desk, site: Stub) -> None:
    site.looks = 10_000
    with pytest.raises(PublishError, match="dataset tester/kit-member: still blobs_received after 3600 s"):
        desk.publish()
    assert 3500 < sum(desk.slept) <= 3600


def test_a_dataset_that_cannot_be_processed_is_an_error_and_is_sent_anew_next_time(desk: Desk, site: Stub) -> None:
    site.outcome = "FAILED"
    with pytest.raises(PublishError, match="could not process version 1"):
        desk.publish()
    site.outcome = "READY"
    site.datasets.clear()
    desk.publish()
    assert_versions(site, 1)


def test_invalid_sources_are_an_error_though_the_client_calls_it_success(desk: Desk, site: Stub) -> None:
    desk.stage_kernel([WHEELS, f"{MEMBER}/9"])
    with pytest.raises(PublishError, match="notebook tester/kit-infer: .*invalid dataset sources .'tester/kit-member/9'."):
        desk.submit()
    assert not site.count("GetKernelSessionStatus")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Maximum batch GPU session count"),
        ({"versionNumber": 1, "url": ""}, "address ''"),
        ({"url": f"https://www.kaggle.com/code/{NOTEBOOK}"}, "version 0"),
        ({"versionNumber": 1, "url": f"https://www.kaggle.com/code/{USER}/kit-infer-2"}, "it was saved as .*kit-infer-2"),
        ({"versionNumber": 1, "url": f"https://www.kaggle.com/code/{NOTEBOOK}", "invalidCompetitionSources": ["x"]}, "invalid competition sources .'x'."),
        ({"versionNumber": 1, "url": f"https://www.kaggle.com/code/{NOTEBOOK}", "invalidModelSources": ["x"]}, "invalid model sources .'x'."),
        ({"versionNumber": 1, "url": f"https://www.kaggle.com/code/{NOTEBOOK}", "invalidTags": ["x"]}, "invalid tags .'x'."),
    ],
)
def test_a_push_that_is_no_success_is_an_error(desk: Desk, site: Stub, answer: dict[str, Any], words: str) -> None:
    site.changed["SaveKernel"] = answer
    with pytest.raises(PublishError, match=f"notebook tester/kit-infer: the site refused it: .*{words}"):
        desk.submit()
    assert not site.submissions
    del site.changed["SaveKernel"]
    desk.submit()
    assert_sent_once(desk, site)


LOG = [{"data": "Traceback\n"}, {"data": "\x1b[0;31mBundleError\x1b[0m: no bundle 'kit-wheels'\n"}, {"data": "[NbConvertApp] writing\n"}]


def test_a_failed_run_is_an_error_with_the_logs_last_error_and_runs_again_next_time(desk: Desk, site: Stub) -> None:
    site.runs, site.failure, site.log = ["RUNNING", "ERROR"], "Your notebook was stopped", json.dumps(LOG)
    with pytest.raises(PublishError, match="version 1: Your notebook was stopped; last error in its log .*: BundleError: no bundle 'kit-wheels'") as error:
        desk.submit()
    log = desk.root / "output" / "kit-infer.log"
    assert str(log) in str(error.value) and log.read_text() == site.log
    site.runs = ["COMPLETE"]
    report = desk.submit()
    assert report.kernel is not None and report.kernel.version == 2


@pytest.mark.parametrize("status", ["CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED"])
def test_a_cancelled_run_is_an_error(desk: Desk, site: Stub, status: str) -> None:
    site.runs, site.log = [status], ""
    with pytest.raises(PublishError, match=f"status {status.lower()}; last error in its log .*: it is empty"):
        desk.submit()


def test_a_run_without_a_submission_is_an_error_that_names_what_it_wrote(desk: Desk, site: Stub) -> None:
    del site.outputs["submission.csv"]
    with pytest.raises(PublishError, match="no submission.csv among .'figure.png'.; last error in its log .*: installed"):
        desk.submit()
    assert not site.submissions


def test_a_run_that_takes_too_long_is_left_running_and_followed_again(desk: Desk, site: Stub) -> None:
    site.runs = ["RUNNING"]
    with pytest.raises(PublishError, match="still running after 600 s"):
        desk.submit(timeout_s=600)
    site.runs = ["COMPLETE"]
    desk.submit()
    assert_sent_once(desk, site)


def test_an_error_page_is_not_kept_as_the_submission(desk: Desk, site: Stub) -> None:
    site.faults = [Fault("GET", status=404, message="expired")]
    with pytest.raises(PublishError, match="output of tester/kit-infer: the site answered 404 .expired"):
        desk.submit()
    assert not (desk.root / "output" / "submission.csv").exists()
    desk.submit()
    assert_sent_once(desk, site)


def test_a_version_pushed_by_somebody_else_meanwhile_is_not_taken_for_ours(desk: Desk, site: Stub) -> None:
    def push_another() -> None:
        site.kernels[NOTEBOOK].append({"text": "{}"})

    site.faults = [Fault("ListKernelSessionOutput", carry_out=True, call=push_another, status=503)]
    with pytest.raises(PublishError, match="version 2 has replaced our version 1"):
        desk.submit()
    assert not site.submissions


@pytest.mark.parametrize("status", [400, 403])
def test_a_refused_submission_is_an_error_in_the_sites_words(desk: Desk, site: Stub, status: int) -> None:
    site.faults = [Fault("CreateCodeSubmission", times=99, status=status, message="Your team has used its daily allowance (5) today")]
    with pytest.raises(PublishError, match=f"submission to llm-science-exam: the site answered {status} .Your team has used its daily allowance"):
        desk.submit()
    assert site.count("CreateCodeSubmission") == 1


def test_a_submission_refused_in_a_friendly_answer_is_an_error(desk: Desk, site: Stub) -> None:
    site.changed["CreateCodeSubmission"] = {"message": "Submission limit reached", "ref": 0}
    with pytest.raises(PublishError, match="the site refused it: Submission limit reached"):
        desk.submit()


def test_an_answer_that_makes_no_sense_is_one_line(desk: Desk, site: Stub) -> None:
    site.changed["GetDatasetStatus"] = {"status": "SOMETHING_NEW"}
    with pytest.raises(PublishError, match="dataset tester/kit-member: "):
        desk.publish()


# --- failures that pass ----------------------------------------------------------------------------------------------------------


def test_an_upload_broken_off_by_503_is_resumed_where_it_stopped(desk: Desk, site: Stub) -> None:
    site.faults = [Fault("PUT", keep=5, status=503)]
    desk.submit()
    assert_sent_once(desk, site)
    size = site.blobs[0].size
    assert [body["range"] for body in site.asked("PUT")][:2] == ["", f"bytes 5-{size - 1}/{size}"]


def test_an_upload_whose_connection_is_lost_arrives_whole(desk: Desk, site: Stub) -> None:
    site.faults = [Fault("PUT", keep=700)]
    desk.submit()
    assert held(site, MEMBER) == staged(desk, MEMBER)
    assert_versions(site, 1)


def test_an_upload_that_the_site_has_forgotten_begins_again(desk: Desk, site: Stub) -> None:
    """Where the client would leave the file out of the dataset, and call it success."""
    site.faults = [Fault("PUT", keep=5, status=503), Fault("PROBE", times=99, status=404)]
    desk.submit()
    assert held(site, MEMBER) == staged(desk, MEMBER)
    assert_versions(site, 1)


def test_an_upload_that_is_always_refused_is_an_error_and_leaves_no_dataset(desk: Desk, site: Stub) -> None:
    site.faults = [Fault("PUT", times=999, status=400)]
    with pytest.raises(PublishError, match="upload of .* broke off"):
        desk.publish()
    assert site.datasets == {}


@pytest.mark.parametrize(
    "op", ["StartBlobUpload", "CreateDataset", "GetDataset", "GetKernel", "SaveKernel", "GetKernelSessionStatus", "ListKernelSessionOutput",
           "GET", "ListSubmissions", "CreateCodeSubmission"],
)  # fmt: skip
def test_every_call_waits_as_long_as_the_site_asks(desk: Desk, site: Stub, op: str) -> None:
    site.faults = [Fault(op, times=2, status=429, headers=(("Retry-After", "17"),))]
    desk.submit()
    assert_sent_once(desk, site)
    assert desk.slept.count(17) == 2


@pytest.mark.parametrize(("value", "seconds"), [("3", 3), ("Wed, 26 Mar 2014 00:00:00 GMT", 0), ("soon", 1), ("", 1)])
def test_both_forms_of_retry_after_are_understood(desk: Desk, site: Stub, value: str, seconds: float) -> None:
    site.faults = [Fault("GetDatasetStatus", status=429, headers=(("Retry-After", value),))]
    desk.publish(kernel=None)
    assert desk.slept[0] == seconds


def test_a_site_that_stays_away_is_an_error_after_ten_attempts(desk: Desk, site: Stub) -> None:
    site.faults = [Fault("SaveKernel", times=999, status=502, message="bad gateway")]
    with pytest.raises(PublishError, match="notebook tester/kit-infer: the site answered 502 .bad gateway"):
        desk.publish()
    assert site.count("SaveKernel") == 10
    assert desk.slept[-9:] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_site_that_cannot_be_reached_is_an_error_in_one_line(desk: Desk, site: Stub) -> None:
    site.__exit__()
    with pytest.raises(PublishError, match="dataset tester/kit-member: the connection failed") as error:
        desk.publish()
    assert "\n" not in str(error.value)


CHANGES = ("CreateDataset", "SaveKernel", "CreateCodeSubmission")


@pytest.mark.parametrize("op", [*CHANGES, "StartBlobUpload", "GetKernelSessionStatus"])
@pytest.mark.parametrize("status", [0, 500])
@pytest.mark.parametrize("carry_out", [False, True])
def test_a_lost_answer_sends_nothing_twice(desk: Desk, site: Stub, op: str, status: int, carry_out: bool) -> None:
    site.faults = [Fault(op, carry_out=carry_out, status=status)]
    desk.submit()
    assert_sent_once(desk, site)


def test_a_lost_answer_to_a_new_version_makes_no_second_one(desk: Desk, site: Stub) -> None:
    desk.publish(kernel=None)
    desk.stage(MEMBER, model__safetensors=b"other")
    site.faults = [Fault("CreateDatasetVersion", carry_out=True)]
    (member, _) = desk.publish(kernel=None).datasets
    assert (member.action, member.version, len(site.datasets[MEMBER].versions)) == ("versioned", 2, 2)


# --- interruptions ---------------------------------------------------------------------------------------------------------------

UPLOAD = ("StartBlobUpload", "PUT")
CREATED = ("CreateDataset", "GetDatasetStatus", "GetDataset")
RUN = (
    *("GetDatasetStatus", "GetDatasetStatus", *UPLOAD * 2, *CREATED),
    *("GetDatasetStatus", "GetDatasetStatus", *UPLOAD * 3, *CREATED),
    *("GetKernel", "SaveKernel", "GetKernel", *("GetKernelSessionStatus",) * 3, "ListKernelSessionOutput", "GetKernel", "GET"),
    *("ListSubmissions", "CreateCodeSubmission", "ListSubmissions"),
)
STEPS = [*((step, False) for step in range(len(RUN))), *((step, True) for step, op in enumerate(RUN) if op in (*UPLOAD, *CHANGES))]


def test_the_requests_of_a_first_run(desk: Desk, site: Stub) -> None:
    """Which the next test interrupts one by one."""
    desk.submit()
    assert tuple(site.ops) == RUN


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize(("step", "carry_out"), STEPS)
def test_an_interruption_at_any_request_resumes_without_sending_anything_twice(desk: Desk, site: Stub, step: int, carry_out: bool) -> None:
    """Before the site has carried it out (of an upload, it keeps a part), and after, where that makes a difference."""
    site.faults = [Fault("*", skip=step, carry_out=carry_out, keep=100, call=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        desk.submit()
    desk.submit()
    assert_sent_once(desk, site)


def test_an_upload_that_was_interrupted_is_not_resumed_with_other_contents(desk: Desk, site: Stub) -> None:
    """The client tells files by path, size and mtime, which are the same for weights trained again and staged reproducibly."""
    site.faults = [Fault("CreateDataset", call=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        desk.publish(kernel=None)
    desk.stage(MEMBER, model__safetensors=b"sthgiew" * 1000)
    desk.publish(kernel=None)
    assert held(site, MEMBER) == staged(desk, MEMBER)


def run_push(desk: Desk, site: Stub) -> subprocess.CompletedProcess[str]:
    """A push in a process of its own, led to the stub by public environment variables alone."""
    code = "import sys; from pathlib import Path; from kit.vendor.publish import publish; r = Path(sys.argv[1])\n"
    code += "print(publish(r / 'datasets', r / 'kernels', state=r / 'publish.json', output=r / 'output', submit=True, sleep=lambda s: None).submission)"
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy"), site.url)
    environment = {**os.environ, "KAGGLE_API_ENVIRONMENT": "LOCALHOST", **proxies, "NO_PROXY": "", "no_proxy": "", "TMPDIR": str(desk.root / "tmp")}
    return subprocess.run([sys.executable, "-c", code, str(desk.root)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_process_killed_in_mid_upload_goes_on_where_it_stopped(desk: Desk, site: Stub) -> None:
    pids: list[int] = []

    def kill() -> None:
        pids.append(max(children(), key=lambda child: child.create_time()).pid)  # the other children are not of this test
        os.kill(pids[-1], signal.SIGKILL)

    site.faults = [Fault("PUT", skip=1, keep=100, call=kill)]
    assert run_push(desk, site).returncode == -signal.SIGKILL
    assert site.blobs[1].received == 100
    finished = run_push(desk, site)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith(": pending\n")
    assert_sent_once(desk, site)


def children() -> list[Any]:
    import psutil

    return psutil.Process().children()
