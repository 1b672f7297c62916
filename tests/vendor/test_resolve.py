"""kit.vendor.resolve: uv and pip bring what an image lacks, nothing it has, and nothing that only it should have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from kit import manifest, runtime
from kit.errors import ConfigError, DependencyError
from kit.vendor.profile import Package, Profile
from kit.vendor.resolve import Index, Tools, last_error, matches, tool
from tests.tiny_wheels import make_image, write_requirements, write_sdist, write_wheel


class Shop:
    """An index of tiny wheels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.links = folder / "index"
        self.links.mkdir()
        self.made = 0

    def tools(self, image: Profile) -> Tools:
        self.made += 1
        return Tools(image, Index((self.links,), no_index=True), self.folder / f"work{self.made}")

    def delta(self, image: Profile, *lines: str, allowed: Iterable[str] = (), preferred: dict[str, str] | None = None) -> dict[str, str]:
        return self.tools(image).delta(write_requirements(self.folder / "wanted.in", *lines), set(allowed), preferred)

    def file(self, image: Profile, name: str, version: str = "1.0") -> str:
        """The wheel that is chosen for an image."""
        return self.tools(image).locate({name: version})[0].source


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_the_delta_is_what_the_image_lacks(shop: Shop) -> None:
    write_wheel(shop.links, "tiny-app", requires=["tiny-base>=1", "tiny-more"])
    write_wheel(shop.links, "tiny-base", "2.0")
    write_wheel(shop.links, "tiny-more", "3.0")
    assert shop.delta(make_image(tiny_base="1.5"), "tiny-app") == {"tiny-app": "1.0", "tiny-more": "3.0"}
    assert shop.delta(make_image(), "tiny-app") == {"tiny-app": "1.0", "tiny-base": "2.0", "tiny-more": "3.0"}
    assert shop.delta(make_image(tiny_app="1.0"), "tiny-app") == {}


def test_a_build_that_is_on_no_index_counts_as_installed(shop: Shop) -> None:
    write_wheel(shop.links, "tiny-app", requires=["torch<3,>=2.4"])
    write_wheel(shop.links, "torch", "2.9.9", requires=["nvidia-everything"])
    assert shop.delta(make_image(torch="2.10.0+cu128"), "tiny-app") == {"tiny-app": "1.0"}


def test_requirements_of_packages_in_the_image_are_known(shop: Shop) -> None:
    """The image's tiny-base forbids a newer tiny-more, so the older one is brought."""
    write_wheel(shop.links, "tiny-app", requires=["tiny-base", "tiny-more"])
    for version in ("1.0", "2.0"):
        write_wheel(shop.links, "tiny-more", version)
    image = make_image(tiny_base=Package(version="1.0", requires=("tiny-more<2",)))
    assert shop.delta(image, "tiny-app") == {"tiny-app": "1.0", "tiny-more": "1.0"}


def test_a_requirement_that_the_image_forbids_is_refused_in_one_line(shop: Shop) -> None:
    write_wheel(shop.links, "tiny-base", "2.0")
    with pytest.raises(ConfigError) as caught:
        shop.delta(make_image("kaggle-like", tiny_base="1.0"), "tiny-base>=2")
    message = str(caught.value)
    assert message.startswith("wanted.in cannot be met on profile 'kaggle-like' (Python 3.12): No solution found when resolving dependencies: Because ")
    assert "tiny-base==1.0" in message and "--allow NAME" in message and "\n" not in message


def test_a_package_of_the_image_changes_only_if_allowed_by_name(shop: Shop) -> None:
    write_wheel(shop.links, "tiny-app", requires=["tiny-base>=2"])
    write_wheel(shop.links, "tiny-base", "2.0", requires=["tiny-other>=2"])
    write_wheel(shop.links, "tiny-other", "2.0")
    image = make_image(tiny_base="1.0", tiny_other="1.0")
    with pytest.raises(ConfigError, match="tiny-other==1.0"):
        shop.delta(image, "tiny-app", allowed=["tiny-base"])
    both = shop.delta(image, "tiny-app", allowed=["tiny-base", "tiny-other"])
    assert both == {"tiny-app": "1.0", "tiny-base": "2.0", "tiny-other": "2.0"}
    assert shop.delta(make_image(tiny_base="2.0"), "tiny-app", allowed=["tiny-base"]) == {"tiny-app": "1.0"}, "what fits stays"


