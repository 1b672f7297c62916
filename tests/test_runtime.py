"""Device and dtype, seeds, offline switches, and the variables that are read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kit import runtime
from kit.errors import ConfigError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def restored() -> Iterator[None]:
    """torch's global settings as they were, after the test."""
    deterministic, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_precision_that_is_asked_for_is_taken(precision: str, dtype: torch.dtype) -> None:
    chosen = runtime.choose(precision, "cpu")
    assert (chosen.device, chosen.dtype, chosen.reason) == (torch.device("cpu"), dtype, "asked for")
    assert chosen.autocasts == (precision != "fp32")


def test_auto_on_the_cpu_is_fp32_with_a_reason() -> None:
    chosen = runtime.choose(device="cpu")
    assert chosen.dtype == torch.float32 and not chosen.autocasts and "cpu" in chosen.reason


@pytest.mark.gpu
def test_auto_on_a_gpu_names_its_generation() -> None:
    chosen = runtime.choose()
    major, minor = torch.cuda.get_device_capability()
    assert chosen.dtype == (torch.bfloat16 if major >= 8 else torch.float16) and f"sm_{major}{minor}" in chosen.reason


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision 'int4' is unknown: choose one of auto, fp32, bf16, fp16"):
        runtime.choose("int4")


def test_a_seed_fixes_python_numpy_and_torch(restored: None) -> None:
    drawn = []
    for seed in (7, 7, 8, 2**32 + 7):
        runtime.seed_everything(seed)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1] and all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert drawn[3][1] == drawn[0][1], "numpy takes 32 bits"


def test_free_memory_works_without_a_gpu() -> None:
    runtime.free_memory()


def in_new_process(code: str, **variables: str) -> object:
    """What a fresh interpreter prints as JSON for `code`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("KIT_", "KAGGLE_", "HF_", "TRANSFORMERS_", "TOKENIZERS_"))}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **variables}, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_go_offline_sets_every_switch_before_transformers_is_imported() -> None:
    code = (
        "import json, os; from kit.runtime import go_offline; go_offline(); import huggingface_hub.constants as c;"
        "names = ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_DEACTIVATE_ASYNC_LOAD', 'CUBLAS_WORKSPACE_CONFIG');"
        "print(json.dumps([c.HF_HUB_OFFLINE, [os.environ[name] for name in names]]))"
    )
    assert in_new_process(code) == [True, ["1", "1", "1", "1", ":4096:8"]]
    kept = in_new_process(code, CUBLAS_WORKSPACE_CONFIG=":16:8", HF_HUB_OFFLINE="0")
    assert kept == [True, ["1", "1", "1", "1", ":16:8"]], "what the user chose for cuBLAS stays; the network never does"


def test_importing_runtime_does_not_import_torch() -> None:
    assert in_new_process("import json, sys, kit.runtime; print(json.dumps('torch' in sys.modules))") is False


def test_the_places_of_the_competition_machine_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (runtime.INPUT_ROOT, runtime.RUN_TYPE, runtime.RERUN_MARKER):
        monkeypatch.delenv(name, raising=False)
    assert runtime.input_root() == Path("/kaggle/input")
    assert not runtime.on_competition_machine() and not runtime.is_rerun()
    monkeypatch.setenv(runtime.INPUT_ROOT, str(tmp_path))
    monkeypatch.setenv(runtime.RUN_TYPE, "Interactive")
    monkeypatch.setenv(runtime.RERUN_MARKER, "1")
    assert runtime.input_root() == tmp_path and runtime.on_competition_machine() and runtime.is_rerun()
    monkeypatch.setenv(runtime.INPUT_ROOT, "")
    monkeypatch.setenv(runtime.RERUN_MARKER, "")
    assert runtime.input_root() == Path("/kaggle/input") and not runtime.is_rerun()


def test_python_is_the_interpreter_that_runs() -> None:
    assert runtime.python() == sys.executable


def test_training_draws_the_same_weights_after_the_same_seed(restored: None, tmp_path: Path) -> None:
    folder = tiny.encoder_folder(tmp_path)
    heads = []
    for _ in range(2):
        runtime.seed_everything(3)
        heads.append(tiny.Encoder.create(folder, outputs=2).head.weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_product_on_this_machine_comes_out_right_in_every_type(precision: str) -> None:
    assert runtime.try_product(runtime.choose(precision, "cpu"))


def test_a_device_that_is_not_there_raises_what_torch_raises() -> None:
    chosen = runtime.Runtime(torch.device("cuda:99"), torch.float32, "asked for")
    with pytest.raises((RuntimeError, AssertionError)):
        runtime.try_product(chosen)


def test_gpus_are_those_that_torch_sees() -> None:
    found = runtime.gpus()
    assert len(found) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert all(0 < gpu.free <= gpu.total and gpu.capability >= (3, 0) for gpu in found)


def test_open_switches_are_those_not_set_and_those_set_too_late() -> None:
    code = "import json; from kit import runtime; {}; print(json.dumps(runtime.open_switches()))"
    every = in_new_process(code.format("pass"))
    assert isinstance(every, list) and {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"} <= set(every)
    assert in_new_process(code.format("runtime.go_offline(); import huggingface_hub.constants")) == []
    assert in_new_process(code.format("import huggingface_hub.constants; runtime.go_offline()")) == ["HF_HUB_OFFLINE (after huggingface_hub was imported)"]


def test_the_type_of_a_run_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime.RUN_TYPE, raising=False)
    assert runtime.run_type() == ""
    monkeypatch.setenv(runtime.RUN_TYPE, "Batch")
    assert runtime.run_type() == "Batch"


def test_a_worker_is_offline_and_imports_from_where_this_process_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    child = runtime.worker_environment("auto")
    assert child["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path), os.getcwd()]
    subprocess.run([sys.executable, "-P", "-c", "import only_here, kit"], env=child, cwd=tmp_path.parent, check=True)
    assert (child["CUDA_VISIBLE_DEVICES"], child["HF_HUB_OFFLINE"], child["OPENBLAS_NUM_THREADS"]) == ("3", "1", "7")
    assert child["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1" and "LOCAL_RANK" not in child and os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_worker_of_one_device_uses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert runtime.worker_environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    second = runtime.worker_environment("cuda:1")
    assert (second["CUDA_VISIBLE_DEVICES"], second["LOCAL_RANK"]) == ("3,4", "1")
