"""kit.inference.member: what a bundle says of itself, and what members' OOF predictions make of them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kit import manifest
from kit.errors import BundleError, KitError
from kit.inference.blend import Blend
from kit.inference.member import Member, weigh
from kit.metrics import map_at_k
from tests import packed

ROWS = 90
TARGETS = np.random.default_rng(7).integers(5, size=ROWS)


def member(folder: Path, name: str = "member", **options: Any) -> Member:
    return Member.open(manifest.read(packed.write_member(folder, name, **options)))


def members(folder: Path, *predictions: np.ndarray, **options: Any) -> list[Member]:
    """Members with these OOF predictions: a, b, c …"""
    made = []
    for name, prediction in zip("abc", predictions, strict=False):
        root = packed.write_member(folder, name)
        packed.write_oof(root, TARGETS, prediction, **options)
        made.append(Member.open(manifest.read(root)))
    return made


def guesses(seed: int) -> np.ndarray:
    """Probabilities that know nothing."""
    return np.random.default_rng(seed).dirichlet(np.full(5, 20.0), size=ROWS)


def expert(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Probabilities of one who knows the answers to these rows (a mask), and guesses at the others."""
    return np.where(rows[:, None], 0.9 * np.eye(5)[TARGETS] + 0.1 * guesses(seed), guesses(seed))


def share(number: int, of: int) -> np.ndarray:
    return np.arange(ROWS) % of == number


# --- one member ------------------------------------------------------------------------------------------------------------------


def test_a_member_is_what_its_bundle_says(tmp_path: Path) -> None:
    root = packed.write_member(tmp_path, "member", fits=["fold0", "fold1", "fold2"], index="passages")
    opened = Member.open(manifest.read(root))
    assert (opened.folder, opened.name, opened.fits, opened.index) == (root, "member", ("fold0", "fold1", "fold2"), "passages")
    assert opened.recipe.model.kind == "encoder"
    assert opened.task.max_length == 64
    assert opened.bytes == packed.WEIGHTS
    assert opened.digest == manifest.read(root).digest


def test_its_digest_changes_with_its_files(tmp_path: Path) -> None:
    before = member(tmp_path)
    (before.folder / "fold1" / "model.safetensors").write_bytes(b"others")
    packed.seal(before.folder)
    assert Member.open(manifest.read(before.folder)).digest != before.digest


def test_members_that_read_the_same_contexts_have_the_same_key(tmp_path: Path) -> None:
    changed = packed.write_member(tmp_path, "settings", index="passages")
    packed.change_member(changed, "retrieve.context.passages=2")
    readers = {name: member(tmp_path, name, index="passages") for name in ("one", "same")}
    readers |= {"index": member(tmp_path, "index", index="others"), "settings": Member.open(manifest.read(changed))}
    assert readers["one"].key == readers["same"].key
    assert len({reader.key for reader in readers.values()}) == 3
    assert member(tmp_path, "plain").key is None


def test_views_are_those_with_oof_predictions_of_their_own(tmp_path: Path) -> None:
    root = packed.write_member(tmp_path, "member")
    assert list(Member.open(manifest.read(root)).views) == ["full"]
    packed.write_oof(root, TARGETS, guesses(0), short=guesses(1), unheard_of=guesses(2))
    views = Member.open(manifest.read(root)).views
    assert list(views) == ["full", "short"]
    assert (views["full"].max_length, views["short"].max_length) == (64, 32)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    root = packed.write_member(tmp_path, "member")
    (root / "recipe.toml").write_text("[")
    with pytest.raises(KitError, match=r"member/recipe\.toml"):
        Member.open(manifest.read(root))


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more"])
def test_oof_predictions_that_cannot_be_read_are_named(tmp_path: Path, content: bytes) -> None:
    opened = member(tmp_path)
    (opened.folder / "oof.parquet").write_bytes(content)
    with pytest.raises(BundleError, match=r"member/oof\.parquet: cannot be read .*: pack the run again"):
        opened.oof  # noqa: B018


def test_oof_predictions_without_ids_or_that_are_missing_are_named(tmp_path: Path) -> None:
    opened = member(tmp_path)
    pd.DataFrame({"p0": [0.5]}).to_parquet(opened.folder / "oof.parquet")
    with pytest.raises(BundleError, match=r"oof\.parquet: cannot be read .*'id'"):
        opened.oof  # noqa: B018
    (opened.folder / "oof.parquet").unlink()
    with pytest.raises(BundleError, match=r"oof\.parquet: cannot be read"):
        opened.oof  # noqa: B018