@pytest.mark.parametrize("name", ["torch", "triton", "nvidia-cublas-cu12", "cuda-bindings", "numpy", "protobuf", "tensorflow-io", "jaxlib"])
def test_what_only_the_image_should_bring_is_refused_unless_allowed_by_name(shop: Shop, name: str) -> None:
    write_wheel(shop.links, "tiny-app", requires=[name])
    write_wheel(shop.links, name, "9.0")
    image = make_image(without=[name])
    with pytest.raises(ConfigError, match=f"profile 'image': {name} 9.0 would be installed, .* or --allow {name}$"):
        shop.delta(image, "tiny-app")
    assert name in shop.delta(image, "tiny-app", allowed=[name]) and name in shop.delta(image, "tiny-app", allowed=[f"{name[:-1]}*"])


def test_a_name_is_guarded_whole() -> None:
    assert not any(matches(name, ("torch", "numpy", "cuda-*")) for name in ("torchmetrics", "numpydoc", "cudart", "my-cuda-x"))


def test_wheels_are_chosen_for_the_image_and_not_for_this_machine(shop: Shop) -> None:
    for tag in ("cp312-cp312-manylinux_2_28_x86_64", "cp312-cp312-manylinux_2_39_x86_64", "cp313-cp313-manylinux_2_28_x86_64", "py3-none-any"):
        write_wheel(shop.links, "tiny-fast", tag=tag)
    write_wheel(shop.links, "tiny-abi", tag="cp310-abi3-manylinux_2_17_x86_64")
    assert shop.file(make_image(), "tiny-fast") == "tiny_fast-1.0-cp312-cp312-manylinux_2_28_x86_64.whl"
    assert shop.file(make_image(glibc="2.39"), "tiny-fast") == "tiny_fast-1.0-cp312-cp312-manylinux_2_39_x86_64.whl"
    assert shop.file(make_image(python="3.13.5"), "tiny-fast") == "tiny_fast-1.0-cp313-cp313-manylinux_2_28_x86_64.whl"
    assert shop.file(make_image(python="3.11.2"), "tiny-fast") == "tiny_fast-1.0-py3-none-any.whl"
    assert shop.file(make_image(), "tiny-abi") == shop.file(make_image(python="3.14.0"), "tiny-abi")


def test_a_package_without_a_wheel_for_the_image_is_refused(shop: Shop) -> None:
    write_wheel(shop.links, "tiny-old", tag="cp39-cp39-manylinux_2_17_x86_64")
    with pytest.raises(ConfigError, match=r"tiny-old.* no wheels with a matching Python ABI tag"):
        shop.delta(make_image(), "tiny-old")


def test_an_earlier_images_version_is_taken_where_it_can_be(shop: Shop) -> None:
    for version in ("1.0", "2.0"):
        write_wheel(shop.links, "tiny-app", version)
    assert shop.delta(make_image(), "tiny-app") == {"tiny-app": "2.0"}
    assert shop.delta(make_image(), "tiny-app", preferred={"tiny-app": "1.0"}) == {"tiny-app": "1.0"}
    assert shop.delta(make_image(), "tiny-app>1", preferred={"tiny-app": "1.0"}) == {"tiny-app": "2.0"}


def test_pure_python_without_a_wheel_is_built_the_same_twice(shop: Shop, tmp_path: Path) -> None:
    write_sdist(shop.links, "tiny-source")
    tools = shop.tools(make_image())
    (found,) = tools.locate(tools.delta(write_requirements(tmp_path / "in.txt", "tiny-source")))
    assert (found.name, found.source) == ("tiny-source", "built from tiny_source-1.0.tar.gz")
    (tmp_path / "wheels").mkdir()
    tools.download([found], tmp_path / "wheels")
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name == "tiny_source-1.0-py3-none-any.whl" and manifest.sha256(wheel) == found.sha256


