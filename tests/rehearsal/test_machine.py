"""kit.rehearsal.machine: what is decided about values that this machine does not have. The checks themselves are tried in test_doctor.py."""

from __future__ import annotations

import pytest

from kit import runtime
from kit.rehearsal.machine import has_kernels, judge_disk, judge_gpu, judge_start

KAGGLE_ARCHS = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((7, 5), KAGGLE_ARCHS, True),
        ((6, 0), KAGGLE_ARCHS, False),
        ((8, 9), KAGGLE_ARCHS, True),  # L4: code for sm_86 runs on it
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_86",), False),
        ((12, 1), ("sm_120",), True),
        ((10, 0), ("sm_90", "compute_90"), True),
        ((7, 5), ("compute_80",), False),
        ((8, 0), ("compute_75",), True),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a", "compute_90a"), False),
        ((7, 5), (), False),
    ],
)
def test_kernels_fit_a_gpu_by_the_rules_of_cuda(capability: tuple[int, int], archs: tuple[str, ...], fits: bool) -> None:
    assert has_kernels(capability, archs) is fits


def test_a_p100_is_refused_in_favour_of_a_t4() -> None:
    p100 = judge_gpu(runtime.Gpu("Tesla P100-PCIE-16GB", (6, 0), 16_000_000_000, 17_000_000_000), KAGGLE_ARCHS)
    assert p100.level == "error" and "sm_60" in p100.what and "only for sm_70 sm_75" in p100.what and "choose T4" in p100.todo
    t4 = judge_gpu(runtime.Gpu("Tesla T4", (7, 5), 15_000_000_000, 16_106_127_360), KAGGLE_ARCHS)
    assert t4 == ("ok", "Tesla T4, sm_75, 15.0 GB of 16.1 GB free", "")


def test_little_disk_is_a_warning_and_very_little_an_error() -> None:
    assert [judge_disk("/tmp", free).level for free in (6 * 10**9, 3 * 10**9, 10**9)] == ["ok", "warning", "error"]
    assert judge_disk("/tmp", 10**9).what == "/tmp: only 1.0 GB free"


def test_a_slow_start_is_a_warning_unless_the_session_is_interactive() -> None:
    assert [judge_start(seconds, interactive=False).level for seconds in (60, 3600)] == ["ok", "warning"]
    assert judge_start(3600, interactive=True).level == "ok"
    assert "8.50 h of nine are left" in judge_start(1800, interactive=False).what
