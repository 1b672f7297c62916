"""The sample readings: short texts on places that do not exist, with questions whose answers stand in them, composed anew from a seed.

train.json and test_answers.json are SQuAD files with answers, test.json is the latter without them; sample_submission.csv has the form of an answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kit.errors import DataError

Article = dict[str, Any]
FILES = ("train.json", "test.json", "test_answers.json", "sample_submission.csv")
_SEED = 1868
_TEXTS, _TEST = 4, 1  # texts of every kind, and how many of them are for the test
_QUESTIONS = 7  # of a text


class _Sentence(NamedTuple):
    """wordings: one of them is taken. questions: what may be asked of it (one wording is taken) and the answer. Words in braces come from the text's facts."""

    wordings: tuple[str, ...]
    questions: tuple[tuple[tuple[str, ...], str], ...]


def write_readings(folder: Path) -> Path:
    """Write the sample readings into a folder; files that are there already and differ are replaced. Raises DataError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file: name a folder to write the sample readings into")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in compose().items():
        part = folder / f".{name}.part"
        part.write_text(content, encoding="utf-8", newline="\n")
        part.replace(folder / name)
    return folder


def compose(seed: int = _SEED) -> dict[str, str]:
    """The files by name; the same for a seed."""
    rng = random.Random(seed)
    places = rng.sample(_PLACES, len(_PLACES))
    people = [f"{first} {last}" for first, last in zip(rng.sample(_FIRST, len(_FIRST)), rng.sample(_LAST, len(_LAST)), strict=True)]
    rng.shuffle(people)
    articles = []
    for _ in range(_TEXTS):
        for kind, sentences in _KINDS.items():
            facts = _facts(rng, places.pop(), people[:2])
            people = [*people[2:], *people[:2]]
            articles.append(_article(rng, f"The {kind} of {facts['place']}", sentences, facts))
    test, train = _numbered("t", articles[: _TEST * len(_KINDS)]), _numbered("r", articles[_TEST * len(_KINDS) :])
    ids = [question["id"] for article in test for question in _questions(article)]
    submission = "\n".join(["id,answer", *(f"{id_},the town" for id_ in ids)]) + "\n"
    answers = _squad(test)
    for question in (question for article in test for question in _questions(article)):
        del question["answers"]
    return dict(zip(FILES, (_squad(train), _squad(test), answers, submission), strict=True))


def _numbered(name: str, articles: list[Article]) -> list[Article]:
    for number, question in enumerate(question for article in articles for question in _questions(article)):
        question["id"] = f"{name}{number:03d}"
    return articles


def _questions(article: Article) -> list[dict[str, Any]]:
    return article["paragraphs"][0]["qas"]


def _squad(articles: list[Article]) -> str:
    return json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False, indent=1) + "\n"


def _facts(rng: random.Random, place: str, people: Sequence[str]) -> dict[str, str]:
    """What a text says: years in order, numbers and words, none of them twice."""
    year = rng.randint(1760, 1860)
    years = [str(year := year + rng.randint(5, 28)) for _ in range(4)]
    numbers = rng.sample(range(12, 99), 5)
    picked = {name: rng.sample(words, 2) for name, words in _WORDS.items()}
    return {
        "place": place, "founder": people[0], "other": people[1],
        **{f"year{k}": one for k, one in enumerate(years)}, **{f"n{k}": str(one) for k, one in enumerate(numbers)},
        "many": f"{rng.randint(2, 9)},{rng.randint(1, 9)}00",
        **{f"{name}{k}": one for name, words in picked.items() for k, one in enumerate(words)},
    }  # fmt: skip


def _article(rng: random.Random, title: str, sentences: Sequence[_Sentence], facts: dict[str, str]) -> Article:
    """One text and what is asked about it, in the order of the answers."""
    context, asked = "", list[dict[str, Any]]()
    for sentence in sentences:
        text = rng.choice(sentence.wordings).format(**facts)
        start = len(context) + bool(context)
        context = f"{context} {text}".strip()
        for wordings, template in sentence.questions:
            said = template.format(**facts)
            assert text.count(said) == 1, f"{said!r} does not stand in {text!r} just once"
            answer = {"text": said, "answer_start": start + text.index(said)}
            asked.append({"id": "", "question": rng.choice(wordings).format(**facts), "answers": [answer]})
    chosen = [asked[place] for place in sorted(rng.sample(range(len(asked)), _QUESTIONS))]
    return {"title": title, "paragraphs": [{"context": context, "qas": chosen}]}


_PLACES = (
    "Arvenholt", "Tessary", "Morwick", "Kelbourne", "Dunmarra", "Ostrely", "Fennimar", "Galdrow", "Hestavik", "Illworth", "Jorrance", "Karsund",
    "Lammeray", "Mirefold", "Nethergill", "Orlesby", "Pellingar", "Quarnford", "Rosmere", "Skelding", "Tarnholm", "Ulvenby", "Vasterfield", "Wendring",
    "Yarrowby", "Zellmar", "Ambleth", "Brundale", "Corrimoor", "Drevane", "Eskerton", "Farrowmont",
)  # fmt: skip
_FIRST = (
    "Ada", "Bruno", "Clara", "David", "Edith", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Katrin", "Leon", "Marta", "Nils", "Olga", "Paul",
    "Rosa", "Simon", "Thea", "Viktor",
)  # fmt: skip
_LAST = (
    "Ashgrove", "Bellamor", "Crane", "Dahlman", "Eversen", "Fairlow", "Grantham", "Hollis", "Ivarsen", "Jessop", "Kirkwall", "Lindqvar", "Merrow",
    "Norgate", "Ottersen", "Penhall", "Quill", "Ravensby", "Stenmark", "Thornley",
)  # fmt: skip
_WORDS = {
    "stone": ("granite", "sandstone", "limestone", "slate", "basalt", "red brick"),
    "river": ("Aldra", "Brenn", "Calder", "Dove", "Ishmar", "Lune"),
    "good": ("wool", "salt", "timber", "herring", "barley", "linen", "copper ore"),
    "harm": ("a spring flood", "a fire in the roof", "a severe storm", "a landslide", "a lightning strike"),
    "delay": ("thick ice", "heavy fog", "a broken rudder", "a fever on board", "contrary winds"),
    "month": ("March", "April", "June", "August", "September", "November"),
    "animal": ("grey seals", "barn owls", "white storks", "otters", "honey bees", "goats"),
    "plant": ("blue poppies", "tree ferns", "wild orchids", "dwarf pines", "water lilies", "tea roses"),
    "work": ("a retired teacher", "a merchant's daughter", "a clockmaker", "a country doctor", "a former sailor", "a printer"),
}

_KINDS: dict[str, tuple[_Sentence, ...]] = {
    "lighthouse": (
        _Sentence(
            ("The lighthouse of {place} was built in {year0} by {founder}.", "{founder} built the lighthouse of {place} in {year0}."),
            (
                (("Who built the lighthouse?", "Who was the builder of the lighthouse of {place}?"), "{founder}"),
                (("In which year was the lighthouse built?", "When was the lighthouse of {place} built?"), "{year0}"),
            ),
        ),
        _Sentence(
            ("Its tower of {stone0} is {n0} metres high and stands on a rock half an hour from the harbour.",),
            (
                (("How high is the tower?", "How many metres high is the tower?"), "{n0} metres"),
                (("Of what is the tower made?", "What is the tower built of?"), "{stone0}"),
            ),
        ),
        _Sentence(
            ("At first the lamp burned whale oil; in {year1} it was changed to gas, and its light could then be seen from {n1} miles away.",),
            (
                (("What did the lamp burn at first?",), "whale oil"),
                (("From how far away could the gas light be seen?",), "{n1} miles"),
                (("When was the lamp changed to gas?",), "{year1}"),
            ),
        ),
        _Sentence(
            ("The best known keeper, {other}, lived on the rock for {n2} years and counted the {animal0} there every {month0}.",),
            (
                (("Who was the best known keeper?", "What was the name of the best known keeper?"), "{other}"),
                (("How long did the keeper live on the rock?",), "{n2} years"),
                (("What did the keeper count?", "Which animals did the keeper count?"), "{animal0}"),
                (("In which month did the keeper count the animals?",), "{month0}"),
            ),
        ),
        _Sentence(
            ("The light went out for good in {year3}, when ships no longer needed it.",),
            (
                (("When did the light go out for good?", "In which year did the light go out?"), "{year3}"),
            ),
        ),
    ),
    "bridge": (
        _Sentence(
            ("The old bridge of {place} crosses the river {river0} on {n0} arches of {stone0}.",),
            (
                (("Which river does the bridge cross?", "What is the name of the river?"), "{river0}"),
                (("How many arches does the bridge have?",), "{n0} arches"),
                (("Of what are the arches made?",), "{stone0}"),
            ),
        ),
        _Sentence(
            ("{founder}, {work0}, drew the plans, and work began in {year0}.", "The plans were drawn by {founder}, {work0}, and work began in {year0}."),
            (
                (("Who drew the plans of the bridge?", "By whom were the plans drawn?"), "{founder}"),
                (("When did work on the bridge begin?",), "{year0}"),
                (("What was {founder}?",), "{work0}"),
            ),
        ),
        _Sentence(
            ("Because of {harm0} it was finished only in {year1}, and it cost {many} crowns.",),
            (
                (("Why was the bridge finished late?", "What delayed the work on the bridge?"), "{harm0}"),
                (("When was the bridge finished?",), "{year1}"),
                (("How much did the bridge cost?", "What did the bridge cost?"), "{many} crowns"),
            ),
        ),
        _Sentence(
            ("Carts that carried {good0} paid a toll of {n1} pence, but those with {good1} went free.",),
            (
                (("How high was the toll?",), "{n1} pence"),
                (("Which carts had to pay a toll?", "What did the carts carry that paid the toll?"), "{good0}"),
                (("What could cross the bridge free of charge?",), "{good1}"),
            ),
        ),
        _Sentence(
            ("The toll was ended in {year2} by the mayor, {other}.", "In {year2} the mayor, {other}, ended the toll."),
            ((("Who ended the toll?", "What was the name of the mayor?"), "{other}"), (("In which year was the toll ended?",), "{year2}")),
        ),
    ),
    "observatory": (
        _Sentence(
            ("The observatory of {place} owes its existence to {founder}, {work0}, who gave {many} crowns for it in {year0}.",),
            (
                (("To whom does the observatory owe its existence?", "Who gave money for the observatory?"), "{founder}"),
                (("How much money was given for the observatory?",), "{many} crowns"),
                (("When was the money given?",), "{year0}"),
            ),
        ),
        _Sentence(
            ("Its dome is {n0} feet wide and turns on wheels of brass.",),
            ((("How wide is the dome?",), "{n0} feet"), (("On what does the dome turn?",), "wheels of brass")),
        ),
        _Sentence(
            ("The first director, {other}, found {n1} comets with it, the brightest of them in {month0} {year1}.",),
            (
                (("Who was the first director?", "What was the first director called?"), "{other}"),
                (("How many comets were found?",), "{n1} comets"),
                (("When was the brightest comet found?",), "{month0} {year1}"),
            ),
        ),
        _Sentence(
            ("After {harm0} in {year2} the great lens had to be ground again, which took {n2} weeks.",),
            (
                (("What damaged the great lens?", "After what did the lens have to be ground again?"), "{harm0}"),
                (("How long did it take to grind the lens again?",), "{n2} weeks"),
                (("In which year was the lens damaged?",), "{year2}"),
            ),
        ),
        _Sentence(
            ("Today the building of {stone0} is a school, and {animal0} live under the dome.",),
            (
                (("What is the building today?",), "a school"),
                (("What lives under the dome?",), "{animal0}"),
            ),
        ),
    ),
    "library": (
        _Sentence(
            ("The town library of {place} was opened in {month0} {year0} with {n0} books, all of them gifts of {founder}.",),
            (
                (("When was the library opened?",), "{month0} {year0}"),
                (("How many books did the library have when it was opened?", "With how many books was the library opened?"), "{n0} books"),
                (("Who gave the first books?", "Whose gifts were the first books?"), "{founder}"),
            ),
        ),
        _Sentence(
            ("{founder} was {work0} and wished that those who spun {good0} could read in the evening.",),
            (
                (("What was {founder}?",), "{work0}"),
                (("When should the workers be able to read?",), "in the evening"),
                (("What did the workers spin?",), "{good0}"),
            ),
        ),
        _Sentence(
            ("A reading room of {stone0} with {n1} seats was added in {year1}.", "In {year1} a reading room of {stone0} with {n1} seats was added."),
            (
                (("How many seats does the reading room have?",), "{n1} seats"),
                (("When was the reading room added?",), "{year1}"),
                (("Of what is the reading room built?",), "{stone0}"),
            ),
        ),
        _Sentence(
            ("In {year2}, {harm0} destroyed the catalogue, and the librarian, {other}, wrote it again from memory in {n2} weeks.",),
            (
                (("What destroyed the catalogue?",), "{harm0}"),
                (("Who wrote the catalogue again?", "What was the name of the librarian?"), "{other}"),
                (("How long did it take to write the catalogue again?",), "{n2} weeks"),
            ),
        ),
        _Sentence(
            ("By {year3} the shelves held {many} volumes.",),
            (
                (("How many volumes did the shelves hold in {year3}?",), "{many} volumes"),
            ),
        ),
    ),
    "garden": (
        _Sentence(
            (
                "The botanical garden of {place} was laid out in {year0} for {founder}, {work0}.",
                "{founder}, {work0}, had the botanical garden of {place} laid out in {year0}.",
            ),
            (
                (("For whom was the garden laid out?", "Who had the garden laid out?"), "{founder}"),
                (("When was the garden laid out?",), "{year0}"),
                (("What was {founder}?",), "{work0}"),
            ),
        ),
        _Sentence(
            ("It is best known for its {plant0}, which flower in {month0}, and covers {n0} acres.",),
            (
                (("For which plants is the garden best known?", "What is the garden best known for?"), "{plant0}"),
                (("In which month do the best known plants flower?",), "{month0}"),
                (("How large is the garden?", "How many acres does the garden cover?"), "{n0} acres"),
            ),
        ),
        _Sentence(
            ("A wall of {stone0} keeps out the wind, and a canal from the {river0} brings water to {n1} ponds.",),
            (
                (("What keeps out the wind?",), "A wall of {stone0}"),
                (("Where does the water come from?", "Which river brings water to the ponds?"), "the {river0}"),
                (("How many ponds are there?",), "{n1} ponds"),
            ),
        ),
        _Sentence(
            ("The glass house was added by the gardener {other} in {year1}; it is {n2} paces long and holds {plant1}.",),
            (
                (("Who added the glass house?", "Which gardener added the glass house?"), "{other}"),
                (("When was the glass house added?",), "{year1}"),
                (("How long is the glass house?",), "{n2} paces"),
                (("What does the glass house hold?", "Which plants are in the glass house?"), "{plant1}"),
            ),
        ),
        _Sentence(
            ("Since {year2} the garden has belonged to the town.",),
            (
                (("Since when has the garden belonged to the town?",), "{year2}"),
                (("To whom does the garden belong?",), "the town"),
            ),
        ),
    ),
    "railway": (
        _Sentence(
            ("The narrow railway of {place} was opened in {month0} {year0} to carry {good0} from the hills to the port.",),
            (
                (("When was the railway opened?",), "{month0} {year0}"),
                (("What did the railway carry?", "What was the railway opened to carry?"), "{good0}"),
                (("Where did the railway end?", "To where was the load carried?"), "the port"),
            ),
        ),
        _Sentence(
            ("The line is {n0} miles long and climbs {many} feet.", "It climbs {many} feet on a line of {n0} miles."),
            (
                (("How many miles long is the line?", "What is the length of the line?"), "{n0} miles"),
                (("How many feet does the line climb?",), "{many} feet"),
            ),
        ),
        _Sentence(
            ("Its engineer, {founder}, had {n1} workers, most of whom had been miners before.",),
            (
                (("Who was the engineer of the railway?",), "{founder}"),
                (("How many workers did the engineer have?",), "{n1} workers"),
                (("What had most of the workers been before?",), "miners"),
            ),
        ),
        _Sentence(
            ("The tunnel under the ridge was closed by {harm0} in {year1} and dug again through {stone0}.",),
            (
                (("What closed the tunnel?", "By what was the tunnel closed?"), "{harm0}"),
                (("In which year was the tunnel closed?",), "{year1}"),
                (("Through what was the tunnel dug again?",), "{stone0}"),
            ),
        ),
        _Sentence(
            ("Passengers have been carried since {year2}; the first ticket was sold to {other} for {n2} pence.",),
            (
                (("Since when have passengers been carried?",), "{year2}"),
                (("Who bought the first ticket?", "To whom was the first ticket sold?"), "{other}"),
                (("What did the first ticket cost?", "How much was paid for the first ticket?"), "{n2} pence"),
            ),
        ),
    ),
    "mill": (
        _Sentence(
            ("The mill of {place} has stood on the {river0} since {year0}, when {founder} bought the land for {many} crowns.",),
            (
                (("On which river does the mill stand?",), "{river0}"),
                (("Since when has the mill stood there?",), "{year0}"),
                (("Who bought the land?", "By whom was the land bought?"), "{founder}"),
                (("What did the land cost?", "How much was paid for the land?"), "{many} crowns"),
            ),
        ),
        _Sentence(
            ("Its wheel is {n0} feet across and drove {n1} looms, on which {good0} was worked.",),
            (
                (("How large is the wheel?", "How many feet across is the wheel?"), "{n0} feet"),
                (("How many looms did the wheel drive?",), "{n1} looms"),
                (("What was worked on the looms?",), "{good0}"),
            ),
        ),
        _Sentence(
            ("In {year1} a chimney of {stone0} was built, and steam took the place of the river.",),
            (
                (("When was the chimney built?",), "{year1}"),
                (("Of what is the chimney built?",), "{stone0}"),
                (("What took the place of the river?",), "steam"),
            ),
        ),
        _Sentence(
            ("The last owner, {other}, was {work0} and kept {animal0} in the yard.",),
            (
                (("Who was the last owner of the mill?",), "{other}"),
                (("What was kept in the yard?", "Which animals were kept in the yard?"), "{animal0}"),
                (("What was the last owner?",), "{work0}"),
            ),
        ),
        _Sentence(
            ("After {harm0} the mill was closed in {month0} {year3}; {n2} families lost their work.",),
            (
                (("After what was the mill closed?", "What led to the end of the mill?"), "{harm0}"),
                (("When was the mill closed?",), "{month0} {year3}"),
                (("How many families lost their work?",), "{n2} families"),
            ),
        ),
    ),
    "expedition": (
        _Sentence(
            ("The expedition of {place} left the harbour in {month0} {year0} with {n0} men on board.",),
            (
                (("When did the expedition leave the harbour?", "When did the expedition begin?"), "{month0} {year0}"),
                (("How many men were on board?", "With how many men did the expedition leave?"), "{n0} men"),
            ),
        ),
        _Sentence(
            ("It was led by {founder}, and {other} kept the journal.", "{founder} led it, while {other} kept the journal."),
            (
                (("Who led the expedition?", "Who was the leader of the expedition?"), "{founder}"),
                (("Who kept the journal?", "By whom was the journal kept?"), "{other}"),
            ),
        ),
        _Sentence(
            ("The ship carried {good0} for trade and food for {n1} weeks.",),
            ((("What did the ship carry for trade?",), "{good0}"), (("For how long did the ship carry food?",), "{n1} weeks")),
        ),
        _Sentence(
            ("On an island of {stone0} the crew found {plant0} and great numbers of {animal0}.",),
            (
                (("Of what was the island?",), "{stone0}"),
                (("Which plants did the crew find?", "What grew on the island?"), "{plant0}"),
                (("Which animals were there in great numbers?",), "{animal0}"),
            ),
        ),
        _Sentence(
            ("They were held there for {n2} days by {delay0}, and the mast was lost.",),
            (
                (("What held the crew on the island?", "By what was the crew held there?"), "{delay0}"),
                (("For how many days was the crew held?",), "{n2} days"),
                (("What was lost?",), "the mast"),
            ),
        ),
        _Sentence(
            ("The journal was printed in {year1} in {many} copies.", "In {year1} the journal was printed in {many} copies."),
            ((("When was the journal printed?",), "{year1}"), (("How many copies of the journal were printed?",), "{many} copies")),
        ),
    ),
}
