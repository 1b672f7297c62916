"""What vendoring costs, and what it saves: `python -m tests.bench.vendor`. Needs the package index.

For each shipped profile: the wheels that the image lacks (count, MB, seconds of a warm resolution, median of 5), beside what the same
requirements give without an image, and the seconds of an offline installation. Writes artifacts/bench/vendor.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.manifest import write_atomically
from kit.vendor.profile import Profile
from kit.vendor.prove import prove
from kit.vendor.resolve import Index, Tools
from kit.vendor.wheels import vendor

REQUIREMENTS = Path("wheels/requirements.in")
PROFILES = ("kaggle-py312", "kaggle-py313")
REPEATS = 5
RESULTS = Path("artifacts/bench/vendor.json")


def main() -> None:
    """Measure every profile and print one table."""
    results = {name: measure(Profile.load(name)) for name in PROFILES}
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    print(f"{'profile':<14}{'delta':>7}{'MB':>8}{'resolved s':>12}{'installed s':>13}{'without an image':>18}{'MB':>9}")
    for name, found in results.items():
        delta, whole, proof = found["delta"], found["without_image"], found["proof"]
        print(f"{name:<14}{delta['count']:>7}{delta['mb']:>8}{delta['seconds']:>12}{proof['seconds']:>13}{whole['count']:>18}{whole['mb']:>9}")


def measure(profile: Profile) -> dict[str, Any]:
    """One profile: its delta, the same without an image, the proof."""
    with tempfile.TemporaryDirectory() as temporary:
        houses = [vendor(REQUIREMENTS, [profile], Path(temporary) / "out") for _ in range(REPEATS + 1)]  # the first one warms the caches
        seconds = [round(house.seconds, 2) for house in houses[1:]]
        wheels = {wheel.name: wheel.bytes for wheel in houses[0].wheels[:-1]}
        return {
            "delta": {"count": len(wheels), "mb": megabytes(wheels), "seconds": statistics.median(seconds), "each_s": seconds, "wheels": wheels},
            "kit_mb": megabytes({"kit": houses[0].wheels[-1].bytes}),
            "without_image": without_image(profile, Path(temporary) / "whole"),
            "proof": asdict(prove(Path(temporary) / "out", profile)),
        }


def without_image(profile: Profile, work: Path) -> dict[str, Any]:
    """Everything that the requirements need on that Python; sizes as the index states them."""
    bare = Tools(profile.model_copy(update={"packages": {}}), Index(), work)
    wheels = {wheel.name: wheel.bytes or 0 for wheel in bare.locate(bare.delta(REQUIREMENTS, allowed=["*"]))}
    return {"count": len(wheels), "mb": megabytes(wheels)}


def megabytes(wheels: dict[str, int]) -> float:
    """Of all wheels, 10**6 bytes."""
    return round(sum(wheels.values()) / 1e6, 2)


if __name__ == "__main__":
    main()
