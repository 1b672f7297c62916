"""Looks at machine, mounts and installation before any budget is spent. Owns what can be wrong with mounts and installation (of the
machine: machine.py), and the way out of each.

Never raises: a check that itself fails becomes a warning naming it. Changes nothing, connects to nothing, and scores nothing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kit
from kit import assemble, manifest, paths, runtime
from kit.config import Recipe
from kit.data.competition import SAMPLE, find_test, named_in, sample_beside
from kit.data.tables import Table, read_table
from kit.errors import DataError, KitError
from kit.manifest import Manifest
from kit.rehearsal import machine
from kit.rehearsal.findings import Finding, Findings, Said, one_line
from kit.vendor.profile import Profile
from kit.vendor.wheels import DISTRIBUTION, LOCK

_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib"}
_HASHED_AT_MOST = 3_000_000_000  # bytes, a few seconds; what is larger is left to inference, which hashes everything


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
            findings.append(Finding("warning", name, f"could not be checked: {type(error).__name__}: {one_line(error)}", "look at it by hand"))
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
    def weights(self) -> dict[str, int]:
        """Bytes of weights by member/fit."""
        return {f"{member.name}/{fit}": size for member in self.members for fit, size in _weights(member).items()}

    @property
    def fault(self) -> str:
        """Level of what is wrong on the competition machine, but may be so on a workstation."""
        return "error" if runtime.on_competition_machine() else "warning"

    def version(self, name: str) -> str | None:
        """Version of an installed package; None if it is not installed."""
        package = self.image.packages.get(canonicalize_name(name))
        return package.version if package else None


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
        path = find_test(site.root, named_in(member.locate("recipe.toml") for member in site.members))
    except DataError as error:
        yield Said(site.fault, str(error), "attach the competition under “Add input”")
        return
    test = read_table(path, ids=None)
    yield Said("ok", f"{test.source}: {len(test.frame)} rows, columns {', '.join(test.frame)}")
    names = []
    for member in site.members:
        try:
            names.append(_read_as(member, path))
        except KitError as error:
            yield Said("error", f"{member.name} cannot read the test set: {error}", "attach the competition that this member was trained for")
    if sample := sample_beside(path):
        known = read_table(sample, ids=None)
        yield judge_sample(known, test, next(iter(names), str(known.frame.columns[0])))
    else:
        yield Said("ok", f"no {SAMPLE}: rows go in the order of {path.name}")


def judge_sample(sample: Table, test: Table, column: str) -> Said:
    """Whether a sample submission has the ids of the test set. column: the one that holds them."""
    first, other = (Path(table.source).name for table in (sample, test))
    for table in (sample, test):
        if column not in table.frame:
            what = f"{table.source} has no column {column!r} (columns: {', '.join(table.frame)}): rows go in the order of {other}"
            return Said("warning", what, "compare both files, unless they are the site's own")
    ids, known = sample.frame[column].tolist(), test.frame[column].tolist()
    if different := sorted(set(ids) ^ set(known)):
        what = f"{sample.source} and {other} differ in {len(different)} ids, the first {different[0]!r}"
        return Said("warning", f"{what}: rows go in the order of {other}", "compare both files, unless they are the site's own")
    return Said("ok", f"{first} has the ids of {other}, in {'the same' if ids == known else 'another'} order")


def _read_as(member: Manifest, test: Path) -> str:
    """Read a test set as inference does; gives the column of its ids. Raises ConfigError, DataError."""
    task = assemble.make_task(_recipe(member))
    task.read(read_table(test, ids=task.id_column))
    return task.id_column


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
    names = site.image.closure([DISTRIBUTION, *machine.LIBRARIES, *locked])
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
    index, base, fits = member.meta.get("index"), None, list(_weights(member))
    if why := _refusal(_check_recipe, member):
        yield Said("error", f"{member.name}: {why}", again)
    else:
        base = base_of(member)
        if fits and (why := _refusal(_load_tokens, member, fits[0])):
            yield Said("error", f"{member.name}/{fits[0]}: {why}", again)
    for what, name in (("index", index), ("base", base)):
        if name and name not in site.bundles:
            yield Said("error", f"{member.name}: its {what} {name} is not mounted (bundles: {', '.join(site.bundles)})", f"attach the dataset {name}")
    if not fits:
        yield Said("error", f"{member.name}: its manifest names no fit", again)
    for fit in fits:
        yield from _weight_faults(member, fit)


def _weight_faults(member: Manifest, fit: str) -> Iterator[Said]:
    """Weights of a fit that are not there, or whose header does not fit the file."""
    names = _weight_files(member, fit)
    if not names and f"{fit}/base.json" not in member.files:  # with which all its weights are its base's
        yield Said("error", f"{member.name}/{fit}: no *.safetensors", "pack the run again, and upload it")
    for name in names:
        try:
            with safe_open(member.locate(name), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            yield Said("error", f"{member.name}/{name} cannot be read as weights: {one_line(error)}", "upload the dataset again")


def _adapters(site: Site) -> Iterator[Said]:
    """Whether the bundle that each adapter beside the members names as its base is mounted: without it, the hub would be asked."""
    for bundle in [bundle for bundle in site.bundles.values() if bundle.kind != "member"]:
        for name in [name for name in bundle.files if PurePosixPath(name).name == "adapter_config.json"]:
            base = json.loads(bundle.locate(name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base in site.bundles:
                yield Said("ok", f"{bundle.name}/{name}: its base model {base} is mounted")
            else:
                what = f"{bundle.name}/{name}: its base model {base!r} is no mounted bundle (bundles: {', '.join(site.bundles)})"
                yield Said("error", what, "attach the dataset of the base model; if it has another name, pack the adapter again: kit vendor weights")


def base_of(member: Manifest) -> str | None:
    """Name of the bundle with the weights that a member's fits are scored on; None where they hold their own. Raises BundleError, ConfigError."""
    return assemble.base_name(_recipe(member))


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


def _size(bundle: Manifest) -> int:
    return sum(size for _, size in bundle.files.values())


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


CHECKS: dict[str, Callable[[Site], Iterator[Said]]] = {
    "software": lambda site: machine.software(site.image),
    "run": lambda _: machine.kind_of_run(),
    "gpu": lambda site: machine.gpus(site.image),
    "memory": lambda site: machine.memory(site.weights),
    "disk": lambda site: machine.disk(site.working),
    "clock": lambda _: machine.clock(),
    "offline": lambda site: machine.offline(site.fault),
    "mounts": _mounts,
    "integrity": _integrity,
    "competition": _competition,
    "locks": _locks,
    "requirements": _requirements,
    "members": _members,
    "adapters": _adapters,
}
"""Every check by the name its findings carry, in the order they are shown. A new one is a function, and a line here."""
