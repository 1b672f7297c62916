"""Multiple choice by prompts for language models: likelihood of the options, their letters, yes or no to each, or a scalar head.

Knows templates and which places of a batch of trees (kit.tasks.PromptTokens) say what about which option. Does not know which model scores
them or how texts become tokens. Question, metric, loss and rows are those of pair scoring. Length-normalised likelihood after Brown et al.
2020; cyclic orders of the options against the bias for letters after Zheng et al. 2024 (there: cyclic permutation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from string import Formatter
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from kit.errors import ConfigError, nearest
from kit.tasks import Batch, Encoding, Feature, PromptTokens, Tokens, View
from kit.tasks.multiple_choice import LETTERS, MultipleChoice, Question, label, labels

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["likelihood", "letter", "yes_no", "score"]
_Template = tuple[tuple[str, str], ...]
"""(literal text, name of the field after it, "" for none) …"""

_HOLE = "\ufffc"  # stands for the user's message when a chat template is rendered
_CHARS_PER_TOKEN, _SPECIAL_TOKENS, _CHAT_TOKENS = 4, 1, 12  # of English text; before a text; of a usual chat template


class _Usual(NamedTuple):
    """A form's usual templates, and the settings that other forms do not have. holds: template → fields it must have."""

    template: str
    option_template: str
    choices_template: str
    own: frozenset[str]
    holds: Mapping[str, tuple[str, ...]]


_HOLDS: dict[str, tuple[str, ...]] = {"template": ("prompt",), "option_template": ("option",)}
_QUESTION = "{context}\n\nQuestion: {prompt}\n"
_FORMS: dict[str, _Usual] = {
    "likelihood": _Usual(f"{_QUESTION}Answer:", " {option}", "", frozenset({"option_template", "normalise"}), _HOLDS),
    "letter": _Usual(
        f"{_QUESTION}{{options}}Answer:", "", "{letter}. {option}\n", frozenset({"choices_template", "orders"}),
        {"template": ("prompt", "options"), "choices_template": ("letter", "option")},
    ),
    "yes_no": _Usual(
        _QUESTION, "Proposed answer: {option}\nIs the proposed answer right? Yes or No:", "", frozenset({"option_template", "objective", "yes", "no"}), _HOLDS
    ),
    "score": _Usual(_QUESTION, "Answer: {option}", "", frozenset({"option_template", "objective"}), _HOLDS),
}  # fmt: skip
_MAY_HOLD = {"template": ("context", "prompt", "options"), "option_template": ("option", "letter"), "choices_template": ("option", "letter")}


