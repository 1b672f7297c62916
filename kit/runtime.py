"""Device, dtype and its reason, seeds, threads, offline switches. The only file that reads or writes os.environ.

torch is imported inside functions, so importing this costs nothing. Knows no task, model or file of the kit.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil

from kit.errors import ConfigError

if TYPE_CHECKING:
    import torch

INPUT_ROOT = "KIT_INPUT"  # where bundles and the competition's files are mounted; default: COMPETITION_INPUT
COMPETITION_INPUT = Path("/kaggle/input")
RERUN_MARKER = "KAGGLE_IS_COMPETITION_RERUN"
RUN_TYPE = "KAGGLE_KERNEL_RUN_TYPE"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_NO_MEMORY = (
    "MemoryError", "OutOfMemory", "bad_alloc", "t allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED",
    "could not create a primitive", "Resource temporarily unavailable",
)  # fmt: skip  # the last two: oneDNN, and a new thread
_ONE_COPY = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}  # transformers otherwise may read tensors faster than it places them, and hold them twice
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Runtime(NamedTuple):
    """What computation runs on: a torch device, the dtype of matrix products, and why that dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def autocasts(self) -> bool:
        """Whether products run in a narrower type than the float32 weights."""
        return self.dtype.itemsize < 4


def choose(precision: str = "auto", device: str | None = None) -> Runtime:
    """Device and dtype for this machine.

    auto: bf16 on GPUs with native bf16 (sm_80 and later), fp16 on older ones such as the T4 (whose bf16 is emulated and
    slower), fp32 on the CPU (bf16 products are slower than fp32 on most of them). Raises ConfigError.
    """
    import torch

    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    if device is None:
        local = os.environ.get("LOCAL_RANK", "0")
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if precision != "auto":
        return Runtime(place, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], "asked for")
    if place.type != "cuda":
        return Runtime(place, torch.float32, f"{place.type}: fp32 is exact and as fast")
    major, minor = torch.cuda.get_device_capability(place)
    if major >= 8:
        return Runtime(place, torch.bfloat16, f"sm_{major}{minor} has native bf16")
    return Runtime(place, torch.float16, f"sm_{major}{minor} has no native bf16")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, and choose deterministic kernels where torch has them."""
    import torch
    from torch.utils import deterministic

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and nothing here reads what it has not written


def free_memory() -> None:
    """Give back what dropped models held, on the GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def tells_of_memory(text: str) -> bool:
    """Whether an error's name and text, or a process' last words, say that memory ran out."""
    return any(sign in text for sign in _NO_MEMORY)


def go_offline() -> None:
    """Set every switch that stops a library from calling a model hub, or lets one hold weights twice. Call before importing transformers."""
    os.environ.update(_OFFLINE | _ONE_COPY)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS


def is_main_process() -> bool:
    """Whether this is the only, or the first, of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def input_root() -> Path:
    """The folder where bundles and competition files are mounted."""
    return Path(os.environ.get(INPUT_ROOT) or COMPETITION_INPUT)


def on_competition_machine() -> bool:
    """Whether this process runs as a notebook of the competition site (or in a rehearsal of it)."""
    return RUN_TYPE in os.environ


def is_rerun() -> bool:
    """Whether this is the hidden-test execution that counts."""
    return bool(os.environ.get(RERUN_MARKER))


def python() -> str:
    """The interpreter that runs this process."""
    return sys.executable


class Gpu(NamedTuple):
    """A CUDA device. capability: (major, minor). free and total: bytes of its memory."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


def devices() -> list[str]:
    """Every GPU, or else the CPU. Does not start CUDA."""
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def gpus() -> list[Gpu]:
    """The GPUs that torch sees, in its order."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), *torch.cuda.mem_get_info(i)) for i in range(count)]


def try_product(chosen: Runtime) -> bool:
    """Whether a small matrix product on the device, of the chosen type, comes out right. Raises what the device raises."""
    import torch

    ones = torch.ones(64, 64, device=chosen.device, dtype=chosen.dtype)
    return bool((ones @ ones == 64).all().cpu())


def open_switches() -> list[str]:
    """Offline switches that are not set, or that huggingface_hub was imported too early to see."""
    hub = sys.modules.get("huggingface_hub.constants")
    late = ["HF_HUB_OFFLINE (after huggingface_hub was imported)"] if hub is not None and not hub.HF_HUB_OFFLINE else []
    return [name for name, value in _OFFLINE.items() if os.environ.get(name) != value] + late


def run_type() -> str:
    """How the competition machine runs this notebook ("Interactive" or "Batch"); empty elsewhere."""
    return os.environ.get(RUN_TYPE, "")


_SETTINGS = ("PIP_", "UV_", "PYTHON", "KAGGLE_", "HF_")  # prefixes of variables that change what a child installs or imports, or that hold credentials
_NEEDED = {"PIP_CACHE_DIR", "PIP_CERT", "UV_CACHE_DIR"}
_NETWORK = {"PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY", "UV_HTTP_TIMEOUT"}
_INDEXES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_NOWHERE = "http://127.0.0.1:9"  # the discard port: a proxy that refuses


def clean_environment(*, network: bool = False) -> dict[str, str]:
    """The environment of a child that resolves, installs or imports: as here, without any setting of pip, uv or Python and without tokens.

    Certificates and caches stay. With the network, so does the index that PIP_INDEX_URL, UV_DEFAULT_INDEX or UV_INDEX_URL names, the first
    of them for pip and uv alike; configuration files and extra indexes never, as they give other versions on other machines. Without it,
    every way out is closed that a variable can close.
    """
    kept = _NEEDED | _NETWORK if network else _NEEDED
    child = {name: value for name, value in os.environ.items() if name in kept or not name.startswith(_SETTINGS)}
    child |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never"}
    child |= {"PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    if not network:
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _NOWHERE)
        return {name: value for name, value in child.items() if name.lower() != "no_proxy"} | proxies | _OFFLINE | {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}
    index = next((os.environ[name] for name in _INDEXES if os.environ.get(name)), None)
    return child | {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index} if index else child


def gpu_choice() -> dict[str, str]:
    """The variable that says which of this machine's GPUs may be used, if it is set."""
    return {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}


_QUIET = {  # of a process that forks: importing starts no thread and no CUDA. Set only where the user has not chosen
    "OPENBLAS_NUM_THREADS": "1",  # numpy's and scipy's: nothing here spends its time there; torch has threads of its own
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def worker_environment(device: str) -> dict[str, str]:
    """The environment of a scoring process on `device` ("cpu", "cuda:0", …; "auto": as here): as here, offline, importing from where this one does."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    kind, _, number = device.partition(":")
    places = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {"LOCAL_RANK": number or "0"}}
    return _QUIET | dict(os.environ) | _OFFLINE | _ONE_COPY | {"PYTHONPATH": path} | places.get(kind, {})
