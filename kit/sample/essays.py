"""The embedded essays: short school essays with six scores, composed for this project from a seed, in the format of Feedback Prize ELL.

Every essay draws an ability for each score, near to one of its own. The higher it is, the more often a place of the text holds the better of
two forms: links between sentences and paragraphs (cohesion), joined or broken clauses (syntax), precise or plain words (vocabulary), usual
or odd turns (phraseology), agreement and articles (grammar), spelling and punctuation (conventions). train.csv has the scores, test.csv has none; they
are in test_answers.csv, which a competitor would not see.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kit.errors import DataError

TARGETS = ("cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions")
FILES = ("train.csv", "test.csv", "test_answers.csv", "sample_submission.csv")
_SEED, _TRAIN, _TEST = 6, 320, 120
_LOW, _HIGH, _MIDDLE = 1.0, 5.0, "3.0"

_TOPICS = (
    ("school gardens", "A school garden", "they need water, patience and a {place|site} in the sun", "bean", "gardener"),
    ("home lessons", "A home lesson", "they {need|require} a {quiet|tranquil} room and a clear plan", "page", "student"),
    ("sports teams", "A sports team", "they {need|require} trust and a {good|dedicated} coach", "match", "player"),
    ("public libraries", "A public library", "they {keep|preserve} what others {wrote|recorded} long ago", "story", "reader"),
    ("music lessons", "A music lesson", "they {need|demand} an ear and a lot of {hard|persistent} work", "song", "musician"),
    ("bicycle tours", "A bicycle tour", "they {need|require} {safe|protected} streets and some courage", "journey", "cyclist"),
    ("summer jobs", "A summer job", "they {give|provide} money and a {first|preliminary} look at work", "wage", "worker"),
    ("forest walks", "A forest walk", "they {give|offer} rest to a {tired|weary} head", "path", "walker"),
    ("shared meals", "A shared meal", "they bring people together who would not {talk|converse} at all", "recipe", "cook"),
    ("pets", "A pet", "they {need|require} care on {bad|miserable} days, too", "puppy", "keeper"),
    ("telephones in class", "A telephone in class", "they {take|distract} the mind from what is {hard|challenging}", "message", "pupil"),
    ("museum visits", "A museum visit", "they {show|reveal} how people {lived|subsisted} before us", "painting", "visitor"),
)
"""Name, singular, a clause about several, a thing, a person. {plain|precise} words are chosen by vocabulary."""

_OPENINGS = (
    "{In my opinion/On my opinion}, {topic} should {play an important role/make an important role} in the life of every {person}",
    "Many people {think|maintain} that {topic} {pay off in the long run/pay out at the long time}",
    "I {have made up my mind/did make my mind} about {topic}, and I will {say|explain} why",
)
_POINTS = (
    "{one} [help|helps] a {person} to {pay attention to/give attention at} what [is|are] {important|essential}",
    "a {person} who [spend|spends] time on it [become|becomes] {happy|content} and {strong|resilient}",
    "my {sister|sibling} [do|does] it every week, and she [say|says] that it {makes a difference/does a difference}",
    "every {thing} [teach|teaches] something that no {book|manual} [teach|teaches]",
    "{one} [cost|costs] {little|modest} money but [give|gives] <a> {big|considerable} reward",
    "the {person} in our street [take|takes] {part in it/place at it} and [grow|grows] {better|more capable} with every {thing}",
    "nobody [learn|learns] such things from <a> {screen|monitor}, where one [look|looks] and [forget|forgets]",
    "it [show|shows] us how to {deal with/deal at} {problems|obstacles} in <a> {calm|composed} way",
    "<the> first {thing} [is|are] always {hard|arduous}, and the second [follow|follows] {sooner or later/soon or late}",
    "our teacher [think|thinks] that {topic} {are worth the effort/have the worth of effort}",
    "<a> {person} [need|needs] <a> {friend|companion} who [keep|keeps] {an eye on/the eye over} the work",
    "people [forget|forgets] {how|to what extent} it [change|changes] the {day|routine} of <a> family",
)
_JOINTS = ("because", "although", "since", "even though", "as long as")
_REASONS = ("{clause}", "it [take|takes] time", "not everybody [like|likes] it", "the {day|schedule} [is|are] {short|limited}")
_CLOSINGS = (
    "{all things considered/with all considered things}, {topic} [deserve|deserves] {a chance/the chance} in every school",
    "I would {take advantage of/make advantage from} {topic} whenever that [is|are] {possible|feasible}",
)
_LINKS = ("First of all, ", "In addition, ", "For this reason, ", "Moreover, ", "As a result, ", "On the other hand, ", "After all, ")
_LAST_LINK = "In conclusion, "
_STRAY = ("My uncle has a blue car.", "Yesterday it rained.", "Lunch is at noon.", "I like winter.", "The bus was late.")


class _Able(NamedTuple):
    """Chances, 0 to 1, that a place holds the better form, in the order of TARGETS."""

    cohesion: float
    syntax: float
    vocabulary: float
    phraseology: float
    grammar: float
    conventions: float


def write_essays(folder: Path) -> Path:
    """Write the sample competition of essays into a folder; files that are there already are replaced. Raises DataError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file: name a folder to write the sample essays into")
    folder.mkdir(parents=True, exist_ok=True)
    essays = compose(_TRAIN + _TEST, seed=_SEED)
    train, test = essays[:_TRAIN], essays[_TRAIN:]
    tables: dict[str, tuple[list[str], list[list[object]]]] = {
        "train.csv": (["text_id", "full_text", *TARGETS], [[id_, text, *scores] for id_, text, scores in train]),
        "test.csv": (["text_id", "full_text"], [[id_, text] for id_, text, _ in test]),
        "test_answers.csv": (["text_id", *TARGETS], [[id_, *scores] for id_, _, scores in test]),
        "sample_submission.csv": (["text_id", *TARGETS], [[id_, *[_MIDDLE] * len(TARGETS)] for id_, _, _ in test]),
    }
    for name, (header, rows) in tables.items():
        part = folder / f".{name}.part"
        with part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        part.replace(folder / name)
    return folder