@dataclass(frozen=True)
class Prompted(MultipleChoice):
    """Scores (N, C) by one prompt per question, whose options share what stands before them.

    Trees. likelihood: trunk = the question, branch k = option k, asked for every token of it. letter: a trunk only, asked for every letter at its end;
    with orders > 1 a branch for each order of the options. yes_no: branch k = option k, asked for yes and no at its end. score: branch k = option k,
    a head reads its last token.
    """

    max_length: int = 1024
    """Tokens of the trunk and its longest branch; the context is cut to fit, the question and the options never."""
    form: Form = "letter"
    """What is compared: log-likelihoods of the options, of their letters, of yes and no after each option, or scores of a head after each option."""
    template: str = ""
    """The question, with {context}, {prompt} and for letters {options}; braces are written {{ and }}. Empty: the form's own.

    Where the context is blank, the white space after it goes, too.
    """
    option_template: str = ""
    """What follows for each option, with {option} and {letter}. Empty: the form's own."""
    choices_template: str = ""
    """Each of {options}, with {letter} and {option}. Empty: "A. …", one a line."""
    normalise: bool = False
    """Divide an option's log-likelihood by its tokens."""
    orders: int = 1
    """Cyclic orders of the options behind one prefix (at most as many as options): log-probabilities are averaged over them.

    What a letter gains by being "A" is added to each option's logit once, so it drops out of a mean of logs, not out of one of probabilities.
    """
    yes: str = "Yes"
    """The word that follows a right option."""
    no: str = "No"
    """The word that follows a wrong one."""
    objective: Literal["options", "binary"] = "options"
    """The loss: cross-entropy over the options, or each option by itself as right or wrong."""
    chat: bool = False
    """Wrap all up to the answer in the model's chat template, as the user's message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in _FORMS:
            raise ConfigError(f"task.form = {self.form!r} is unknown{nearest(self.form, _FORMS)}")
        for one in fields(self):
            forms = [form for form, usual in _FORMS.items() if one.name in usual.own]
            if forms and self.form not in forms and getattr(self, one.name) != one.default:
                raise ConfigError(f'task.{one.name} is for task.form = {_either(forms)}, not "{self.form}": leave it out or change the form')
        for key in _MAY_HOLD:
            _check(key, self._text(key), self._usual.holds.get(key, ()), _MAY_HOLD[key])
        if self.orders < 1:
            raise ConfigError(f"task.orders = {self.orders}: give 1, or the number of cyclic orders to average")
        if self.orders > 1 and not self._may_reorder:
            raise ConfigError(f"task.orders = {self.orders}, but task.template has {{context}} behind {{options}}, so orders cannot share it: put it before")
        if not self.yes.strip() or not self.no.strip() or self.yes == self.no:
            raise ConfigError(f"task.yes = {self.yes!r}, task.no = {self.no!r}: give two different words")

    @property
    def needs(self) -> str:  # type: ignore[override]
        """ "place" for a head, else "answer_token"."""
        return "place" if self.form == "score" else "answer_token"

    def encode(self, examples: Sequence[Question], tokens: Tokens) -> list[Feature]:
        """One feature per question: a trunk and its branches. Raises ConfigError where the tokenizer has no token for an answer, or no chat template."""
        if not examples:
            return []
        prompts = cast(PromptTokens, tokens)
        around = self._around(prompts)
        answers = self._answers(prompts, around, self.width(examples))
        return [self._feature(row, question, prompts, around, answers) for row, question in enumerate(examples)]

    def collate(self, features: Sequence[Feature], tokens: Tokens) -> Batch:
        """The trees of B features; at and token (M,) int64: what is asked; pick and weight (B, C, L): which of it counts for an option, and how much."""
        import torch

        asked = [cast(_Prompt, feature).asked for feature in features]
        batch = cast(PromptTokens, tokens).join([feature.encodings for feature in features]) | labels(features)
        rows = np.repeat(np.arange(len(asked)), [len(one.at) for one in asked])
        at, token, option, weight = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        pick, dense = _dense(rows * batch["blank"].shape[1] + option, weight, batch["blank"].numel())
        shape = (*batch["blank"].shape, pick.shape[1])
        arrays = {"at": rows * batch["input_ids"].shape[1] + at, "token": token, "pick": pick.reshape(shape), "weight": dense.reshape(shape)}
        if self.needs == "place":
            del arrays["token"]
        return batch | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """(M,) or (M, 1) → (B, C): the weighted sum of what counts for an option; a blank one scores below every real one."""
        weight = batch["weight"]
        counted = output.reshape(-1)[batch["pick"]].masked_fill(weight == 0, 0.0)  # (B, C, L)
        return super().scores((counted * weight).sum(-1), batch)

    def views(self) -> dict[str, View]:
        """Half the tokens, "short"; for letters in one order also "orders", all cyclic orders, scored beside the usual one."""
        if self.form != "letter" or self.orders > 1 or not self._may_reorder:
            return super().views()
        return super().views() | {"orders": View(replace(self, orders=len(LETTERS)), more=True)}

    def sizes(self, examples: Sequence[Question], context_chars: np.ndarray | None = None) -> np.ndarray:
        """Tokens of a question's tree (N,) float64, by the characters of its parts: what is shared counts once."""
        context = np.array([len(question.context) for question in examples]) if context_chars is None else np.asarray(context_chars)
        prompt = np.array([len(question.prompt) for question in examples])
        options = self._per_option(examples, lambda question: [len(option) for option in question.options]).astype(np.float64)
        head, tail = _split(_parsed(self._text("template")))
        shared, each = prompt + _chars(head), options + _chars(_parsed(self._text("option_template")))  # (N,), (N, C)
        if self.form == "letter":
            block = (options + _chars(_parsed(self._text("choices_template"))) + 1).sum(1) + _chars(tail)
            orders = min(self.orders, options.shape[1]) if self.orders > 1 else 0
            shared, each = shared + (0 if orders else block), np.repeat(block[:, None], orders, 1)
        branches = each / _CHARS_PER_TOKEN
        fixed = shared / _CHARS_PER_TOKEN + _SPECIAL_TOKENS + _CHAT_TOKENS * self.chat
        room = np.maximum(fixed, self.max_length - branches.max(1, initial=0))
        return np.minimum(fixed + context / _CHARS_PER_TOKEN, room) + branches.sum(1)

    def _hard_loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Of the base, or (B,) the mean of each real option's binary cross-entropy; label smoothing spreads the right one's share as there."""
        if self.objective == "options":
            return super()._hard_loss(scores, batch)
        import torch.nn.functional as F

        real = (~batch["blank"]).to(scores.dtype)
        goal = F.one_hot(batch["target"], scores.shape[1]).to(scores.dtype) * (1 - self.label_smoothing)
        goal = goal + self.label_smoothing * real / real.sum(1, keepdim=True)
        return (F.binary_cross_entropy_with_logits(scores, goal, reduction="none") * real).sum(1) / real.sum(1)

    @property
    def _usual(self) -> _Usual:
        return _FORMS[self.form]

    def _text(self, key: str) -> str:
        """The template of that name."""
        own: str = getattr(self, key)
        usual: str = getattr(self._usual, key)
        return own or (usual.removeprefix(" ") if self.chat else usual)  # a chat template has put white space before the answer

    @property
    def _may_reorder(self) -> bool:
        """Whether the context stands before the options, or nowhere."""
        return "context" not in _fields(_split(_parsed(self._text("template")))[1])

    def _around(self, prompts: PromptTokens) -> tuple[str, str]:
        """What the chat template puts before and after the user's message."""
        if not self.chat:
            return "", ""
        parts = prompts.chat([{"role": "user", "content": _HOLE}]).split(_HOLE)
        if len(parts) != 2:
            raise ConfigError(f"task.chat = true: the model's chat template has the user's message {len(parts) - 1} times instead of once: set task.chat = false")
        return parts[0], parts[1]

    def _answers(self, prompts: PromptTokens, around: tuple[str, str], options: int) -> list[int]:
        """Ids of the letters, or of yes and no, behind a text such as this task makes."""
        if self.form not in ("letter", "yes_no"):
            return []
        tree = self._tree(Question("", "x", ("x",) * options, context="x"), prompts, around)
        words = [self.yes, self.no] if self.form == "yes_no" else LETTERS[:options]
        return prompts.letter_ids(words, tree.trunk + (tree.branches[0] if tree.branches else ""))

    def _tree(self, question: Question, prompts: PromptTokens, around: tuple[str, str]) -> _Tree:
        """A question's texts."""
        shown = [index for index, option in enumerate(question.options) if option.strip()]
        values = {"context": prompts.plain(question.context), "prompt": prompts.plain(question.prompt)}
        options = [prompts.plain(option) for option in question.options]
        template = _parsed(self._text("template"))
        if self.form != "letter":
            branches = [_lettered(self._text("option_template"), options, [index], LETTERS[index]) for index in shown]
            return self._wrapped(_filled(template, values), branches, [[index] for index in shown], around)
        orders = [shown[first:] + shown[:first] for first in range(min(self.orders, len(shown)))]
        blocks = [_lettered(self._text("choices_template"), options, order, LETTERS) for order in orders]
        if self.orders == 1:
            return self._wrapped(_filled(template, values | {"options": "".join(blocks)}), [], orders, around)
        head, tail = _split(template)
        return self._wrapped(_filled(head, values), [_filled(tail, values | {"options": block})[0] for block in blocks], orders, around)

    def _wrapped(self, filled: tuple[str, tuple[int, int]], branches: list[str], orders: list[list[int]], around: tuple[str, str]) -> _Tree:
        """The texts, inside the chat template if there is one, without the white space at the message's ends. orders: of the options of each branch.

        Without chat, white space goes from the trunk's end to the branches: most tokenizers join it with the word that follows, others lose it there.
        """
        text, cut = filled
        if not self.chat:
            trunk = text.rstrip() if branches else text
            return _Tree(trunk, cut, [text[len(trunk) :] + branch for branch in branches], orders)
        before, after = around
        shift = len(before) - (len(text) - len(text.lstrip()))
        cut = max(len(before), cut[0] + shift), max(len(before), cut[1] + shift)
        if self.form == "likelihood" or not branches:  # the message ends with the trunk
            return _Tree(before + text.strip() + after, cut, branches, orders)
        return _Tree(before + text.lstrip(), cut, [branch.rstrip() + after for branch in branches], orders)

    def _feature(self, row: int, question: Question, prompts: PromptTokens, around: tuple[str, str], answers: list[int]) -> Feature:
        tree = self._tree(question, prompts, around)
        branches = [_clipped(prompts.branch(text), prompts.limit // 2) for text in tree.branches]
        trunk = self._trunk(tree, prompts, max((len(branch["input_ids"]) for branch in branches), default=0))
        asked = self._ask(len(trunk["input_ids"]), [branch["input_ids"] for branch in branches], tree.orders, answers)
        answer, _, soft = label(question)
        blank = tuple(index not in asked.option for index in range(len(question.options)))  # one that the tokenizer makes nothing of is blank, too
        branches = [branch for branch in branches if len(branch["input_ids"])]
        return _Prompt(row, (trunk, *branches), (answer, blank, soft), joined=True, asked=asked)

    def _trunk(self, tree: _Tree, prompts: PromptTokens, longest: int) -> Encoding:
        """The trunk beside a branch of `longest` tokens: what is not context stays, up to the model's limit."""
        bare = tree.trunk[: tree.cut[0]] + tree.trunk[tree.cut[1] :]
        least = len(prompts.prompt(bare, (0, 0), max_length=prompts.limit)["input_ids"])
        return prompts.prompt(tree.trunk, tree.cut, max_length=min(max(self.max_length - longest, least), prompts.limit - longest))

    def _ask(self, trunk: int, branches: list[np.ndarray], orders: list[list[int]], answers: list[int]) -> _Asked:
        """What is asked of a tree whose trunk has `trunk` tokens; places are columns of its row."""
        asked: list[tuple[int, int, int, float]] = []
        end = trunk
        for branch, order in zip(branches or [np.empty(0, np.int32)] * len(orders), orders, strict=True):
            begin, end = end, end + len(branch)
            last = end - 1
            if branches and begin == end:  # nothing there to ask
                continue
            if self.form == "letter":
                asked += [(last, letter, option, 1 / len(orders)) for letter, option in zip(answers, order, strict=False)]
            elif self.form == "yes_no":
                asked += [(last, answers[0], order[0], 1.0), (last, answers[1], order[0], -1.0)]
            elif self.form == "likelihood":
                before = [trunk - 1, *range(begin, last)]
                asked += [(at, int(token), order[0], 1 / len(branch) if self.normalise else 1.0) for at, token in zip(before, branch, strict=False)]
            else:
                asked += [(last, 0, order[0], 1.0)]
        at, token, option, weight = zip(*asked, strict=True) if asked else ((),) * 4
        return _Asked(np.array(at, np.int64), np.array(token, np.int64), np.array(option, np.int64), np.array(weight, np.float32))


class _Tree(NamedTuple):
    """cut: characters of the trunk that may go, from their end. orders: the options that each branch shows (without branches: the trunk)."""

    trunk: str
    cut: tuple[int, int]
    branches: list[str]
    orders: list[list[int]]


class _Asked(NamedTuple):
    """What is asked of a row, each (A,): the column, the token, the option for which it counts, and how much."""

    at: np.ndarray
    token: np.ndarray
    option: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class _Prompt(Feature):
    asked: _Asked = field(kw_only=True)


def _either(forms: Sequence[str]) -> str:
    """For a message: "a", "b" or "c"."""
    quoted = [f'"{form}"' for form in forms]
    return " or ".join(part for part in (", ".join(quoted[:-1]), quoted[-1]) if part)


@lru_cache
def _parsed(template: str) -> _Template:
    """The parts of a template. Raises ValueError."""
    parts = list(Formatter().parse(template))
    if any(name == "" or layout or conversion for _, name, layout, conversion in parts):
        raise ValueError("a field is a name and nothing else")
    return tuple((literal, name or "") for literal, name, _, _ in parts)


def _fields(template: _Template) -> list[str]:
    return [name for _, name in template if name]


def _chars(template: _Template) -> int:
    return sum(len(literal) for literal, _ in template)


def _check(key: str, text: str, needed: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError where a template lacks a field, has a strange one, or one twice."""
    try:
        names = _fields(_parsed(text))
    except ValueError as error:
        raise ConfigError(f"task.{key} = {text!r}: {str(error).lower()}: a brace in the text is written {{{{ or }}}}") from None
    for name in needed:
        if name not in names:
            raise ConfigError(f"task.{key} = {text!r} has no {{{name}}}: put it where the {name} goes")
    for name in names:
        if name == "options" and "options" not in needed:
            raise ConfigError(f'task.{key} = {text!r}: {{options}} is for task.form = "letter": leave it out or change the form')
        if name not in known:
            raise ConfigError(f"task.{key} = {text!r}: {{{name}}} is unknown{nearest(name, known)}")
        if names.count(name) > 1:
            raise ConfigError(f"task.{key} = {text!r} has {{{name}}} twice: leave one of them out")


def _split(template: _Template) -> tuple[_Template, _Template]:
    """What stands before the options, and the rest."""
    at = next((index for index, (_, name) in enumerate(template) if name == "options"), len(template))
    return (template, ()) if at == len(template) else ((*template[:at], (template[at][0], "")), (("", "options"), *template[at + 1 :]))


def _filled(template: _Template, values: Mapping[str, str]) -> tuple[str, tuple[int, int]]:
    """The text, and where the context is in it. Behind a blank context the white space goes."""
    text, cut, bare = "", (0, 0), False
    for literal, name in template:
        text += literal.lstrip() if bare else literal
        value = values[name] if name else ""
        bare = name == "context" and not value.strip()
        if name == "context" and not bare:
            cut = len(text), len(text) + len(value)
        text += "" if bare else value
    return text, cut


def _lettered(template: str, options: Sequence[str], order: Sequence[int], letters: Sequence[str]) -> str:
    """The options in this order, each in the template beside the next letter."""
    return "".join(_filled(_parsed(template), {"option": options[index], "letter": letter})[0] for index, letter in zip(order, letters, strict=False))


def _clipped(encoding: Encoding, limit: int) -> Encoding:
    """The last `limit` tokens."""
    return {name: array[-limit:] for name, array in encoding.items()}


def _dense(slot: np.ndarray, weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `slots` the positions (slots, L) of what belongs to it, in their order, and their weights; 0 where there are fewer."""
    order = np.argsort(slot, kind="stable")
    ranked = slot[order]
    rank = np.arange(len(slot)) - np.searchsorted(ranked, ranked)
    shape = (slots, int(rank.max(initial=-1)) + 1)
    pick, dense = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    pick[ranked, rank], dense[ranked, rank] = order, weight[order]
    return pick, dense