# --- members together ------------------------------------------------------------------------------------------------------------


def test_one_member_is_its_own_blend(tmp_path: Path) -> None:
    (one,) = members(tmp_path, expert(share(0, 2)))
    weighed = weigh([one])
    assert set(weighed.blend.weights(["a"])) == {"a"}
    assert weighed.targets.tolist() == TARGETS.tolist()
    assert weighed.oof["blend"]["map@3"] == pytest.approx(weighed.oof["a"]["map@3"])
    order = np.argsort(-weighed.blend.pool({"a": guesses(3).astype(np.float32)}), axis=-1)
    assert (order == np.argsort(-guesses(3).astype(np.float32), axis=-1)).all()


def test_members_that_need_each_other_are_blended_as_their_oof_says(tmp_path: Path) -> None:
    predictions = [expert(share(number, 3), number).astype(np.float32) for number in range(3)]
    three = members(tmp_path, *predictions)
    weighed = weigh(three)
    direct = Blend.fit(dict(zip("abc", predictions, strict=True)), TARGETS, three[0].task.merit, hints=hints_of(three[0]))
    assert weighed.blend.weights("abc") == pytest.approx(direct.weights("abc"))
    assert min(weighed.blend.weights("abc").values()) > 0
    assert weighed.oof.keys() == {"a", "b", "c", "blend"}
    for name, prediction in zip("abc", predictions, strict=True):
        assert weighed.oof[name]["map@3"] == pytest.approx(map_at_k(prediction, TARGETS, k=3))
    assert weighed.oof["blend"]["map@3"] == pytest.approx(map_at_k(direct.oof("abc"), TARGETS, k=3))
    assert weighed.oof["blend"]["map@3"] > weighed.oof["a"]["map@3"] + 0.2
    assert all(0 <= estimate["se"] < 0.1 for estimate in weighed.oof.values())


def hints_of(one: Member) -> dict[str, np.ndarray]:
    """By name, as the OOF table has them."""
    return {name: one.oof[[f"{name}{k}" for k in range(5)]].to_numpy(np.float32) for name in ("length", "overlap")}


def test_a_member_that_adds_nothing_has_no_weight_and_leaves_the_others_theirs(tmp_path: Path) -> None:
    a, b = expert(share(0, 2), 1), expert(share(1, 2), 2)
    three = members(tmp_path, a, np.full((ROWS, 5), 0.2), b)
    weighed = weigh(three)
    weights = weighed.blend.weights(["a", "b", "c"])
    assert weights["b"] == 0
    assert min(weights["a"], weights["c"]) > 0
    without = weigh([three[0], three[2]])
    assert weighed.blend.complete == {"a", "c"}
    assert weighed.oof["blend"] == pytest.approx(without.oof["blend"])


def test_members_of_one_table_in_another_order_are_blended_row_by_row(tmp_path: Path) -> None:
    """And so are those of which one has seen fewer rows."""
    predictions = [expert(share(number, 2), number) for number in range(2)]
    expected = weigh(members(tmp_path / "ordered", *predictions))
    a, b = members(tmp_path / "mixed", *predictions)
    order = np.random.default_rng(0).permutation(ROWS)[:80]
    pd.read_parquet(b.folder / "oof.parquet").iloc[order].to_parquet(b.folder / "oof.parquet", index=False)
    weighed = weigh([a, Member.open(manifest.read(b.folder))])
    assert len(weighed.targets) == 80
    assert weighed.oof["blend"]["map@3"] == pytest.approx(expected.oof["blend"]["map@3"], abs=0.05)
    assert weighed.oof["blend"]["map@3"] > 0.9


def test_members_without_a_common_row_are_refused_together(tmp_path: Path) -> None:
    a, b = members(tmp_path, guesses(1), guesses(2))
    packed.write_oof(b.folder, TARGETS, guesses(2), ids=[f"other{row}" for row in range(ROWS)])
    with pytest.raises(BundleError, match="the members a, b have no OOF row in common: train them on one table"):
        weigh([a, Member.open(manifest.read(b.folder))])


