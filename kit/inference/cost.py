"""What scoring will cost before it is measured: from the size of the weights and the device. Knows no member and no clock."""

from __future__ import annotations

from kit.budget import Cost
from kit.errors import ConfigError, nearest

SPEEDS = {"cpu": 4e10, "p100": 7e12, "t4": 1.8e13, "l4": 4e13, "v100": 4e13, "a10": 4e13, "a100": 1.2e14, "h100": 3e14, "h200": 3e14}
"""FLOP/s reached when scoring, by a word of the device's name: about 30 % of the peak of dense half-precision products; a CPU of two cores."""
MEMORY = {"cpu": 30e9, "p100": 16e9, "t4": 15e9, "l4": 22e9, "v100": 16e9, "a10": 22e9, "a100": 40e9, "h100": 80e9, "h200": 140e9}
"""Bytes of memory, by the same words."""
DEVICES = {"cpu": ("cpu",), "t4": ("t4",), "t4x2": ("t4", "t4"), "p100": ("p100",), "l4": ("l4",), "l4x4": ("l4",) * 4, "a100": ("a100",), "h100": ("h100",)}
"""Machines by name: the device of each slot."""
_UNKNOWN_GPU = "t4"
_DISK = 2e8  # bytes per second that a mounted dataset gives, when first read
_START_S = 8.0  # seconds until a process that scores has imported what it needs
_SPREAD = 3.0  # factor within which these guesses are right
FETCH_S = 0.05  # seconds to retrieve the context of a row


def speed(device: str) -> float:
    """FLOP/s of a device by its name ("cpu", "cuda:0 Tesla T4", "t4")."""
    return _by_word(SPEEDS, device)


def memory(device: str) -> float:
    """Bytes of memory of a device by its name."""
    return _by_word(MEMORY, device)


def token_cost(parameters: float, device: str) -> Cost:
    """Seconds per token: two FLOP per parameter."""
    return Cost(2 * max(parameters, 1) / speed(device), _SPREAD)


def load_cost(weight_bytes: int) -> Cost:
    """Seconds until a member's first fit can score."""
    return Cost(_START_S + weight_bytes / _DISK, _SPREAD)


def read_cost(weight_bytes: int) -> Cost:
    """Seconds to read all layers of a member that streams them."""
    return Cost(weight_bytes / _DISK, _SPREAD)


def machine(name: str) -> tuple[str, ...]:
    """The slots of a named machine. Raises ConfigError."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is unknown{nearest(name, DEVICES)}")
    return DEVICES[name]


def _by_word(table: dict[str, float], device: str) -> float:
    return next((table[word] for word in device.lower().replace("-", " ").split() if word in table), table[_UNKNOWN_GPU])