def compose(count: int, *, seed: int) -> list[tuple[str, str, tuple[float, ...]]]:
    """`count` essays: id, text, and scores in half points in the order of TARGETS. The same seed gives the same essays everywhere."""
    rng = random.Random(seed)
    return [_essay(rng, f"{seed:02X}{rng.getrandbits(40):010X}") for _ in range(count)]


def _essay(rng: random.Random, id_: str) -> tuple[str, str, tuple[float, ...]]:
    own = rng.gauss(3.0, 0.75)
    scores = tuple(min(_HIGH, max(_LOW, round(2 * (own + rng.gauss(0, 0.45))) / 2)) for _ in TARGETS)
    able = _Able(*[(score - _LOW) / (_HIGH - _LOW) for score in scores])
    topic = rng.choice(_TOPICS)
    points = rng.sample(_POINTS, rng.randint(6, 9))
    sentences = [rng.choice(_OPENINGS), *points, rng.choice(_CLOSINGS)]
    written = [_worded(_joined(sentence, topic, able, rng), topic, able, rng) for sentence in sentences]
    return id_, _arranged([_spelt(sentence, able, rng) for sentence in written], able, rng), scores


def _better(chance: float, rng: random.Random) -> bool:
    return rng.random() < chance


def _joined(sentence: str, topic: Sequence[str], able: _Able, rng: random.Random) -> str:
    """Syntax: a sentence with a subordinate clause, or one that runs on or breaks off."""
    if _better(0.5, rng):
        return f"{sentence}."
    reason = rng.choice(_REASONS).replace("{clause}", topic[2])
    if _better(able.syntax, rng):
        return f"{sentence} {rng.choice(_JOINTS)} {reason}."
    return rng.choice((f"{sentence} and {reason} and so.", f"{sentence}. Because of {reason}.", f"{sentence} {reason} it is."))


def _worded(sentence: str, topic: Sequence[str], able: _Able, rng: random.Random) -> str:
    """Vocabulary {plain|precise}, phraseology {usual/odd}, grammar [wrong|right or right|wrong] and <article>."""
    name, one, _, thing, person = topic
    for place, word in (("{topic}", name), ("{one}", one), ("{thing}", thing), ("{person}", person)):
        sentence = sentence.replace(place, word)
    sentence = re.sub(r"\{([^{}|/]+)\|([^{}|/]+)\}", lambda found: found[1 + _better(able.vocabulary, rng)], sentence)
    sentence = re.sub(r"\{([^{}/]+)/([^{}/]+)\}", lambda found: found[2 - _better(able.phraseology, rng)], sentence)
    sentence = re.sub(r"\[([^|\]]+)\|([^|\]]+)\]", _agreement(able.grammar, rng), sentence)
    return re.sub(r"<(\w+)> ", lambda found: f"{found[1]} " if _better(able.grammar, rng) else "", sentence)


def _agreement(chance: float, rng: random.Random) -> Callable[[re.Match[str]], str]:
    """The right one of two forms of a verb, by chance: the second, but "is" of "is|are"; people and topics are several."""

    def choose(found: re.Match[str]) -> str:
        several = found.string[: found.start()].rstrip().endswith(("people", *(name for name, *_ in _TOPICS)))
        right = found[1] if (found[1] == "is") != several else found[2]
        wrong = found[2] if right == found[1] else found[1]
        return right if _better(chance, rng) else wrong

    return choose


def _spelt(sentence: str, able: _Able, rng: random.Random) -> str:
    """Conventions: misspelt words, lost capitals and full stops."""
    flaw = 0.25 * (1 - able.conventions)
    words = [_misspelt(word, rng) if len(word) > 4 and _better(flaw, rng) else word for word in sentence.split(" ")]
    text = " ".join(words)
    text = text[0].upper() + text[1:] if _better(able.conventions, rng) else text[0].lower() + text[1:]
    text = text if _better(able.conventions, rng) else text.replace(" I ", " i ").replace(",", "")
    return text if _better(0.4 + 0.6 * able.conventions, rng) else text.removesuffix(".") + rng.choice((",", " ,", "", "..", "!!"))


def _misspelt(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 2)
    ways = (word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return rng.choice(ways)


def _arranged(sentences: Sequence[str], able: _Able, rng: random.Random) -> str:
    """Cohesion: links, an order, paragraphs; or sentences that stray."""
    links = rng.sample(_LINKS, len(_LINKS))
    told: list[str] = []
    for number, sentence in enumerate(sentences):
        last = number == len(sentences) - 1
        linked = number > 0 and _better(0.6 * able.cohesion, rng)
        link = _LAST_LINK if last else links[number % len(links)]
        told.append(link + sentence[0].lower() + sentence[1:] if linked else sentence)
        if not last and _better(0.4 * (1 - able.cohesion), rng):
            told.append(rng.choice(_STRAY))
    breaks = {1, len(told) // 2, len(told) - 1}
    parts = ["\n\n" if at in breaks and _better(able.cohesion, rng) else " " for at in range(len(told))]
    return "".join(gap + sentence for gap, sentence in zip(["", *parts[1:]], told, strict=True))
