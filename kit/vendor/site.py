"""The site's rules on what is uploaded: names, titles, licences, accelerators. Its client checks them in part, and late; it does the rest silently.

Knows no folder. Source: kaggle-cli 2.2 (`dataset_create_new`, `kernels_push`, `upload_files`), its docs/datasets_metadata.md and docs/kernels.md.
"""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatch

from kit.errors import BundleError, ConfigError, nearest
from kit.manifest import slug

DATASET_METADATA = "dataset-metadata.json"
KERNEL_METADATA = "kernel-metadata.json"
LICENCES = (
    "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-IGO", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-3.0-IGO",
    "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0", "ODbL-1.0", "DbCL-1.0", "ODC-BY-1.0",
    "PDDL", "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "FDL-1.3", "apache-2.0", "US-Government-Works", "EU-ODP-Legal-Notice",
    "copyright-authors", "other", "unknown",
)  # fmt: skip
ACCELERATORS = (
    "NvidiaTeslaT4", "NvidiaTeslaT4Highmem", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000",
    "TpuV5E8", "TpuV6E8",
)  # fmt: skip
RETIRED = {
    "nvidiateslap100": "NvidiaTeslaT4",  # the image's torch has no code for its sm_60
    "tpuv38": "TpuV5E8", "tpu1vmv38": "TpuV5E8", "tpuv232": "none, the CPU", "tpuv2256": "none, the CPU",
}  # fmt: skip
LONGEST_SUBTITLE = 80  # characters; the shortest has 20
_DATASET_SLUG = (6, 50)  # characters; so for a dataset's title, which is its slug here
_KERNEL_TITLE = (5, 50)
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TITLE = re.compile(r"[A-Za-z0-9]+([ -][A-Za-z0-9]+)*")  # of these the site makes the same slug as we do
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z", "*.rar")
_NOT_SENT = (
    DATASET_METADATA, "datapackage.json", "dataset-cover-image.*", KERNEL_METADATA, "model-metadata.json", "model-instance-metadata.json",
)  # fmt: skip


def dataset_slug(name: str, part: tuple[int, int] = (1, 1)) -> str:
    """The name of a bundle's dataset: 6 to 50 characters, shortened before the hash at its end (one is added if it has none); then `-part2`.

    part: which one, counted from 1, of how many.
    """
    number, total = part
    ending = f"-part{number}" if total > 1 else ""
    room = _DATASET_SLUG[1] - (len(f"-part{total}") if total > 1 else 0)
    base = slug(name)
    if len(base) < _DATASET_SLUG[0]:
        base = f"bundle-{base}"
    if len(base) > room:
        mark = base[-8:] if re.search(r"-[0-9a-f]{8}$", base) else hashlib.sha256(base.encode()).hexdigest()[:8]
        base = f"{base[: room - 9].rstrip('-')}-{mark}"
    return base + ending


def kernel_title(competition: str | None, name: str) -> str:
    """A title that tells a notebook from those of other competitions, short enough for the site."""
    room = _KERNEL_TITLE[1] - len(name) - 1
    return f"{(competition or 'submission-kit')[:room].rstrip('-')} {name}"


def known_licence(name: str) -> str:
    """The site's name of a licence, or "other"."""
    return {known.lower(): known for known in LICENCES}.get(name.lower(), "other")


def check_owner(owner: str) -> None:
    """Refuse what cannot be a user name. Raises ConfigError."""
    if not _OWNER.fullmatch(owner):
        raise ConfigError(f"owner {owner!r} is no user name of the site: give yours, or your organisation's, with --owner, as in kaggle.com/NAME")


def check_licence(name: str) -> None:
    """Refuse a licence that the site does not have. Raises ConfigError."""
    if name not in LICENCES:
        raise ConfigError(f"licence {name!r} is unknown to the site{nearest(name, LICENCES)}")


def check_competition(name: str) -> None:
    """Refuse what is no slug. Raises ConfigError."""
    if not _SLUG.fullmatch(name):
        raise ConfigError(f"competition {name!r} is no slug: give the last part of its address, e.g. kaggle-llm-science-exam")


def check_title(title: str) -> None:
    """Refuse a notebook's title that is too short or long, or of which the site would make another slug. Raises ConfigError."""
    shortest, longest = _KERNEL_TITLE
    if not shortest <= len(title) <= longest:
        raise ConfigError(f"title {title!r} has {len(title)} characters: the site wants {shortest} to {longest}")
    if not _TITLE.fullmatch(title):
        raise ConfigError(f"title {title!r}: use letters and digits with single spaces or hyphens between, so that the site makes the same slug of it")


def check_accelerator(name: str) -> None:
    """Refuse an accelerator that the site does not offer, or no longer. Raises ConfigError naming another."""
    if name.lower() in RETIRED:
        raise ConfigError(f"accelerator {name!r} is retired: use {RETIRED[name.lower()]}")
    if name not in ACCELERATORS:
        raise ConfigError(f"accelerator {name!r} is unknown to the site{nearest(name, ACCELERATORS)}")


def check_file_name(name: str) -> None:
    """Refuse a file that the site would not take, would unpack, or that its client would not send. Raises BundleError."""
    if not _FILE_NAME.fullmatch(name):
        raise BundleError(f"file {name}: the site refuses names with other characters than A-Z a-z 0-9 . _ -: rename it and pack again")
    if any(fnmatch(name.lower(), pattern) for pattern in _ARCHIVES):
        raise BundleError(f"file {name}: the site would unpack this archive, and it would be missing: pack what is inside instead")
    if any(fnmatch(name, pattern) for pattern in _NOT_SENT):
        raise BundleError(f"file {name}: the site's client does not upload files of this name: rename it and pack again")
