"""Looks at the machine: software, GPUs, memory, disk, clock, offline switches. Knows no bundle and no competition.

Every check yields what it has to say; doctor.py calls them. The judges beside them decide about values, so that they can be tried without the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

import kit
from kit import runtime
from kit.budget import NINE_HOURS_S, seconds_since_process_start
from kit.rehearsal.findings import Said, one_line
from kit.vendor.profile import Profile

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pandas")
"""What the kit computes with."""
_DISK_NEEDED, _DISK_WISHED = 2_000_000_000, 5_000_000_000  # bytes
_SLOW_START_S = 900.0  # an installation takes a minute: so long a start waits for something


def software(image: Profile) -> Iterator[Said]:
    """Versions of what the kit computes with."""
    found = {name: image.packages.get(name) for name in LIBRARIES}
    versions = ", ".join(f"{name} {package.version if package else 'absent'}" for name, package in found.items())
    yield Said("ok", f"kit {kit.__version__}, Python {image.python}, {image.machine}, glibc {image.glibc or 'none'}, {versions}")


def kind_of_run() -> Iterator[Said]:
    """Which run this is."""
    if runtime.is_rerun():
        yield Said("ok", "the hidden rerun, the execution that counts")
    elif runtime.on_competition_machine():
        yield Said("ok", f"the competition machine, run type {runtime.run_type()}; not the hidden rerun")
    else:
        yield Said("ok", "not the competition machine")


def gpus(image: Profile) -> Iterator[Said]:
    """Whether every GPU can be used by this torch, and gives right products; without any, whether the CPU does."""
    found = runtime.gpus()
    archs = image.torch.archs if image.torch else ()
    yield from (judge_gpu(gpu, archs) for gpu in found)
    if len(found) > 1:
        yield Said("ok", f"{len(found)} GPUs")
    elif not found and runtime.on_competition_machine():
        yield Said("warning", "no GPU: everything runs on the CPU", "choose the accelerator GPU T4 ×2 in the notebook's settings, unless every member is small")
    for device in [f"cuda:{number}" for number in range(len(found))] or ["cpu"]:
        yield _try_device(device)


def judge_gpu(gpu: runtime.Gpu, archs: Sequence[str]) -> Said:
    """Whether a torch with kernels for these architectures runs on the GPU."""
    what = f"{gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, {_gb(gpu.free)} of {_gb(gpu.total)} free"
    if has_kernels(gpu.capability, archs):
        return Said("ok", what)
    return Said("error", f"{what}: this torch has no kernels for it, only for {' '.join(archs) or 'no GPU'}", "choose T4 as the accelerator in the notebook's settings")


def has_kernels(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether code for one of the architectures ("sm_75", "compute_90", "sm_90a") runs on a GPU of this capability.

    CUDA's rules of compatibility: machine code runs on its own major version from its minor version on, PTX (compute) on its own version
    and all later ones, either with the suffix "a" on its own version only.
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)(a?)\b", " ".join(archs)):
        built = (int(major), int(minor))
        if capability == built or not suffix and capability > built and (kind == "compute" or capability[0] == built[0]):
            return True
    return False


def _try_device(device: str) -> Said:
    chosen = runtime.choose(device=device)
    what = f"products on {device} in {chosen.dtype} ({chosen.reason})"
    way_out = "choose T4 as the accelerator in the notebook's settings, or none"
    try:
        return Said("ok", f"{what} come out right") if runtime.try_product(chosen) else Said("error", f"{what} come out wrong", way_out)
    except RuntimeError as error:  # what torch makes of CUDA's errors
        return Said("error", f"{what} fail: {one_line(error)}", way_out)


def memory(weights: Mapping[str, int]) -> Iterator[Said]:
    """Whether the largest fit can be loaded. weights: bytes by fit."""
    ram = psutil.virtual_memory()
    largest, needed = max(weights.items(), key=lambda item: item[1], default=("", 0))
    of_largest = f"weights of the largest fit, {largest}: {_gb(needed)}" if weights else "no weights are mounted"
    what = f"{_gb(ram.available)} of {_gb(ram.total)} RAM free, {os.cpu_count()} CPUs, {of_largest}"
    if ram.available < 2 * needed:
        yield Said("warning", f"{what}, and loading takes up to twice that", "close other sessions, or leave this member out")
    else:
        yield Said("ok", what)
    for gpu in runtime.gpus():
        if gpu.free < needed:
            yield Said("warning", f"{_gb(gpu.free)} free on {gpu.name}, {of_largest}", "restart the session, or leave this member out")


def disk(working: Path) -> Iterator[Said]:
    """Whether there is room where the submission goes, and where temporary files go."""
    for name, folder in {"working": working, "temporary": Path(tempfile.gettempdir())}.items():
        try:
            with tempfile.TemporaryFile(dir=folder):
                yield judge_disk(f"{name} folder {folder}", shutil.disk_usage(folder).free)
        except OSError as error:
            yield Said("error", f"{name} folder {folder} cannot be written to: {error.strerror}", "run where files can be written, as in /kaggle/working")


def judge_disk(folder: str, free: int) -> Said:
    """Whether so many free bytes are enough."""
    if free >= _DISK_WISHED:
        return Said("ok", f"{folder}: {_gb(free)} free")
    return Said("error" if free < _DISK_NEEDED else "warning", f"{folder}: only {_gb(free)} free", "remove what is not needed there")


def clock() -> Iterator[Said]:
    """Whether time passes, and how much of the nine hours is left."""
    begun = time.monotonic()
    time.sleep(0.001)
    if time.gmtime().tm_year < 2024 or time.monotonic() <= begun:
        yield Said("warning", f"the clock stands still or is wrong: {time.strftime('%Y-%m-%d %H:%M:%S')}", "give the budget used_s by hand")
    yield judge_start(seconds_since_process_start(), interactive=runtime.run_type() != "Batch")


def judge_start(elapsed_s: float, *, interactive: bool) -> Said:
    """Whether this process has enough of its nine hours left; an interactive session may be as old as it likes."""
    what = f"this process began {elapsed_s:.0f} s ago: {(NINE_HOURS_S - elapsed_s) / 3600:.2f} h of nine are left"
    if interactive:
        return Said("ok", what)
    return Said("warning", what, "do nothing slow before this cell") if elapsed_s > _SLOW_START_S else Said("ok", what)


def offline(fault: str) -> Iterator[Said]:
    """Whether no library will ask the internet. fault: level of a switch that is not set."""
    if missing := runtime.open_switches():
        yield Said(fault, f"offline switches not set: {', '.join(missing)}", "import kit before transformers, datasets and huggingface_hub")
    else:
        yield Said("ok", "every offline switch is set")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
