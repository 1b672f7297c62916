"""kit.training.memory: what a process frees stays with it for a while."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from kit.training.memory import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
_SIZE = 64 << 20  # bytes


def faults() -> float:
    """Pages the system had to give for a large block that fits where another one was, as a share of its pages."""
    torch.empty(_SIZE + _SIZE // 8, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(_SIZE, dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / _SIZE


def test_inside_a_freed_block_is_used_again_and_afterwards_given_back() -> None:
    with kept_memory():
        assert faults() < 0.01
    assert faults() > 0.9


def test_an_error_inside_ends_it_too() -> None:
    with pytest.raises(KeyError), kept_memory():
        raise KeyError
    assert faults() > 0.9
