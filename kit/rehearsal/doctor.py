"""Looks at machine, mounts and installation before any budget is spent. Owns what can be wrong there, and the way out of each.

Never raises: a check that itself fails becomes a warning naming it. Changes nothing, connects to nothing, and scores nothing.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kit
from kit import assemble, manifest, paths, runtime
from kit.budget import NINE_HOURS_S, seconds_since_process_start
from kit.config import Recipe
from kit.data.tables import Table, read_table
from kit.errors import DataError, KitError
from kit.manifest import Manifest
from kit.vendor.profile import Profile
from kit.vendor.wheels import LOCK

DISTRIBUTION = "submission-kit"
"""What the kit is called where it is installed."""
_SHOWN = ("torch", "transformers", "tokenizers", "numpy", "pandas")
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"}
_HASHED_AT_MOST = 3_000_000_000  # bytes, a few seconds; what is larger is left to inference, which hashes everything
_DISK_NEEDED, _DISK_WISHED = 2_000_000_000, 5_000_000_000  # bytes
_SLOW_START_S = 900.0  # an installation takes a minute: so long a start waits for something
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


class Finding(NamedTuple):
    """level: "ok", "warning" or "error". check: short name. what: one line with the values. todo: the way out, "" when ok."""

    level: str
    check: str
    what: str
    todo: str = ""


class Findings(list[Finding]):
    """Findings that a notebook shows as a table, and a terminal as lines."""

    def __str__(self) -> str:
        width = max((len(found.check) for found in self), default=0)
        return "\n".join(f"{_MARKS[level]} {check:<{width}}  {what}{todo and ' → '}{todo}" for level, check, what, todo in self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in found) for found in self]
        return f"<table><tr><th>{'</th><th>'.join(Finding._fields)}</th></tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


class Said(NamedTuple):
    """A finding that does not know yet which check it is of."""

    level: str
    what: str
    todo: str = ""


def doctor(root: Path | None = None, *, full: bool = True) -> Findings:
    """What `examine` finds, to be shown by a notebook's first cell after installation."""
    return Findings(examine(root, full=full))


def examine(root: Path | None = None, *, working: Path | None = None, full: bool = True) -> list[Finding]:
    """Everything that can be known before a run, in seconds: at least one finding per check that has something to look at.

    root: where bundles and the competition are mounted, by default as for inference. working: where the submission goes, by default here.
    full: hash the files of the bundles, up to 3 GB, the smallest first; otherwise only their sizes are compared.
    """
    site = Site(Path(root or runtime.input_root()), Path(working or Path.cwd()), full)
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            for said in check(site):
                findings.append(Finding(said.level, name, said.what, said.todo))  # noqa: PERF401  # what was said before an error counts
        except KitError as error:
            findings.append(Finding("error", name, str(error), "do as the message says"))
        except Exception as error:  # a look before the flight must not cost the flight
            findings.append(Finding("warning", name, f"could not be checked: {type(error).__name__}: {_one_line(error)}", "look at it by hand"))
    return findings


@dataclass(frozen=True)
class Site:
    """root: the mounts. working: where the submission goes. full: whether files are hashed."""

    root: Path
    working: Path
    full: bool

    @cached_property
    def bundles(self) -> dict[str, Manifest]:
        """Manifests of the mounted bundles by name."""
        return {name: manifest.read(folder) for name, folder in sorted(paths.find_bundles(self.root).items())}

    @cached_property
    def image(self) -> Profile:
        """What is installed here."""
        return Profile.capture()

    @cached_property
    def locks(self) -> dict[Path, list[Requirement]]:
        """The mounted locks, and what each of them pins on this interpreter."""
        return {path: read_lock(path) for path in sorted(self.root.rglob(LOCK))}

    @property
    def members(self) -> list[Manifest]:
        """The mounted member bundles."""
        return [bundle for bundle in self.bundles.values() if bundle.kind == "member"]

    @property
    def fault(self) -> str:
        """Level of what is wrong on the competition machine, but may be so on a workstation."""
        return "error" if runtime.on_competition_machine() else "warning"

    def version(self, name: str) -> str | None:
        """Version of an installed package; None if it is not installed."""
        package = self.image.packages.get(canonicalize_name(name))
        return package.version if package else None


# --- the machine -----------------------------------------------------------------------------------------------------------------


