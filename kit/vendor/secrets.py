"""Secret scan of a folder that is to be uploaded: names of files, links, tokens in them, outputs of notebooks.

The site's client uploads dotfiles and follows links, so nothing may be there that is not meant to be. Does not know bundles or the site's rules.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kit.errors import BundleError

NAMES = (
    "kaggle.json", "access_token*", "credentials.json", ".env*", ".netrc", ".pypirc", ".git", ".git-credentials",
    "*.pem", "*.key", "*.p12", "id_rsa*", "id_ecdsa*", "id_ed25519*",
)  # fmt: skip

_TOKENS = (  # every pattern begins with fixed bytes, so that it is searched for at the speed of those
    ("a Kaggle API token", re.compile(rb"KGAT_\w{16}")),
    ("a Kaggle key", re.compile(rb'"key"\s{0,9}:\s{0,9}"[0-9a-f]{32}"')),
    ("a Kaggle key", re.compile(rb"KAGGLE_KEY\W{1,9}[0-9a-f]{32}\b")),
    ("a Hugging Face token", re.compile(rb"hf_(?<!\whf_)[A-Za-z0-9]{30}")),
    ("a GitHub token", re.compile(rb"ghp_[A-Za-z0-9]{36}")),
    ("a GitHub token", re.compile(rb"github_pat_\w{22}")),
    ("an AWS access key", re.compile(rb"AKIA(?<!\wAKIA)[A-Z0-9]{16}\b(?<!EXAMPLE)")),
    ("an API key", re.compile(rb"sk-(?<![\w-]sk-)(?:[A-Za-z0-9]{32}|(?:proj|ant|svcacct)-[\w-]{20})")),
    ("a private key", re.compile(rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY")),
)
CHUNK = 1 << 20
_LONGEST = 256  # bytes: no token that is looked for is longer


def scan(folder: Path) -> None:
    """Refuse a folder that holds what must not be uploaded. Raises BundleError naming file and line, never the secret itself.

    Looked for at any depth: files named like those that hold credentials, links that lead out of the folder, tokens and private keys
    (in all of a text, and in the first MiB of a binary file, where headers are), outputs and execution counts in notebooks.
    """
    for path in _walk(folder):
        if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in NAMES):
            raise BundleError(f"{path}: a file of this name may hold credentials and must not be uploaded: move it out of the folder")
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{path}: a link that leads out of its folder, to {path.resolve()}: replace it by a file that may be uploaded, or remove it")
        if path.is_file():
            with open(path, "rb") as file:
                if found := _find_token(file):
                    line, what = found
                    raise BundleError(f"{path}:{line}: holds what looks like {what}: remove it, and revoke it if anybody may have seen it")
            if path.suffix == ".ipynb":
                _refuse_outputs(path)


def _walk(folder: Path) -> Iterator[Path]:
    """All files, folders and links below the folder, in a fixed order; links are not followed."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted([*folders, *files]))


def _find_token(file: BinaryIO) -> tuple[int, str] | None:
    """Line, counted from 1, and kind of the first token in an open file."""
    line, rest = 1, b""
    while chunk := file.read(CHUNK):
        text = rest + chunk
        for what, pattern in _TOKENS:
            if match := pattern.search(text):
                return line + text.count(b"\n", 0, match.start()), what
        if b"\0" in chunk:
            return None
        rest = text[-_LONGEST:]
        line += text.count(b"\n", 0, -_LONGEST)
    return None


def _refuse_outputs(notebook: Path) -> None:
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        dirty = [number for number, cell in enumerate(cells, 1) if cell.get("outputs") or cell.get("execution_count") is not None]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{notebook}: is no readable notebook ({error}): save it again") from None
    if dirty:
        raise BundleError(f"{notebook}: cell {dirty[0]} holds what a run left in it (outputs or a count): clear all outputs and save it again")