@pytest.mark.parametrize(
    ("tag", "is_stable", "words"),
    [
        ("cp312-cp312-linux_x86_64", True, "gives tiny_source-1.0-cp312-cp312-linux_x86_64.whl, which fits this machine only"),
        ("py3-none-any", False, "two builds of its source differ"),
    ],
)
def test_a_source_that_builds_to_anything_else_is_refused(shop: Shop, tag: str, is_stable: bool, words: str) -> None:
    write_sdist(shop.links, "tiny-source", tag=tag, is_stable=is_stable)
    with pytest.raises(ConfigError, match=rf"^tiny-source 1.0 has no wheel for profile 'image', and .*{words}.* give --find-links$"):
        shop.tools(make_image()).locate({"tiny-source": "1.0"})


def test_settings_of_the_users_pip_and_uv_do_not_leak_in(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(shop.links, "tiny-app", "1.0")
    other = write_wheel(tmp_path / "other", "tiny-app", "2.0").parent
    for file, text in {"pip/pip.conf": "[global]\ntimeout = nonsense\n", "uv/uv.toml": "nonsense = 1\n"}.items():
        (tmp_path / "config" / file).parent.mkdir(parents=True)
        (tmp_path / "config" / file).write_text(text)
    for name, value in {"PIP_FIND_LINKS": other, "UV_FIND_LINKS": other, "XDG_CONFIG_HOME": tmp_path / "config", "UV_PRERELEASE": "nonsense"}.items():
        monkeypatch.setenv(name, str(value))
    tools = shop.tools(make_image())
    delta = tools.delta(write_requirements(tmp_path / "in.txt", "tiny-app"))
    assert delta == {"tiny-app": "1.0"}
    (tmp_path / "wheels").mkdir()
    tools.download(tools.locate(delta), tmp_path / "wheels")
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["tiny_app-1.0-py3-none-any.whl"]


def test_a_wheel_that_changes_between_choice_and_download_is_refused(shop: Shop, tmp_path: Path) -> None:
    write_wheel(shop.links, "tiny-app")
    tools = shop.tools(make_image())
    chosen = tools.locate({"tiny-app": "1.0"})
    write_wheel(shop.links, "tiny-app", code="changed = True")
    with pytest.raises(ConfigError, match=r"^wheels for profile 'image' cannot be downloaded: .*DO NOT MATCH THE HASHES"):
        tools.download(chosen, tmp_path)


def test_a_clean_environment_keeps_certificates_and_one_index_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "PIP_CERT": "ca.pem", "SSL_CERT_FILE": "ca.pem", "PIP_INDEX_URL": "https://mirror.example/simple", "PIP_EXTRA_INDEX_URL": "https://other.example",
        "UV_EXTRA_INDEX_URL": "https://other.example", "PIP_USER": "1", "PYTHONPATH": "src", "KAGGLE_KEY": "secret", "HF_TOKEN": "secret", "NO_PROXY": "*",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    online, offline = runtime.clean_environment(network=True), runtime.clean_environment()
    assert {name: online.get(name) for name in given} == {
        **dict.fromkeys(given), **{name: given[name] for name in ("PIP_CERT", "SSL_CERT_FILE", "PIP_INDEX_URL", "NO_PROXY")},
    }  # fmt: skip
    assert online["UV_DEFAULT_INDEX"] == given["PIP_INDEX_URL"], "uv and pip look in the same place"
    assert {name: offline.get(name) for name in given} == {**dict.fromkeys(given), "PIP_CERT": "ca.pem", "SSL_CERT_FILE": "ca.pem"}
    assert offline["HTTPS_PROXY"] == "http://127.0.0.1:9" and offline["PIP_NO_INDEX"] == "1" and offline["HF_HUB_OFFLINE"] == "1"


def test_a_missing_tool_is_named_with_its_pip_command() -> None:
    with pytest.raises(DependencyError, match="no-such-tool is not installed, .*: pip install no-such-tool$"):
        tool("no-such-tool")


@pytest.mark.parametrize(
    ("text", "line"),
    [("", "no output"), ("a\nERROR: first\nERROR: it broke\nwarning: old pip\n", "it broke"), ("Traceback\n  x\nValueError: 3\n", "ValueError: 3")],
)
def test_the_line_that_says_what_was_wrong_is_found(text: str, line: str) -> None:
    assert last_error(text) == line