def _software(site: Site) -> Iterator[Said]:
    versions = ", ".join(f"{name} {site.version(name) or 'absent'}" for name in _SHOWN)
    yield Said("ok", f"kit {kit.__version__}, Python {site.image.python}, {site.image.machine}, glibc {site.image.glibc or 'none'}, {versions}")


def _run(site: Site) -> Iterator[Said]:
    if runtime.is_rerun():
        yield Said("ok", "the hidden rerun, the execution that counts")
    elif runtime.on_competition_machine():
        yield Said("ok", f"the competition machine, run type {runtime.run_type()}; not the hidden rerun")
    else:
        yield Said("ok", "not the competition machine")


def _gpu(site: Site) -> Iterator[Said]:
    gpus = runtime.gpus()
    archs = site.image.torch.archs if site.image.torch else ()
    yield from (judge_gpu(gpu, archs) for gpu in gpus)
    if len(gpus) > 1:
        yield Said("ok", f"{len(gpus)} GPUs")
    elif not gpus and runtime.on_competition_machine():
        yield Said("warning", "no GPU: everything runs on the CPU", "choose the accelerator GPU T4 ×2 in the notebook's settings, unless every member is small")
    for device in [f"cuda:{number}" for number in range(len(gpus))] or ["cpu"]:
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
        return Said("error", f"{what} fail: {_one_line(error)}", way_out)


def _memory(site: Site) -> Iterator[Said]:
    ram = psutil.virtual_memory()
    sizes = {f"{member.name}/{fit}": size for member in site.members for fit, size in _weights(member).items()}
    largest, needed = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    of_largest = f"weights of the largest fit, {largest}: {_gb(needed)}" if sizes else "no weights are mounted"
    what = f"{_gb(ram.available)} of {_gb(ram.total)} RAM free, {os.cpu_count()} CPUs, {of_largest}"
    if ram.available < 2 * needed:
        yield Said("warning", f"{what}, and loading takes up to twice that", "close other sessions, or leave this member out")
    else:
        yield Said("ok", what)
    for gpu in runtime.gpus():
        if gpu.free < needed:
            yield Said("warning", f"{_gb(gpu.free)} free on {gpu.name}, {of_largest}", "restart the session, or leave this member out")


def _disk(site: Site) -> Iterator[Said]:
    for name, folder in {"working": site.working, "temporary": Path(tempfile.gettempdir())}.items():
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


def _clock(site: Site) -> Iterator[Said]:
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


def _offline(site: Site) -> Iterator[Said]:
    if missing := runtime.open_switches():
        yield Said(site.fault, f"offline switches not set: {', '.join(missing)}", "import kit before transformers, datasets and huggingface_hub")
    else:
        yield Said("ok", "every offline switch is set")


# --- the mounts ------------------------------------------------------------------------------------------------------------------


def _mounts(site: Site) -> Iterator[Said]:
    if site.bundles:
        layout = "datasets/<owner>/<slug>" if (site.root / "datasets").is_dir() else "<slug>"
        listed = ", ".join(f"{name} ({bundle.kind}, {_mb(_size(bundle))})" for name, bundle in site.bundles.items())
        yield Said("ok", f"{len(site.bundles)} bundles below {site.root}, layout {layout}: {listed}")
    else:
        there = ", ".join(sorted(entry.name for entry in site.root.iterdir())) if site.root.is_dir() else "no such folder"
        yield Said(site.fault, f"no bundle below {site.root} (there: {there or 'nothing'})", "attach the datasets that `kit push` made")
    for path in sorted(site.root.rglob(manifest.FILE)):
        if why := _refusal(manifest.read, path.parent):
            yield Said("error", why, "upload that dataset again, or detach it if it is none of the kit's")
    for bundle in site.bundles.values():
        pickles = [name for name in bundle.files if PurePosixPath(name).suffix in _PICKLES]
        if pickles:
            yield Said("error", f"{bundle.name}: {len(pickles)} pickles, which run code when read, the first {pickles[0]}", "convert them: kit vendor weights")


