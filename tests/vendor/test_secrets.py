"""kit.vendor.secrets: what may not be uploaded is found by name, link, content and notebook, and is never shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.errors import BundleError
from kit.vendor import secrets
from kit.vendor.secrets import scan

HEX = "0123456789abcdef" * 2
TOKENS = {  # put together here, so that no scanner takes this file for a leak
    "a Kaggle API token": "KGAT" + "_" + HEX,
    "a Kaggle key": '{"username":"me","ke' + f'y": "{HEX}"' + "}",
    "a Kaggle key ": "export KAGGLE_" + f"KEY='{HEX}'",
    "a Hugging Face token": "token=hf" + "_" + "aB3" * 12,
    "a GitHub token": "ghp" + "_" + "aB3" * 12,
    "a GitHub token ": "github" + "_pat_" + "aB3_" * 12,
    "an AWS access key": "AKI" + "A" + "Z9" * 8,
    "an API key": '"sk' + "-" + "aB3" * 16 + '"',
    "an API key ": "sk" + "-proj-" + "aB-3" * 16,
    "a private key": "-----BEGIN RSA PRIVATE" + " KEY-----",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    (root / "fold0").mkdir(parents=True)
    (root / "fold0" / "config.json").write_text('{"key": "value", "hidden_size": 16}')
    (root / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (root / "empty").touch()
    return root


def test_a_folder_without_secrets_passes(folder: Path) -> None:
    (folder / "inside").symlink_to(folder / "fold0" / "config.json")
    scan(folder)


@pytest.mark.parametrize(
    "name",
    ["kaggle.json", "Kaggle.JSON", ".env", ".env.local", "server.pem", "private.key", "id_rsa", "id_rsa.pub", ".netrc", "credentials.json", "access_token"],
)
@pytest.mark.parametrize("where", [".", "fold0", "fold0/deep"])
def test_files_named_like_credentials_are_refused_at_any_depth(folder: Path, name: str, where: str) -> None:
    (folder / where).mkdir(exist_ok=True)
    (folder / where / name).touch()
    with pytest.raises(BundleError, match=rf"{name}: a file of this name may hold credentials and must not be uploaded: move it out of the folder"):
        scan(folder)


def test_a_repository_is_refused(folder: Path) -> None:
    (folder / ".git" / "objects").mkdir(parents=True)
    with pytest.raises(BundleError, match=r"\.git: a file of this name"):
        scan(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "environment.txt", "keys.txt", "monkey", "my.env.txt"])
def test_other_names_pass(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    scan(folder)


@pytest.mark.parametrize("target", ["secret.txt", "folder", "missing"])
def test_a_link_that_leads_out_is_refused_whatever_it_leads_to(folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (folder / "fold0" / "weights.bin").symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match=rf"fold0/weights.bin: a link that leads out of its folder, to .*{target}"):
        scan(folder)


@pytest.mark.parametrize("what", TOKENS)
def test_a_token_is_refused_with_its_line_and_not_shown(folder: Path, what: str) -> None:
    (folder / "notes.txt").write_text(f"first\nsecond\n  {TOKENS[what]}\nlast\n")
    with pytest.raises(BundleError, match=rf"notes.txt:3: holds what looks like {what.strip()}: remove it, and revoke it") as refused:
        scan(folder)
    assert HEX not in str(refused.value)
    assert "aB3aB3" not in str(refused.value)


@pytest.mark.parametrize("what", TOKENS)
@pytest.mark.parametrize("before", [-40, -1, 0, 1])
def test_a_token_is_found_across_the_border_of_two_chunks(tmp_path: Path, what: str, before: int) -> None:
    filler = b"line\n" * ((secrets.CHUNK + before) // 5 + 1)
    (tmp_path / "large.txt").write_bytes(filler[: secrets.CHUNK + before] + b"\n" + TOKENS[what].encode() + b"\n" + filler)
    line = filler[: secrets.CHUNK + before].count(b"\n") + 2
    with pytest.raises(BundleError, match=f"large.txt:{line}: holds what looks like {what.strip()}"):
        scan(tmp_path)


@given(lines=st.lists(st.text("ab \t\r-_", max_size=400), max_size=12), at=st.integers(0, 12))
def test_the_line_that_is_named_is_the_line(tmp_path_factory: pytest.TempPathFactory, lines: list[str], at: int) -> None:
    folder = tmp_path_factory.mktemp("scan")
    lines.insert(at, TOKENS["a Kaggle API token"])
    (folder / "a.txt").write_bytes("\n".join(lines).encode())
    with pytest.raises(BundleError, match=rf"a.txt:{min(at, len(lines) - 1) + 1}:"):
        scan(folder)


def test_the_header_of_a_binary_file_is_looked_at(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0\0\0\0" + TOKENS["a Hugging Face token"].encode() + bytes(100))
    with pytest.raises(BundleError, match=r"model.safetensors:1: holds what looks like a Hugging Face token"):
        scan(folder)


@pytest.mark.parametrize(
    "text",
    [
        f'"sha256": "{HEX}{HEX}"', f'"key": "{HEX}{HEX}"', "hf_hub_download hf_" + "a" * 10, "task-" + "a" * 40, "sk-toggleable__label-arrow",
        "AKIA" + "IOSFODNN7" + "EXAMPLE", "MAKIAWELI" * 4, "-----BEGIN CERTIFICATE-----", "KGAT_", "a PRIVATE KEY", "half_" + "a" * 40,
    ],
)  # fmt: skip
def test_what_only_resembles_a_token_passes(folder: Path, text: str) -> None:
    (folder / "notes.txt").write_text(text)
    scan(folder)


def write_notebook(path: Path, **cell: object) -> Path:
    cells = [{"cell_type": "markdown", "source": "# Title"}, {"cell_type": "code", "source": "1", "outputs": [], "execution_count": None, **cell}]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_a_cleared_notebook_passes(folder: Path) -> None:
    write_notebook(folder / "infer.ipynb")
    scan(folder)


@pytest.mark.parametrize("left", [{"outputs": [{"output_type": "stream", "text": "x"}]}, {"execution_count": 1}])
def test_a_notebook_with_what_a_run_left_is_refused(folder: Path, left: dict[str, object]) -> None:
    write_notebook(folder / "infer.ipynb", **left)
    with pytest.raises(BundleError, match=r"infer.ipynb: cell 2 holds what a run left in it .*: clear all outputs"):
        scan(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": [1]}', "\xff"])
def test_a_notebook_that_cannot_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "infer.ipynb").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"infer.ipynb: is no readable notebook"):
        scan(folder)
