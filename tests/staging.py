"""Staged datasets and notebooks as publishing finds them, small and made by hand, so that each rule can be broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kit import manifest
from kit.vendor.site import DATASET_METADATA, KERNEL_METADATA

_TIME = 1_600_000_000  # of every file: staging fixes it


def stage_dataset(out: Path, ref: str, **files: bytes) -> Path:
    """The folder out/<slug> with these files (`__` in a name stands for a dot), a manifest and metadata."""
    folder = out / ref.partition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATASET_METADATA).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    manifest.write(folder, folder.name, "member")
    _write(folder / DATASET_METADATA, {"id": ref, "title": folder.name.title(), "licenses": [{"name": "other"}]})
    for path in folder.iterdir():
        os.utime(path, (_TIME, _TIME))
    return folder


def stage_notebook(out: Path, ref: str, **changes: Any) -> Path:
    """The folder out/<slug> with infer.ipynb and metadata."""
    folder = out / ref.partition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    cell = {"cell_type": "code", "source": ["print(1)"], "outputs": [], "metadata": {}}
    _write(folder / "infer.ipynb", {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    meta = {
        "id": ref, "title": folder.name.replace("-", " ").capitalize(), "code_file": "infer.ipynb", "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_gpu": True, "enable_internet": False,
    }  # fmt: skip
    _write(folder / KERNEL_METADATA, {**meta, **changes})
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None removes one."""
    _write(path, {name: value for name, value in {**json.loads(path.read_text()), **changes}.items() if value is not None})


def _write(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body))
