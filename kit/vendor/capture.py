"""Tells what this machine's Python has: its version, packages, torch build, names of environment variables, mounts.

Imports nothing of the kit and nothing that must be installed: its text is also the cell that is pasted into a competition notebook.
Does not know what the answer is for.
"""

import os
import platform
import re
import shutil
from importlib import metadata

MOUNTS = ("/kaggle/input", "/kaggle/working", "/kaggle/temp", "/tmp")


def capture() -> dict[str, object]:
    """The fields of a profile, ready for JSON. Environment variables by name only: their values may be secrets."""
    return {
        "python": platform.python_version(),
        "glibc": glibc(),
        "machine": platform.machine(),
        "torch": torch_build(),
        "environment": sorted(os.environ),
        "mounts": {path: shutil.disk_usage(path).free for path in MOUNTS if os.path.isdir(path)},
        "packages": packages(),
    }


def packages() -> dict[str, dict[str, object]]:
    """Canonical name → version and Requires-Dist of every package that can be imported. What stands first on sys.path wins."""
    found: dict[str, dict[str, object]] = {}
    for distribution in metadata.distributions():
        known = distribution.metadata
        if "Name" in known and "Version" in known:  # not where an uninstallation left half of a folder
            canonical = re.sub(r"[-_.]+", "-", known["Name"]).lower()
            found.setdefault(canonical, {"version": distribution.version, "requires": list(distribution.requires or ())})
    return dict(sorted(found.items()))


def glibc() -> str:
    """Version of the C library, e.g. "2.35"; empty where it is another than glibc."""
    library, version = platform.libc_ver()
    return version if library == "glibc" else ""


def torch_build() -> dict[str, object] | None:
    """Version, CUDA version and GPU architectures of the installed torch; None where there is none that can be imported."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: one of its shared libraries is missing
        return None
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "archs": torch.cuda.get_arch_list()}