def _integrity(site: Site) -> Iterator[Said]:
    """Sizes of all files, and the hashes of as many as can be had in seconds."""
    refusals = {name: _refusal(manifest.verify, bundle.root, full=False) for name, bundle in site.bundles.items()}
    yield from (Said("error", why, "wait until the dataset is ready, or upload it again") for why in refusals.values() if why)
    files = sorted(
        (size, bundle.locate(path), digest, f"{name}/{path}")
        for name, bundle in site.bundles.items()
        if not refusals[name]
        for path, (digest, size) in bundle.files.items()
    )
    count = _affordable([size for size, *_ in files]) if site.full else 0
    begun = time.monotonic()
    found = _hash([path for _, path, *_ in files[:count]])
    seconds = time.monotonic() - begun
    damaged = [name for (*_, digest, name), hashed in zip(files, found, strict=False) if hashed != digest]
    yield from (Said("error", f"{name} is damaged: its sha256 is another than in the manifest", "upload the dataset again") for name in damaged)
    if files and not damaged:
        rest = f", {len(files) - count} files of {_mb(sum(size for size, *_ in files[count:]))} not hashed" if count < len(files) else ""
        hashed = f"{count} files of {_mb(sum(size for size, *_ in files[:count]))} hashed in {seconds:.1f} s"
        yield Said("ok", f"{len(files)} files have the sizes in their manifests; {hashed}{rest}")


def _affordable(sizes: Sequence[int]) -> int:
    """How many files, in this order, stay within the bytes to hash."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > _HASHED_AT_MOST:
            return count
    return len(sizes)


def _hash(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # hashing does not hold the interpreter
        return list(tqdm(pool.map(manifest.sha256, files), total=len(files), desc="hashing", unit="file", disable=None))


def _competition(site: Site) -> Iterator[Said]:
    try:
        folder = paths.find_competition(site.root)
    except DataError as error:
        yield Said(site.fault, str(error), "attach the competition under “Add input”")
        return
    test = read_table(folder / "test.csv")
    yield Said("ok", f"{test.source}: {len(test.frame)} rows, columns {', '.join(test.frame)}")
    for member in site.members:
        if why := _refusal(_read_as, member, test):
            yield Said("error", f"{member.name} cannot read the test set: {why}", "attach the competition that this member was trained for")
    sample = folder / "sample_submission.csv"
    yield judge_sample(read_table(sample), test) if sample.is_file() else Said("ok", "no sample_submission.csv: rows go in the order of test.csv")


def judge_sample(sample: Table, test: Table) -> Said:
    """Whether a sample submission has the ids of the test set."""
    ids, known = sample.frame["id"].tolist(), test.frame["id"].tolist()
    if different := sorted(set(ids) ^ set(known)):
        what = f"{sample.source} and test.csv differ in {len(different)} ids, the first {different[0]!r}"
        return Said("warning", f"{what}: rows go in the order of test.csv", "compare both files, unless they are the site's own")
    return Said("ok", f"sample_submission.csv has the ids of test.csv, in {'the same' if ids == known else 'another'} order")


def _read_as(member: Manifest, test: Table) -> None:
    assemble.make_task(_recipe(member)).read(test)


# --- the installation ------------------------------------------------------------------------------------------------------------


def _locks(site: Site) -> Iterator[Said]:
    for path, pins in site.locks.items():
        wrong = [f"{pin.name}{pin.specifier} (here {site.version(pin.name) or 'none'})" for pin in pins if not _holds(pin, site)]
        if wrong:
            yield Said(site.fault, f"{path}: not installed as locked: {', '.join(wrong)}", "restart the session and run the install cell first")
        else:
            yield Said("ok", f"{path}: {len(pins)} packages installed as locked")
    for bundle in site.bundles.values():
        version = bundle.meta.get("version", kit.__version__)
        if bundle.kind == "code" and version != kit.__version__:
            yield Said("warning", f"{bundle.name} holds kit {version}, but {kit.__version__} runs", "restart the session and run the install cell first")


def read_lock(path: Path) -> list[Requirement]:
    """The requirements of a lock that concern this interpreter, their hashes left out."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    plain = [re.sub(r"(^|\s)#.*|\s--hash=\S+", "", line).strip() for line in lines]
    pins = [Requirement(line) for line in plain if line and not line.startswith("-")]
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]


def _holds(pin: Requirement, site: Site) -> bool:
    version = site.version(pin.name)
    return version is not None and pin.specifier.contains(version, prereleases=True)


def _requirements(site: Site) -> Iterator[Said]:
    """Whether what the kit imports has what it requires. The rest of an image is never without a conflict."""
    locked = {canonicalize_name(pin.name) for pins in site.locks.values() for pin in pins}
    names = site.image.closure([DISTRIBUTION, *_SHOWN, *locked])
    imported = site.image.model_copy(update={"packages": {name: site.image.packages[name] for name in sorted(names)}})
    broken = imported.broken(imported.packages)
    for line in broken:
        if locked & {canonicalize_name(word) for word in re.findall(r"[\w.-]+", line)}:
            yield Said("error", line, "make the wheels again for this image: kit vendor wheels")
        else:
            yield Said("warning", line, "nothing, if it works: the image came so")
    if not broken:
        yield Said("ok", f"{len(names)} packages that the kit imports have what they require")


