"""kit.vendor.site: what passes here passes at the site and at its client; what does not is refused with what to do."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.errors import BundleError, ConfigError
from kit.manifest import slug
from kit.vendor import site

PARTS = st.integers(1, 120).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total)))


@given(name=st.text(), part=PARTS)
def test_any_bundle_name_gives_a_slug_that_the_site_takes(name: str, part: tuple[int, int]) -> None:
    made = site.dataset_slug(name, part)
    assert re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", made)
    assert 6 <= len(made) <= 50
    assert made.endswith(f"-part{part[0]}") or part[1] == 1


@given(head=st.text("ab-", min_size=45, max_size=80), parts=PARTS)
def test_names_that_differ_in_what_is_cut_off_give_different_slugs(head: str, parts: tuple[int, int]) -> None:
    assert site.dataset_slug(f"a{head}-x", parts) != site.dataset_slug(f"a{head}-y", parts)


@pytest.mark.parametrize(
    ("name", "part", "made"),
    [
        ("my-run-1a2b3c4d", (1, 1), "my-run-1a2b3c4d"),
        ("my-run-1a2b3c4d", (2, 3), "my-run-1a2b3c4d-part2"),
        ("abc", (1, 1), "bundle-abc"),
        ("x" * 60 + "-1a2b3c4d", (1, 1), "x" * 41 + "-1a2b3c4d"),
        ("x" * 60 + "-1a2b3c4d", (9, 10), "x" * 34 + "-1a2b3c4d-part9"),
        ("x" * 50, (1, 1), "x" * 50),
        ("x" * 40 + "-cut-here-1a2b3c4d", (1, 1), "x" * 40 + "-1a2b3c4d"),
    ],
)
def test_slugs_keep_the_hash_and_name_the_part(name: str, part: tuple[int, int], made: str) -> None:
    assert site.dataset_slug(name, part) == made


@given(st.text(string.ascii_letters + string.digits + " -", min_size=1, max_size=60))
def test_of_a_title_that_passes_the_site_makes_the_same_slug(title: str) -> None:
    slugify = pytest.importorskip("slugify", reason="needs the publish extra")
    try:
        site.check_title(title)
    except ConfigError:
        return
    assert slugify.slugify(title) == slug(title)


@pytest.mark.parametrize("title", ["abcde", "Kit infer", "a-b c-d", "x" * 50])
def test_good_titles_pass(title: str) -> None:
    site.check_title(title)


@pytest.mark.parametrize("title", ["", "abcd", "x" * 51])
def test_a_title_too_short_or_long_is_refused(title: str) -> None:
    with pytest.raises(ConfigError, match=rf"has {len(title)} characters: the site wants 5 to 50"):
        site.check_title(title)


@pytest.mark.parametrize("title", ["é-title", "it's me", "1,000 ways", "R&D notes", "two  spaces", " lead", "tail ", "a_b_c", "a - b"])
def test_a_title_of_which_the_site_might_make_another_slug_is_refused(title: str) -> None:
    with pytest.raises(ConfigError, match="use letters and digits with single spaces or hyphens between"):
        site.check_title(title)


@given(st.from_regex(r"[a-z0-9]{1,20}(-[a-z0-9]{1,20}){0,5}", fullmatch=True), st.sampled_from(["train", "infer"]))
def test_a_notebook_of_any_competition_gets_a_title_that_passes(competition: str, name: str) -> None:
    site.check_competition(competition)
    site.check_title(site.kernel_title(competition, name))
    site.check_title(site.kernel_title(None, name))
    assert site.kernel_title(competition, name).endswith(f" {name}")


def test_a_title_is_not_cut_in_the_middle_of_a_hyphen() -> None:
    assert site.kernel_title("x" * 43 + "-exam", "infer") == "x" * 43 + " infer"


@pytest.mark.parametrize("owner", ["", "a/b", "a b", "-a", "é", "../x"])
def test_an_owner_that_is_none_is_refused(owner: str) -> None:
    with pytest.raises(ConfigError, match=r"is no user name of the site: give yours, or your organisation's, with --owner"):
        site.check_owner(owner)


@pytest.mark.parametrize("owner", ["me", "Cornell-University", "a1_b"])
def test_owners_pass(owner: str) -> None:
    site.check_owner(owner)


def test_an_unknown_licence_is_refused_with_the_nearest() -> None:
    site.check_licence("apache-2.0")
    with pytest.raises(ConfigError, match=r"licence 'apache2' is unknown to the site \(did you mean 'apache-2.0'\?\)"):
        site.check_licence("apache2")


@pytest.mark.parametrize(("name", "known"), [("cc-by-4.0", "CC-BY-4.0"), ("Apache-2.0", "apache-2.0"), ("mit", "other"), ("", "other"), ("unknown", "unknown")])
def test_a_licence_is_given_in_the_sites_words(name: str, known: str) -> None:
    assert site.known_licence(name) == known


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NvidiaTeslaP100", "is retired: use NvidiaTeslaT4"),
        ("TpuV38", "is retired: use TpuV5E8"),
        ("Tpu1VmV38", "is retired: use TpuV5E8"),
        ("TpuV2256", "is retired: use none, the CPU"),
        ("NvidiaT4", r"is unknown to the site \(did you mean 'Nvidia(TeslaT4|L4)'\?\)"),
    ],
)
def test_an_accelerator_that_is_not_offered_is_refused_with_another(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"accelerator '{name}' {said}"):
        site.check_accelerator(name)


@pytest.mark.parametrize("name", site.ACCELERATORS)
def test_every_accelerator_on_offer_passes(name: str) -> None:
    site.check_accelerator(name)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "kit-0.1.0-py3-none-any.whl", "fold0--config.json", "passages.arrow", "a_b.npy"])
def test_good_file_names_pass(name: str) -> None:
    site.check_file_name(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("naïve.txt", "refuses names with other characters"), ("a b", "refuses names with other characters"), ("a+cpu.whl", "other characters"),
        ("a@b", "other characters"), ("x.zip", "would unpack"), ("x.tar.gz", "would unpack"), ("X.TGZ", "would unpack"), ("x.csv.gz", "would unpack"),
        ("dataset-metadata.json", "does not upload"), ("dataset-cover-image.png", "does not upload"), ("model-metadata.json", "does not upload"),
    ],
)  # fmt: skip
def test_a_file_that_would_not_arrive_as_it_is_is_refused(name: str, said: str) -> None:
    with pytest.raises(BundleError, match=rf"file {re.escape(name)}: the site.* {said}"):
        site.check_file_name(name)