def test_views_are_sources_beside_their_members_and_do_not_change_their_blend(tmp_path: Path) -> None:
    a, b = members(tmp_path, expert(share(0, 2), 1), expert(share(1, 2), 2))
    before = weigh([a, b]).blend.weights("ab")
    packed.write_oof(b.folder, TARGETS, expert(share(1, 2), 2), short=guesses(5))
    weighed = weigh([a, Member.open(manifest.read(b.folder))])
    assert weighed.blend.names == ("a", "b", "b@short")
    assert weighed.oof.keys() == {"a", "b", "blend"}
    assert weighed.blend.weights("ab") == pytest.approx(before)
    assert weighed.blend.weights(["b@short"]).keys() == {"b@short"}


def test_rows_that_a_member_has_no_prediction_for_are_blended_from_the_others(tmp_path: Path) -> None:
    holes = expert(share(1, 2), 2)
    holes[:5] = np.nan
    weighed = weigh(members(tmp_path, expert(share(0, 2), 1), holes))
    assert np.isfinite(weighed.blend.oof("ab")).all()
    assert weighed.oof["blend"]["map@3"] > 0.9


def test_few_rows_say_nothing_about_a_blend_and_the_best_member_is_used(tmp_path: Path) -> None:
    few = 24
    a, b = members(tmp_path, expert(share(0, 2), 1), expert(~share(0, 3), 2))
    for one in (a, b):
        pd.read_parquet(one.folder / "oof.parquet")[:few].to_parquet(one.folder / "oof.parquet", index=False)
    weighed = weigh([Member.open(manifest.read(one.folder)) for one in (a, b)])
    weights = weighed.blend.weights("ab")
    assert (weights["a"], weights["b"] > 0) == (0, True)
    assert weighed.blend.complete == {"b"}


def test_more_rows_than_are_of_use_are_sampled_the_same_way_each_time(tmp_path: Path) -> None:
    times = 50  # 4500 rows
    targets, prediction = np.tile(TARGETS, times), np.tile(expert(share(0, 2)), (times, 1))
    root = packed.write_member(tmp_path, "member")
    packed.write_oof(root, targets, prediction)
    first, second = (weigh([Member.open(manifest.read(root))]) for _ in range(2))
    assert len(first.targets) == 4000
    assert (first.targets == second.targets).all()
    assert first.oof == second.oof


def test_the_method_of_the_blend_can_be_chosen(tmp_path: Path) -> None:
    two = members(tmp_path, expert(share(0, 2), 1), expert(share(1, 2), 2))
    assert weigh(two, "hill").blend.method == "hill"
    assert weigh(two).blend.method == "auto"


def test_hints_of_the_oof_rows_are_given_to_the_blend(tmp_path: Path) -> None:
    """Here they know every answer, and the members but two in three: trees learn to follow them."""
    two, answers = members(tmp_path, expert(share(0, 3), 1), expert(share(1, 3), 2)), np.eye(5, dtype=np.float32)[TARGETS]
    for one in two:
        frame = pd.read_parquet(one.folder / "oof.parquet")
        frame.assign(**{f"overlap{k}": answers[:, k] for k in range(5)}).to_parquet(one.folder / "oof.parquet", index=False)
    weighed = weigh([Member.open(manifest.read(one.folder)) for one in two], "ranker")
    unsure = {name: np.full((ROWS, 5), 0.2, np.float32) for name in "ab"}
    hints = {"overlap": answers, "length": np.full((ROWS, 5), 9, np.float32)}
    assert (weighed.blend.pool(unsure, hints).argmax(-1) == TARGETS).all()


def test_members_whose_ids_mean_other_rows_are_refused_together(tmp_path: Path) -> None:
    one, other = members(tmp_path, guesses(1), guesses(2))
    packed.write_oof(other.folder, np.where(np.arange(ROWS) == 7, (TARGETS + 1) % 5, TARGETS), guesses(2))
    with pytest.raises(BundleError, match=r"members a and b disagree on the answer of id '7' \(1 such ids\): train them on one table"):
        weigh([one, Member.open(manifest.read(other.folder))])


def test_members_with_another_number_of_options_are_refused_together(tmp_path: Path) -> None:
    one, other = members(tmp_path, guesses(1), guesses(2)[:, :4])
    with pytest.raises(BundleError, match="members a and b were trained on tables of different shape"):
        weigh([one, other])
