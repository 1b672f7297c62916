"""kit.rehearsal.doctor: every fault is found where it is really built, whole mounts are fine, and nothing makes it raise."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import kit
from kit import manifest, runtime
from kit.config import Recipe
from kit.rehearsal.doctor import CHECKS, doctor, examine, read_lock
from kit.rehearsal.findings import Finding
from kit.sample import write_sample
from kit.vendor.dataset import stage
from tests import packed
from tests.packed import Workshop, read_rows, write_rows


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches as the command line sets them, and no marker of the competition machine."""
    import huggingface_hub.constants

    for name in runtime.open_switches():
        monkeypatch.setenv(name.split()[0], "0")  # to be restored
    for name in (runtime.RUN_TYPE, runtime.RERUN_MARKER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    runtime.go_offline()


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """The three members, their index and the competition, to be damaged."""
    shop = packed.copy(tmp_path)
    return mount(shop, tmp_path / "input")


def mount(shop: Workshop, root: Path, *, owner: str = "") -> Path:
    """The bundles and the competition below `root`: in the older layout, or with an owner in the newer one."""
    bundles = root / "datasets" / owner if owner else root
    for folder in [path.parent for path in shop.bundles.glob(f"*/{manifest.FILE}") if manifest.read(path.parent).kind != "code"]:
        bundles.mkdir(parents=True, exist_ok=True)
        folder.rename(bundles / folder.name)
    competition = root / "competitions" / "exam" if owner else root / "exam"
    competition.parent.mkdir(parents=True, exist_ok=True)
    shop.competition.rename(competition)
    return root


def member(mounts: Path, recipe: str = "reader") -> Path:
    return next(mounts.glob(f"{recipe}-????????"))


def index(mounts: Path) -> Path:
    return next(mounts.glob("passages-*"))


def renew(folder: Path, **meta: object) -> None:
    """Write a manifest to match what was changed in a bundle."""
    old = manifest.read(folder)
    manifest.write(folder, old.name, old.kind, **{**old.meta, **meta})


def write_bundle(folder: Path, kind: str, files: dict[str, str], **meta: object) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    manifest.write(folder, folder.name, kind, **meta)
    return folder


def faults(findings: list[Finding]) -> list[Finding]:
    return [found for found in findings if found.level != "ok"]


def the_only_fault(findings: list[Finding], level: str, check: str, *words: str) -> Finding:
    """There is one fault; it is of this check and level, has these words in its one line, and a way out."""
    found = faults(findings)
    assert [(fault.level, fault.check) for fault in found] == [(level, check)], found
    for word in words:
        assert word in found[0].what
    assert found[0].todo and "\n" not in found[0].what
    return found[0]


def said(findings: list[Finding], check: str) -> str:
    return "\n".join(found.what for found in findings if found.check == check)


# --- all is well -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["", "somebody"])
def test_whole_mounts_are_fine_in_both_layouts_within_seconds(tmp_path: Path, owner: str) -> None:
    root = mount(packed.copy(tmp_path), tmp_path / "input", owner=owner)
    before = sorted(root.rglob("*"))
    begun = time.perf_counter()
    findings = examine(root, working=tmp_path)
    assert time.perf_counter() - begun < 5
    assert not faults(findings)
    assert {found.check for found in findings} == set(CHECKS) - {"locks", "adapters"}, "there are neither locks nor adapters"
    assert not any(found.todo for found in findings)
    assert f"layout {'datasets/<owner>/<slug>' if owner else '<slug>'}" in said(findings, "mounts")
    assert "10 rows" in said(findings, "competition") and "2 fits" in said(findings, "members")
    assert sorted(root.rglob("*")) == before, "nothing is written into the mounts"


def test_the_kind_of_run_is_said(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(examine(mounts), "run") == "not the competition machine"
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    assert "run type Batch; not the hidden rerun" in said(examine(mounts), "run")
    monkeypatch.setenv(runtime.RERUN_MARKER, "1")
    assert said(examine(mounts), "run") == "the hidden rerun, the execution that counts"


def test_the_notebook_looks_where_inference_does(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.INPUT_ROOT, str(mounts))
    findings = doctor(full=False)
    assert f"bundles below {mounts}" in said(findings, "mounts") and "0 files of 0.0 MB hashed" in said(findings, "integrity")


# --- the machine -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(runtime.gpus()), reason="needs a machine without a GPU")
def test_no_gpu_is_a_warning_on_the_competition_machine_only(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "products on cpu in torch.float32" in said(examine(mounts), "gpu")
    monkeypatch.setenv(runtime.RUN_TYPE, "Interactive")
    assert "accelerator" in the_only_fault(examine(mounts), "warning", "gpu", "no GPU").todo


@pytest.mark.gpu
def test_every_gpu_multiplies(mounts: Path) -> None:
    assert said(examine(mounts), "gpu").count("products on cuda:") == len(runtime.gpus())


def test_weights_that_do_not_fit_into_memory_are_named(mounts: Path) -> None:
    path = member(mounts) / manifest.FILE
    body = json.loads(path.read_text(encoding="utf-8"))
    body["files"]["fold1/model.safetensors"]["bytes"] = 10**15
    path.write_text(json.dumps(body), encoding="utf-8")
    found = [fault for fault in faults(examine(mounts)) if fault.check == "memory"]
    assert [fault.level for fault in found] == ["warning"] and f"{member(mounts).name}/fold1: 1000000.0 GB" in found[0].what


def test_a_working_folder_that_cannot_be_written_to_is_an_error(mounts: Path) -> None:
    the_only_fault(examine(mounts, working=mounts / "none"), "error", "disk", "working folder", "cannot be written to: No such file")


def test_an_open_switch_is_an_error_on_the_competition_machine(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    the_only_fault(examine(mounts), "warning", "offline", "TRANSFORMERS_OFFLINE")
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    assert [fault.level for fault in faults(examine(mounts)) if fault.check == "offline"] == ["error"]


# --- the mounts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_without_mounts_everything_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    root = tmp_path / "input"
    if exists:
        (root / "photos").mkdir(parents=True)
    findings = examine(root, working=tmp_path)
    assert [(fault.level, fault.check) for fault in faults(findings)] == [("warning", check) for check in ("mounts", "competition", "members")]
    assert ("there: photos" if exists else "no such folder") in said(findings, "mounts")
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    assert {fault.check for fault in examine(root, working=tmp_path) if fault.level == "error"} == {"mounts", "competition", "members"}


def test_an_unreadable_manifest_is_named_and_the_other_bundles_are_used(mounts: Path) -> None:
    (mounts / "stranger").mkdir()
    (mounts / "stranger" / manifest.FILE).write_text("{}", encoding="utf-8")
    findings = examine(mounts)
    the_only_fault(findings, "error", "mounts", "stranger", "unreadable manifest")
    assert "4 bundles" in said(findings, "mounts")


def test_a_damaged_file_is_found_by_its_hash_only(mounts: Path) -> None:
    packed.damage(index(mounts) / "retriever" / "vocab.index.json")
    the_only_fault(examine(mounts), "error", "integrity", f"{index(mounts).name}/retriever/vocab.index.json is damaged")
    assert not faults(examine(mounts, full=False))


@pytest.mark.parametrize(("change", "words"), [(Path.unlink, "is missing"), (lambda path: os.truncate(path, 5), "has 5 bytes instead of")])
def test_a_missing_or_cut_off_file_is_found_without_hashing(mounts: Path, change: object, words: str) -> None:
    change(index(mounts) / "retriever" / "vocab.index.json")  # type: ignore[operator]
    the_only_fault(examine(mounts, full=False), "error", "integrity", index(mounts).name, "vocab.index.json", words)


def test_datasets_in_parts_are_fine_together_and_a_missing_part_is_named(tmp_path: Path) -> None:
    shop = packed.copy(tmp_path)
    bundles = [path.parent for path in sorted(shop.bundles.glob(f"*/{manifest.FILE}")) if manifest.read(path.parent).kind != "code"]
    datasets = stage(bundles, tmp_path / "datasets", owner="owner", part_mb=0.05)
    assert len(datasets) > len(bundles)
    shop.competition.rename(tmp_path / "datasets" / "exam")
    findings = examine(tmp_path / "datasets", working=tmp_path)
    assert not faults(findings) and f"{len(bundles)} bundles" in said(findings, "mounts")
    part = next(path for path in datasets if manifest.read(path).part[0] == 2 and manifest.read(path).kind == "index")
    part.rename(tmp_path / "elsewhere")
    the_only_fault(examine(tmp_path / "datasets", working=tmp_path), "error", "integrity", "passages-", "part 2 of", "is not mounted")


def test_what_is_too_large_to_be_hashed_in_seconds_is_said(mounts: Path) -> None:
    large = index(mounts) / "corpus" / "large.arrow"
    large.touch()
    renew(index(mounts))
    os.truncate(large, 3_100_000_000)  # sparse
    path = index(mounts) / manifest.FILE
    body = json.loads(path.read_text(encoding="utf-8"))
    body["files"]["corpus/large.arrow"]["bytes"] = 3_100_000_000
    path.write_text(json.dumps(body), encoding="utf-8")
    findings = examine(mounts)
    assert not faults(findings) and "1 files of 3100.0 MB not hashed" in said(findings, "integrity")


def test_pickles_are_refused(mounts: Path) -> None:
    (member(mounts) / "fold0" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    renew(member(mounts))
    the_only_fault(examine(mounts), "error", "mounts", member(mounts).name, "1 pickles", "fold0/pytorch_model.bin")


def test_a_test_set_that_a_member_cannot_read_is_named(mounts: Path) -> None:
    rows = read_rows(mounts / "exam" / "test.csv")
    write_rows(mounts / "exam" / "test.csv", [[*rows[0][:3], "option two", *rows[0][4:]], *rows[1:]])
    found = faults(examine(mounts))
    assert [(fault.level, fault.check) for fault in found] == [("error", "competition")] * 3
    assert all("cannot read the test set" in fault.what and "column 'B' is missing" in fault.what for fault in found)


def test_a_damaged_test_set_is_an_error_with_its_line(mounts: Path) -> None:
    (mounts / "exam" / "test.csv").write_text('id,prompt\n1,"never closed\n', encoding="utf-8")
    the_only_fault(examine(mounts), "error", "competition", "line 2", "never closed")


def test_what_a_check_said_before_it_failed_is_kept(mounts: Path) -> None:
    (mounts / "exam" / "sample_submission.csv").write_bytes(b"")
    findings = examine(mounts)
    the_only_fault(findings, "error", "competition", "sample_submission.csv", "is empty")
    assert "test.csv: 10 rows" in said(findings, "competition")


def test_a_sample_submission_of_other_ids_is_a_warning(mounts: Path) -> None:
    write_rows(mounts / "exam" / "sample_submission.csv", [["id", "prediction"], ["other", "A B C"]])
    the_only_fault(examine(mounts), "warning", "competition", "differ in 11 ids")
    (mounts / "exam" / "sample_submission.csv").unlink()
    assert "rows go in the order of test.csv" in said(examine(mounts), "competition")


ESSAYS = ('task={kind = "essay_regression"}', 'data.test="essays.csv"')
READINGS = ('task={kind = "extractive_qa"}', 'data.test="test.json"')


def mount_other(root: Path, family: str, overrides: tuple[str, ...]) -> Path:
    """A member and the sample competition of another family; gives the latter."""
    folder = packed.write_member(root, "reader-12345678")
    packed.change_member(folder, *overrides)
    renew(folder)
    shutil.rmtree(root / "competition", ignore_errors=True)
    return write_sample(root / "exam", family)


def competition_faults(root: Path) -> list[Finding]:
    return [fault for fault in faults(examine(root)) if fault.check == "competition"]


def test_the_test_set_of_every_family_is_found_and_compared_with_its_sample_submission(tmp_path: Path) -> None:
    essays = mount_other(tmp_path / "a", "essays", ESSAYS)
    (essays / "test.csv").rename(essays / "essays.csv")
    mount_other(tmp_path / "b", "readings", READINGS)
    for root, name in ((tmp_path / "a", "essays.csv"), (tmp_path / "b", "test.json")):
        assert competition_faults(root) == []
        told = [found.what for found in examine(root) if found.check == "competition"]
        assert f"{name}: " in told[0] and told[1] == f"sample_submission.csv has the ids of {name}, in the same order"


def test_a_test_set_of_another_name_is_not_found_and_all_names_are_said(tmp_path: Path) -> None:
    competition = mount_other(tmp_path, "readings", ('task={kind = "extractive_qa"}', 'data.test="dev.json"'))
    (competition / "test.json").rename(competition / "questions.json")
    (found,) = competition_faults(tmp_path)
    assert "looked for dev.json, test.csv, test.json" in found.what and "exam/questions.json" in found.what


def test_a_test_set_of_another_family_is_named_with_the_column_that_is_missing(tmp_path: Path) -> None:
    competition = mount_other(tmp_path, "essays", READINGS)
    (found,) = [fault for fault in competition_faults(tmp_path) if fault.level == "error"]
    assert f"cannot read the test set: {competition / 'test.csv'}" in found.what and "column 'id' is missing" in found.what


def test_essays_with_an_id_twice_and_a_sample_submission_without_ids_are_named(tmp_path: Path) -> None:
    competition = mount_other(tmp_path, "essays", ESSAYS)
    rows = read_rows(competition / "test.csv")
    write_rows(competition / "test.csv", [*rows, rows[-1]])
    assert "has the same id" in competition_faults(tmp_path)[0].what
    write_rows(competition / "test.csv", rows)
    write_rows(competition / "sample_submission.csv", [("id", "cohesion"), ("1", "3.0")])
    (found,) = competition_faults(tmp_path)
    assert (found.level, "has no column 'text_id' (columns: id, cohesion): rows go in the order of test.csv" in found.what) == ("warning", True)


def test_damaged_readings_are_named_with_their_place(tmp_path: Path) -> None:
    competition = mount_other(tmp_path, "readings", READINGS)
    text = (competition / "test.json").read_text(encoding="utf-8")
    (competition / "test.json").write_text(text.replace('"context"', '"kontext"', 1), encoding="utf-8")
    (found,) = competition_faults(tmp_path)
    assert found.level == "error" and "article 1" in found.what and "key 'context' is missing" in found.what


# --- the installation ------------------------------------------------------------------------------------------------------------

LOCK = """\
# made for two images
numpy=={numpy} \\
    --hash=sha256:0000 \\
    --hash=sha256:1111
nothing-of-this-name==1.0 ; python_version < "3.0" --hash=sha256:2222
"""


def test_a_lock_that_is_installed_is_fine(mounts: Path) -> None:
    import numpy

    write_bundle(mounts / "kit-wheels", "wheels", {"requirements.lock": LOCK.format(numpy=numpy.__version__)})
    findings = examine(mounts)
    assert not faults(findings) and "1 packages installed as locked" in said(findings, "locks")


def test_a_lock_that_is_not_installed_names_what_is_here(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = f"{LOCK.format(numpy='0.1')}Absent_Package==2 --hash=sha256:3333\n"
    write_bundle(mounts / "kit-wheels", "wheels", {"requirements.lock": lock})
    fault = the_only_fault(examine(mounts), "warning", "locks", "numpy==0.1 (here ", "Absent_Package==2 (here none)")
    assert "install cell" in fault.todo and "nothing-of-this-name" not in fault.what
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    assert [fault.level for fault in faults(examine(mounts)) if fault.check == "locks"] == ["error"]


def test_a_lock_is_read_with_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "requirements.lock"
    path.write_text("--no-index\n\na==1 ; python_version > '3' --hash=sha256:00 # why\nb==2 ; python_version < '3'\nC-d==3\n", encoding="utf-8")
    assert [str(pin) for pin in read_lock(path)] == ['a==1; python_version > "3"', "C-d==3"]


def test_another_version_of_the_kit_is_a_warning(mounts: Path) -> None:
    write_bundle(mounts / "kit-code", "code", {"readme": ""}, version="99.0")
    the_only_fault(examine(mounts), "warning", "locks", "kit-code holds kit 99.0", f"but {kit.__version__} runs")
    write_bundle(mounts / "kit-code", "code", {"readme": ""}, version=kit.__version__)
    assert not faults(examine(mounts))


def install(site: Path, name: str, version: str, *requires: str) -> None:
    """A package's metadata, as an installation leaves it."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_vendored_wheel_that_does_not_fit_the_image_is_an_error(mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "vendored", "1.0", "numpy>=999", "absent-package", "never; python_version < '3'", "extra; extra == 'all'")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert not faults(examine(mounts)), "an unlocked package that nobody imports is not looked at"
    write_bundle(mounts / "kit-wheels", "wheels", {"requirements.lock": "vendored==1.0 --hash=sha256:00\n"})
    found = faults(examine(mounts))
    assert [(fault.level, fault.check) for fault in found] == [("error", "requirements")] * 2
    assert "vendored 1.0 needs absent-package, would have none" in found[0].what and "vendored 1.0 needs numpy>=999" in found[1].what


def test_a_conflict_of_the_image_itself_is_a_warning(mounts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "pandas", "99.0", "numpy>=999")
    monkeypatch.syspath_prepend(tmp_path / "site")
    the_only_fault(examine(mounts), "warning", "requirements", "pandas 99.0 needs numpy>=999, would have")


# --- the members -----------------------------------------------------------------------------------------------------------------


def test_a_missing_index_names_the_members_that_need_it(mounts: Path, tmp_path: Path) -> None:
    index(mounts).rename(tmp_path / "elsewhere")
    found = faults(examine(mounts))
    assert [(fault.level, fault.check) for fault in found] == [("error", "members")] * 2
    assert found[0].what.startswith("reader-") and found[1].what.startswith("second-reader-") and "passages-" in found[0].todo


def test_a_recipe_that_this_version_does_not_know_is_named(mounts: Path) -> None:
    path = member(mounts) / "recipe.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("batch_size", "batchsize"), encoding="utf-8")
    renew(member(mounts))
    found = [fault for fault in faults(examine(mounts)) if fault.check == "members"]
    assert len(found) == 1 and "batchsize" in found[0].what and "did you mean 'batch_size'" in found[0].what


def test_a_missing_tokenizer_is_named(mounts: Path) -> None:
    (member(mounts) / "fold0" / "tokenizer.json").unlink()
    renew(member(mounts))
    the_only_fault(examine(mounts), "error", "members", f"{member(mounts).name}/fold0", "no tokenizer.json")


def test_weights_with_a_broken_header_and_missing_weights_are_named(mounts: Path) -> None:
    weights = member(mounts) / "fold1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    renew(member(mounts))
    the_only_fault(examine(mounts), "error", "members", f"{member(mounts).name}/fold1/model.safetensors cannot be read as weights")
    weights.unlink()
    renew(member(mounts))
    the_only_fault(examine(mounts), "error", "members", f"{member(mounts).name}/fold1: no *.safetensors")


def test_a_member_without_fits_is_named(mounts: Path) -> None:
    renew(member(mounts), fits=[])
    the_only_fault(examine(mounts), "error", "members", "names no fit")


@pytest.mark.parametrize("base", ["big-model", "owner/model-of-the-hub", None])
def test_the_base_of_an_adapter_must_be_mounted(mounts: Path, base: str | None) -> None:
    write_bundle(mounts / "adapter", "weights", {"fold0/adapter_config.json": json.dumps({"base_model_name_or_path": base})})
    the_only_fault(examine(mounts), "error", "adapters", "adapter/fold0/adapter_config.json", repr(base))


def test_a_mounted_base_of_an_adapter_is_fine(mounts: Path) -> None:
    write_bundle(mounts / "adapter", "weights", {"adapter_config.json": json.dumps({"base_model_name_or_path": "big-model"})})
    write_bundle(mounts / "big-model", "weights", {"config.json": "{}"})
    findings = examine(mounts)
    assert not faults(findings) and "its base model big-model is mounted" in said(findings, "adapters")


@pytest.mark.parametrize(("fit", "kept"), [("adapter", "adapter_model.safetensors"), ("no weights", "base.json")])
def test_a_member_whose_fits_need_a_base_names_it_where_it_is_not_mounted(mounts: Path, fit: str, kept: str) -> None:
    folder = member(mounts)
    (folder / "recipe.toml").write_text(Recipe.load("sample_qlora").to_toml(), encoding="utf-8")
    for weights in folder.glob("*/model.safetensors"):
        weights.rename(weights.with_name(kept))
    renew(folder)
    fault = the_only_fault(examine(mounts), "error", "members", f"{folder.name}: its base sample-lm is not mounted (bundles: ")
    assert fault.todo == "attach the dataset sample-lm"
    write_bundle(mounts / "sample-lm", "weights", {"config.json": "{}"})
    assert not faults(examine(mounts))
    (folder / "fold1" / kept).unlink()
    renew(folder)
    the_only_fault(examine(mounts), "error", "members", f"{folder.name}/fold1: no *.safetensors")


def test_a_check_that_fails_itself_is_a_warning_and_the_others_go_on(mounts: Path) -> None:
    write_bundle(mounts / "adapter", "weights", {"adapter_config.json": "no JSON"})
    write_bundle(mounts / "kit-wheels", "wheels", {"requirements.lock": "=="})
    found = faults(examine(mounts))
    assert [(fault.level, fault.check) for fault in found] == [("warning", check) for check in ("locks", "requirements", "adapters")]
    assert "could not be checked: InvalidRequirement" in found[0].what and "could not be checked: JSONDecodeError" in found[2].what