# --- the members -----------------------------------------------------------------------------------------------------------------


def _members(site: Site) -> Iterator[Said]:
    if not site.members:
        yield Said(site.fault, f"no member bundle below {site.root}", "attach the dataset of a trained run")
    for member in site.members:
        sizes = _weights(member)
        what = f"{member.name}: {len(sizes)} fits, {_mb(sum(sizes.values()))} of weights, index {member.meta.get('index')}"
        yield from list(_member_faults(site, member)) or [Said("ok", what)]


def _member_faults(site: Site, member: Manifest) -> Iterator[Said]:
    """Whatever would stop this member: its index, its recipe, its tokens, its weights."""
    again = "pack the run with this version of the kit, and upload it again"
    index, fits = member.meta.get("index"), list(_weights(member))
    if index and index not in site.bundles:
        yield Said("error", f"{member.name}: its index {index} is not mounted (bundles: {', '.join(site.bundles)})", f"attach the dataset {index}")
    if why := _refusal(_check_recipe, member):
        yield Said("error", f"{member.name}: {why}", again)
    elif fits and (why := _refusal(_load_tokens, member, fits[0])):
        yield Said("error", f"{member.name}/{fits[0]}: {why}", again)
    if not fits:
        yield Said("error", f"{member.name}: its manifest names no fit", again)
    for fit in fits:
        yield from _weight_faults(member, fit)


def _weight_faults(member: Manifest, fit: str) -> Iterator[Said]:
    """Weights of a fit that are not there, or whose header does not fit the file."""
    names = _weight_files(member, fit)
    if not names:
        yield Said("error", f"{member.name}/{fit}: no *.safetensors", "pack the run again, and upload it")
    for name in names:
        try:
            with safe_open(member.locate(name), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            yield Said("error", f"{member.name}/{name} cannot be read as weights: {_one_line(error)}", "upload the dataset again")


def _adapters(site: Site) -> Iterator[Said]:
    """Whether the bundle that each adapter names as its base is mounted: without it, the hub would be asked."""
    for bundle in site.bundles.values():
        for name in [name for name in bundle.files if PurePosixPath(name).name == "adapter_config.json"]:
            base = json.loads(bundle.locate(name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base in site.bundles:
                yield Said("ok", f"{bundle.name}/{name}: its base model {base} is mounted")
            else:
                what = f"{bundle.name}/{name}: its base model {base!r} is no mounted bundle (bundles: {', '.join(site.bundles)})"
                yield Said("error", what, "attach the dataset of the base model; if it has another name, pack the adapter again: kit vendor weights")


def _recipe(member: Manifest) -> Recipe:
    return Recipe.load(member.locate("recipe.toml"))


def _check_recipe(member: Manifest) -> None:
    assemble.check(_recipe(member))


def _load_tokens(member: Manifest, fit: str) -> None:
    assemble.load_tokens(_recipe(member), member.root / fit)


def _weights(member: Manifest) -> dict[str, int]:
    """Bytes of weights by fit, as the manifest says."""
    return {fit: sum(member.files[name][1] for name in _weight_files(member, fit)) for fit in member.meta.get("fits") or []}


def _weight_files(member: Manifest, fit: str) -> list[str]:
    return [name for name in member.files if name.startswith(f"{fit}/") and name.endswith(".safetensors")]


# --- words -----------------------------------------------------------------------------------------------------------------------


def _refusal(work: Callable[..., object], *arguments: object, **options: object) -> str:
    """What the kit says against doing this; empty where it does it."""
    try:
        work(*arguments, **options)
    except KitError as error:
        return str(error)
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _size(bundle: Manifest) -> int:
    return sum(size for _, size in bundle.files.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


CHECKS: dict[str, Callable[[Site], Iterator[Said]]] = {
    "software": _software,
    "run": _run,
    "gpu": _gpu,
    "memory": _memory,
    "disk": _disk,
    "clock": _clock,
    "offline": _offline,
    "mounts": _mounts,
    "integrity": _integrity,
    "competition": _competition,
    "locks": _locks,
    "requirements": _requirements,
    "members": _members,
    "adapters": _adapters,
}
"""Every check by the name its findings carry, in the order they are shown. A new one is a function here."""
