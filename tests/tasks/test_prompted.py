"""Prompts as trees: texts and places computed by hand, what is asked of them, scores, losses, templates that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kit.errors import ConfigError
from kit.models.causal import Causal
from kit.models.tokens import FILE, HFTokens
from kit.predict import predict
from kit.runtime import choose
from kit.tasks import Feature
from kit.tasks.multiple_choice import LETTERS, MultipleChoice, Question
from kit.tasks.prompted import Prompted, _dense
from tests import tiny

QUESTION = Question("0", "Which words?", ("red light", "dark soil", "snow"), 1, "Fresh snow has a high albedo.")
BLANK = replace(QUESTION, options=("red light", " ", "snow"), answer=2)
SHARED = "Fresh snow has a high albedo.\n\nQuestion: Which words?"
FORMS = ("likelihood", "letter", "yes_no", "score")
CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens as Llama 3 has them, with a chat template."""
    made = tmp_path_factory.mktemp("tokens")
    tiny.prompting(made, "llama3")
    (made / "chat_template.jinja").write_text(CHAT)
    return made


@pytest.fixture(scope="module")
def tokens(folder: Path) -> HFTokens:
    return HFTokens(folder, limit=2048)


@pytest.fixture(scope="module")
def library(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / FILE))


def ids(library: Tokenizer, text: str) -> list[int]:
    """What the library makes of the text, where special tokens have their names."""
    return library.encode(text, add_special_tokens=False).ids


def texts(library: Tokenizer, feature: Feature) -> list[str]:
    return [library.decode(encoding["input_ids"].tolist(), skip_special_tokens=False) for encoding in feature.encodings]


class Table(nn.Module):
    """log p(token | the token at the place), a table drawn at random; for heads (no token asked for) its first column."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).log_softmax(-1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        before = batch["input_ids"].flatten()[batch["at"]]
        return self.table[before, batch["token"]] if "token" in batch else self.table[before, :1]


@pytest.fixture(scope="module")
def table(tokens: HFTokens) -> Table:
    return Table(len(tokens))


def scored(task: Prompted, questions: list[Question], tokens: HFTokens, model: nn.Module) -> Tensor:
    batch = task.collate(task.encode(questions, tokens), tokens)
    return task.scores(model(batch), batch)


# trees


def test_likelihood_asks_for_every_token_of_every_option(tokens: HFTokens, library: Tokenizer, table: Table) -> None:
    task = Prompted(form="likelihood")
    (feature,) = task.encode([QUESTION], tokens)
    trunk = ids(library, f"<|begin_of_text|>{SHARED}\nAnswer:")
    branches = [ids(library, f" {option}") for option in QUESTION.options]
    assert [encoding["input_ids"].tolist() for encoding in feature.encodings] == [trunk, *branches]
    assert feature.joined and feature.shape == (1, len(trunk) + sum(map(len, branches))) and feature.target == (1, (False,) * 3, None)
    batch = task.collate([feature], tokens)
    at, token, expected, begin = [], [], [], len(trunk)
    for branch in branches:
        at += [len(trunk) - 1, *range(begin, begin + len(branch) - 1)]
        token += branch
        before = [trunk[-1], *branch[:-1]]
        expected.append(sum(table.table[a, b] for a, b in zip(before, branch, strict=True)))
        begin += len(branch)
    assert (batch["at"].tolist(), batch["token"].tolist()) == (at, token)
    torch.testing.assert_close(scored(task, [QUESTION], tokens, table)[0], torch.stack(expected))
    lengths = torch.tensor([len(branch) for branch in branches])
    assert len({*lengths.tolist()}) > 1
    torch.testing.assert_close(scored(replace(task, normalise=True), [QUESTION], tokens, table)[0], torch.stack(expected) / lengths)


def test_letters_are_asked_for_at_the_end_of_the_trunk(tokens: HFTokens, library: Tokenizer, table: Table) -> None:
    task = Prompted(form="letter")
    (feature,) = task.encode([QUESTION], tokens)
    trunk = ids(library, f"<|begin_of_text|>{SHARED}\nA. red light\nB. dark soil\nC. snow\nAnswer:")
    letters = [library.token_to_id(f"Ġ{letter}") for letter in "ABC"]
    assert [encoding["input_ids"].tolist() for encoding in feature.encodings] == [trunk] and feature.joined
    batch = task.collate([feature, feature], tokens)
    assert batch["at"].tolist() == [len(trunk) - 1] * 3 + [2 * len(trunk) - 1] * 3
    assert batch["token"].tolist() == letters * 2
    expected = table.table[trunk[-1], letters]
    torch.testing.assert_close(scored(task, [QUESTION, QUESTION], tokens, table), torch.stack([expected, expected]))


def test_letters_in_cyclic_orders_are_branches_whose_log_probabilities_are_averaged(tokens: HFTokens, library: Tokenizer) -> None:
    task = Prompted(form="letter", orders=9)
    (feature,) = task.encode([QUESTION], tokens)
    blocks = ["\nA. red light\nB. dark soil\nC. snow\nAnswer:", "\nA. dark soil\nB. snow\nC. red light\nAnswer:", "\nA. snow\nB. red light\nC. dark soil\nAnswer:"]
    trunk, *branches = (ids(library, text) for text in (f"<|begin_of_text|>{SHARED}", *blocks))
    assert [encoding["input_ids"].tolist() for encoding in feature.encodings] == [trunk, *branches]
    ends = np.cumsum([len(trunk), *map(len, branches)])[1:] - 1
    batch = task.collate([feature], tokens)
    assert batch["at"].tolist() == np.repeat(ends, 3).tolist()
    assert batch["token"].tolist() == [library.token_to_id(f"Ġ{letter}") for letter in "ABC"] * 3
    output = torch.arange(9.0)  # order 0: A, B, C; order 1 …
    expected = [(0 + 5 + 7) / 3, (1 + 3 + 8) / 3, (2 + 4 + 6) / 3]  # option 0 is A, then C, then B
    torch.testing.assert_close(task.scores(output, batch), torch.tensor([expected]))
    assert len(replace(task, orders=2).encode([QUESTION], tokens)[0].encodings) == 3


def test_what_a_letter_gains_by_its_place_drops_out_over_all_orders(tokens: HFTokens) -> None:
    task = Prompted(form="letter", orders=5)
    (question,) = tiny.questions(1)
    batch = task.collate(task.encode([question], tokens), tokens)
    liking, place = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7]), torch.tensor([5.0, -3.0, 1.0, 0.0, -8.0])
    shown = [[(first + letter) % 5 for letter in range(5)] for first in range(5)]
    output = torch.cat([(liking[order] + place).log_softmax(-1) for order in shown])
    torch.testing.assert_close(task.scores(output, batch).softmax(-1)[0], liking.softmax(-1))


def test_yes_and_no_are_asked_for_behind_every_option(tokens: HFTokens, library: Tokenizer, table: Table) -> None:
    task = Prompted(form="yes_no", option_template="({letter}) {option} {{?}}\nRight:", yes="Yes", no="No")
    (feature,) = task.encode([QUESTION], tokens)
    trunk, *branches = (
        ids(library, text)
        for text in (f"<|begin_of_text|>{SHARED}", *(f"\n({letter}) {option} {{?}}\nRight:" for letter, option in zip("ABC", QUESTION.options, strict=True)))
    )
    assert [encoding["input_ids"].tolist() for encoding in feature.encodings] == [trunk, *branches]
    ends = np.cumsum([len(trunk), *map(len, branches)])[1:] - 1
    yes, no = library.token_to_id("ĠYes"), library.token_to_id("ĠNo")
    batch = task.collate([feature], tokens)
    assert (batch["at"].tolist(), batch["token"].tolist()) == (np.repeat(ends, 2).tolist(), [yes, no] * 3)
    last = [branch[-1] for branch in branches]
    torch.testing.assert_close(scored(task, [QUESTION], tokens, table)[0], table.table[last, yes] - table.table[last, no])


def test_a_head_reads_the_last_token_of_every_option(tokens: HFTokens, library: Tokenizer, table: Table) -> None:
    task = Prompted(form="score")
    (feature,) = task.encode([QUESTION], tokens)
    trunk, *branches = (ids(library, text) for text in (f"<|begin_of_text|>{SHARED}", *(f"\nAnswer: {option}" for option in QUESTION.options)))
    assert [encoding["input_ids"].tolist() for encoding in feature.encodings] == [trunk, *branches]
    batch = task.collate([feature], tokens)
    assert batch["at"].tolist() == (np.cumsum([len(trunk), *map(len, branches)])[1:] - 1).tolist() and "token" not in batch
    torch.testing.assert_close(scored(task, [QUESTION], tokens, table)[0], table.table[[branch[-1] for branch in branches], 0])
    assert {form: Prompted(form=form).needs for form in FORMS} == dict.fromkeys(FORMS, "answer_token") | {"score": "place"}
    assert {Prompted(form=form).outputs for form in FORMS} == {1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orders", [1, 3])
def test_a_batch_of_questions_is_scored_as_each_alone(tokens: HFTokens, table: Table, form: str, orders: int) -> None:
    task = Prompted(form=form, orders=orders if form == "letter" else 1)
    examples = [*tiny.questions(4, 3), QUESTION, BLANK, replace(QUESTION, options=(" ", "", ""), answer=None), replace(QUESTION, context="", prompt="")]
    together = scored(task, examples, tokens, table)
    assert together.shape == (8, 3) and torch.isfinite(together).all()
    for row, question in enumerate(examples):
        torch.testing.assert_close(scored(task, [question], tokens, table)[0], together[row])
    assert (together[6] == together[6, 0]).all() and together[5, 1] < together[5, [0, 2]].min()
    features = task.encode(examples, tokens)
    assert [feature.row for feature in features] == [*range(8)] and all(feature.joined for feature in features)
    kept = predict(table, task, features, tokens, runtime=choose("fp32", "cpu"), batch_tokens=300)
    np.testing.assert_allclose(np.stack(kept), together.detach().numpy(), atol=1e-6)
    prediction = task.decode(kept, features, examples)
    assert prediction.shape == (8, 3) and (np.isfinite(prediction)).all()


@pytest.mark.parametrize(("orders", "shown"), [(1, ["\nA. red light\nB. snow\nAnswer:"]), (3, ["\nA. red light\nB. snow\nAnswer:", "\nA. snow\nB. red light\nAnswer:"])])
def test_a_blank_option_has_no_letter_and_no_branch(tokens: HFTokens, library: Tokenizer, orders: int, shown: list[str]) -> None:
    task = Prompted(form="letter", orders=orders)
    (feature,) = task.encode([BLANK], tokens)
    found = texts(library, feature)
    assert "".join(found[:1] if orders == 1 else found[1:]).endswith("".join(shown)) and len(found) == (1 if orders == 1 else 3)
    assert feature.target == (2, (False, True, False), None)
    batch = task.collate([feature], tokens)
    scores = task.scores(torch.arange(len(batch["at"])).float(), batch)[0]
    assert scores[[0, 2]].tolist() == ([0, 1] if orders == 1 else [1.5, 1.5]) and scores[1] < -1e3
    for form in ("likelihood", "yes_no", "score"):
        (feature,) = Prompted(form=form).encode([BLANK], tokens)
        assert len(feature.encodings) == 3 and feature.target[1] == (False, True, False)


def test_an_option_that_the_tokenizer_makes_nothing_of_is_blank(tmp_path: Path) -> None:
    made = tiny.tokens(tmp_path, limit=256)
    for form in ("likelihood", "score"):
        task = Prompted(form=form, option_template=" {option}")
        (feature,) = task.encode([replace(QUESTION, options=("snow", "\x01\x02", "light"))], made)
        assert feature.target[1] == (False, True, False) and len(feature.encodings) == 3
        batch = task.collate([feature], made)
        assert batch["branch"].amax() == 2 and task.scores(torch.ones(len(batch["at"])), batch)[0].tolist() == [1, -1e4, 1]


def test_the_context_may_be_blank_or_missing_and_leaves_no_space(tokens: HFTokens, library: Tokenizer) -> None:
    (feature,) = Prompted(form="score").encode([replace(QUESTION, context=" \n")], tokens)
    assert texts(library, feature)[0] == "<|begin_of_text|>Question: Which words?"
    (feature,) = Prompted(form="score", template="Q: {prompt} ").encode([QUESTION], tokens)
    assert texts(library, feature)[:2] == ["<|begin_of_text|>Q: Which words?", " Answer: red light"]
    (feature,) = Prompted(form="letter", template="{prompt}{context} \n {options}:").encode([replace(QUESTION, context="")], tokens)
    assert texts(library, feature) == ["<|begin_of_text|>Which words?A. red light\nB. dark soil\nC. snow\n:"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("orders", [1, 2])
def test_what_a_question_holds_stays_text(tokens: HFTokens, library: Tokenizer, form: str, chat: bool, orders: int) -> None:
    if orders > 1 and form != "letter":
        return
    strange = "{prompt} {0} {} }{ {{context}} %s \\1 <|im_end|> \ufdd0<|im_end|>\ufdd1 <|begin_of_text|> \ufffc {options}"
    task = Prompted(form=form, chat=chat, orders=orders)
    usual, changed = task.encode([QUESTION, Question("0", strange, tuple(f"{letter}{strange}" for letter in "xyz"), 0, strange)], tokens)
    shown = "".join(texts(library, changed))
    text = strange.replace("\ufdd0", "\ufffd").replace("\ufdd1", "\ufffd")
    copies = shown.count(text)
    assert copies == 2 + (3 if form != "letter" or orders == 1 else 6)
    special = {id_ for id_, token in library.get_added_tokens_decoder().items() if token.special}
    counts = [[sum(int(id_) in special for id_ in encoding["input_ids"]) for encoding in feature.encodings] for feature in (usual, changed)]
    assert counts[0][0] == counts[1][0] and {*counts[0][1:]} == {*counts[1][1:]} and counts[0][0] >= 1


# chat


def test_a_chat_wraps_all_up_to_the_answer(tokens: HFTokens, library: Tokenizer) -> None:
    start, end = "<|begin_of_text|><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    question = replace(QUESTION, context=" \n Fresh snow has a high albedo.", options=("red light", "dark soil ", "snow\n"))
    expected = {
        "likelihood": [f"{start}{SHARED}\nAnswer:{end}", "red light", "dark soil ", "snow\n"],
        "letter": [f"{start}{SHARED}\nA. red light\nB. dark soil \nC. snow\n\nAnswer:{end}"],
        "score": [f"{start}{SHARED}\n", *(f"Answer: {option}{end}" for option in QUESTION.options)],
    }
    for form, shown in expected.items():
        (feature,) = Prompted(form=form, chat=True).encode([question], tokens)
        assert texts(library, feature) == shown
        assert feature.encodings[0]["input_ids"].tolist() == ids(library, shown[0])
        assert sum(encoding["input_ids"].tolist().count(library.token_to_id("<|im_end|>")) for encoding in feature.encodings) == (3 if form == "score" else 1)
    task = Prompted(form="letter", chat=True, orders=2)
    (feature,) = task.encode([QUESTION], tokens)
    assert texts(library, feature)[1:] == [f"A. red light\nB. dark soil\nC. snow\nAnswer:{end}", f"A. dark soil\nB. snow\nC. red light\nAnswer:{end}"]
    letters = task.collate([feature], tokens)["token"].tolist()
    assert letters == [library.token_to_id(letter) for letter in "ABC"] * 2, "behind a line's end there is no space"


def test_in_a_chat_too_the_context_is_what_is_cut(tokens: HFTokens, library: Tokenizer) -> None:
    context = " ".join(f"Fresh snow {number} has a high albedo." for number in range(30))
    question = replace(QUESTION, context=f" \n {context}")
    (whole,), (cut,) = (Prompted(form="letter", chat=True, max_length=length).encode([question], tokens) for length in (1024, 100))
    assert whole.tokens > 150 and cut.tokens == 100
    (shown,) = texts(library, cut)
    kept = shown.removeprefix("<|begin_of_text|><|im_start|>user\n").partition("\n\nQuestion: Which words?")[0]
    assert context.startswith(kept) and len(kept) > 20
    assert shown.startswith("<|begin_of_text|><|im_start|>user\nFresh snow 0 has")
    assert shown.endswith("A. red light\nB. dark soil\nC. snow\nAnswer:<|im_end|>\n<|im_start|>assistant\n")


def test_a_chat_template_that_loses_the_message_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    task = Prompted(chat=True)
    with pytest.raises(ConfigError, match=r"holds a chat template: set task\.chat = false"):
        task.encode([QUESTION], HFTokens(tmp_path))
    for template, times in (("Hello", 0), ("{{ messages[0].content }} {{ messages[0].content }}", 2)):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ConfigError, match=rf"task\.chat = true: the model's chat template has the user's message {times} times instead of once: set"):
            task.encode([QUESTION], HFTokens(tmp_path))


# lengths


@pytest.mark.parametrize("form", FORMS)
def test_the_trunk_and_its_longest_branch_fit_and_question_and_options_stay(tokens: HFTokens, library: Tokenizer, form: str) -> None:
    question = replace(QUESTION, context=" ".join(["Fresh snow has a high albedo."] * 30))
    for length in (120, 80, 8):
        (feature,) = Prompted(form=form, max_length=length).encode([question], tokens)
        trunk, *branches = (len(encoding["input_ids"]) for encoding in feature.encodings)
        shown = texts(library, feature)
        if length > 8:
            assert trunk + max(branches, default=0) == length and shown[0].startswith("<|begin_of_text|>Fresh snow has")
        else:
            assert shown[0].startswith(("<|begin_of_text|>\n\nQuestion: Which", "<|begin_of_text|>\nQuestion: Which")), "all of the context is gone"
        assert all(option in "".join(shown) for option in ("Which words?", *QUESTION.options))


@pytest.mark.parametrize("form", FORMS)
def test_beyond_the_models_positions_the_beginning_goes(folder: Path, library: Tokenizer, form: str) -> None:
    tokens = HFTokens(folder, limit=40)
    question = Question("0", "Which words stand in this text? " * 9, ("snow", "dark soil " * 30, "light"), 0, "Fresh snow has a high albedo.")
    (feature,) = Prompted(form=form).encode([question], tokens)
    trunk, *branches = (len(encoding["input_ids"]) for encoding in feature.encodings)
    assert trunk + max(branches, default=0) <= 40 and trunk >= 2
    assert feature.encodings[0]["input_ids"][0] == tokens.bos_id
    batch = Prompted(form=form).collate([feature], tokens)
    assert batch["position_ids"].amax() < 40 and torch.isfinite(Table(len(tokens))(batch)).all()


# numbers that come from a real decoder


@pytest.mark.parametrize("sharing", ["tree", "cache", "none"])
def test_likelihoods_are_those_of_the_librarys_model_on_the_whole_text(folder: Path, tokens: HFTokens, library: Tokenizer, tmp_path: Path, sharing: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "initializer_range": 0.3}
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokens), pad_token_id=0, **sizes)).eval()
    stock.save_pretrained(tmp_path)
    model = Causal.create(tmp_path, outputs=1, sharing=sharing).eval()
    examples = [QUESTION, BLANK, *tiny.questions(3, 3)]
    with torch.no_grad():
        found = scored(Prompted(form="likelihood"), examples, tokens, model)
        letters = scored(Prompted(form="letter"), examples, tokens, model)
        for row, question in enumerate(examples):
            before = ids(library, f"<|begin_of_text|>{question.context}\n\nQuestion: {question.prompt}\nAnswer:")
            for place, option in enumerate(question.options):
                whole = ids(library, f"<|begin_of_text|>{question.context}\n\nQuestion: {question.prompt}\nAnswer: {option}")
                log_p = stock(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                expected = sum(log_p[at - 1, whole[at]] for at in range(len(before), len(whole)))
                assert option == " " or found[row, place].item() == pytest.approx(float(expected), abs=2e-4)
            block = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, [option for option in question.options if option.strip()], strict=False))
            whole = ids(library, f"<|begin_of_text|>{question.context}\n\nQuestion: {question.prompt}\n{block}Answer:")
            log_p = stock(input_ids=torch.tensor([whole])).logits[0, -1].log_softmax(-1)
            shown = [place for place, option in enumerate(question.options) if option.strip()]
            expected = log_p[[library.token_to_id(f"Ġ{LETTERS[number]}") for number in range(len(shown))]]
            torch.testing.assert_close(letters[row, shown], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny.PROMPTING)
@pytest.mark.parametrize("form", FORMS)
def test_every_family_of_tokenizers_gives_the_tokens_of_the_whole_text(family: str, form: str, tmp_path: Path) -> None:
    tokens = tiny.prompting(tmp_path, family)
    library = Tokenizer.from_file(str(tmp_path / FILE))
    before = "\nAnswer:" if form == "likelihood" else ""
    after = {"likelihood": " {}", "yes_no": "\nProposed answer: {}\nIs the proposed answer right? Yes or No:", "score": "\nAnswer: {}"}
    task = Prompted(form=form, orders=2 if form == "letter" else 1)
    (feature,) = task.encode([QUESTION], tokens)
    trunk, *branches = (encoding["input_ids"].tolist() for encoding in feature.encodings)
    blocks = ["\nA. red light\nB. dark soil\nC. snow\nAnswer:", "\nA. dark soil\nB. snow\nC. red light\nAnswer:"]
    wholes = [SHARED + before + after[form].format(option) for option in QUESTION.options] if form != "letter" else [SHARED + block for block in blocks]
    leading = tokens.prompt("", (0, 0), max_length=9)["input_ids"].tolist() if family not in ("gpt2", "t5") else []
    if family == "llama3":  # "?" and the line's end are one token there, unless a branch begins between them
        assert [library.decode(trunk + branch, skip_special_tokens=False) for branch in branches] == ["<|begin_of_text|>" + whole for whole in wholes]
    else:
        assert [trunk + branch for branch in branches] == [leading + ids(library, whole) for whole in wholes]
    batch = task.collate([feature], tokens)
    if "token" in batch and form != "likelihood":
        expected = {"letter": " A", "yes_no": " Yes"}[form]
        assert batch["token"][0] == ids(library, f"Answer:{expected}")[-1]


# losses


def test_the_loss_is_that_of_the_options(tokens: HFTokens) -> None:
    batch = {"target": torch.tensor([1, 0]), "blank": torch.zeros(2, 3, dtype=torch.bool)}
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    for form in FORMS:
        torch.testing.assert_close(Prompted(form=form).loss(scores, batch), F.cross_entropy(scores, batch["target"]))


@pytest.mark.parametrize("form", ["yes_no", "score"])
def test_binary_loss_takes_each_option_by_itself(form: str) -> None:
    scores = torch.tensor([[1.0, 2.0, -1e4], [0.3, -1.0, 3.0]], requires_grad=True)
    batch = {"target": torch.tensor([1, 0]), "blank": torch.tensor([[False, False, True], [False] * 3])}
    loss = Prompted(form=form, objective="binary").loss(scores, batch)
    rows = [F.binary_cross_entropy_with_logits(scores[0, :2], torch.tensor([0.0, 1.0])), F.binary_cross_entropy_with_logits(scores[1], torch.tensor([1.0, 0, 0]))]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    loss.backward()
    assert scores.grad is not None and scores.grad[0, 2] == 0
    smooth = Prompted(form=form, objective="binary", label_smoothing=0.3).loss(scores, batch)
    goals = torch.tensor([0.15, 0.85]), torch.tensor([0.8, 0.1, 0.1])
    rows = [F.binary_cross_entropy_with_logits(scores[0, :2], goals[0]), F.binary_cross_entropy_with_logits(scores[1], goals[1])]
    torch.testing.assert_close(smooth, torch.stack(rows).mean())


@pytest.mark.parametrize("settings", [*({"form": form} for form in FORMS), *({"form": form, "objective": "binary"} for form in ("yes_no", "score"))])
def test_a_teachers_share_of_the_loss_is_the_same_in_every_form(settings: dict[str, Any]) -> None:
    scores = torch.tensor([[1.0, 2.0, -1e4], [0.3, -1.0, 3.0], [0.1, 0.2, 0.3]])
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.5, 0.3], [math.nan] * 3])  # nobody taught the last
    batch = {"target": torch.tensor([1, 0, 2]), "blank": torch.tensor([[False, False, True], [False] * 3, [False] * 3])}
    hard = torch.stack([Prompted(**settings).loss(scores[[row]], {name: value[[row]] for name, value in batch.items()}) for row in range(3)])
    logs = scores.log_softmax(-1)
    taught = -(soft[:2] * logs[:2]).sum(1)
    expected = torch.cat([0.6 * hard[:2] + 0.4 * taught, hard[2:]]).mean()
    torch.testing.assert_close(Prompted(**settings, distill=0.4).loss(scores, batch | {"soft": soft}), expected)
    torch.testing.assert_close(Prompted(**settings).loss(scores, batch | {"soft": soft}), hard.mean())


@pytest.mark.parametrize("settings", [{"form": "likelihood", "normalise": True}, {"form": "letter"}, {"form": "yes_no", "objective": "binary"}, {"form": "score"}])
def test_the_loss_falls_when_the_table_learns(tokens: HFTokens, settings: dict[str, Any]) -> None:
    task, model = Prompted(**settings), Table(len(tokens))
    batch = task.collate(task.encode(tiny.questions(6, 3), tokens), tokens)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(8):
        loss = task.loss(task.scores(model(batch), batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-2, 2, width=32).filter(bool)), max_size=20))
def test_dense_holds_what_belongs_to_each_slot_in_its_order(asked: list[tuple[int, float]]) -> None:
    slot, weight = np.array([one[0] for one in asked], np.int64), np.array([one[1] for one in asked], np.float32)
    pick, dense = _dense(slot, weight, 6)
    for number in range(6):
        mine = [(index, value) for index, (owner, value) in enumerate(asked) if owner == number]
        assert [(int(a), float(b)) for a, b in zip(pick[number], dense[number], strict=True) if b] == mine
    assert pick.shape == dense.shape == (6, max([0, *np.bincount(slot).tolist()]))


def test_scores_of_a_batch_that_asks_nothing_are_blank_and_what_is_not_counted_may_be_infinite(tokens: HFTokens) -> None:
    task = Prompted()
    batch = task.collate(task.encode([replace(QUESTION, options=("", " ", ""), answer=None)], tokens), tokens)
    assert len(batch["at"]) == 0 and (task.scores(torch.empty(0), batch) == -1e4).all()
    task = Prompted(form="likelihood")
    batch = task.collate(task.encode([QUESTION], tokens), tokens)
    lengths = (batch["weight"] > 0).sum(-1)[0].tolist()
    assert min(lengths[1:]) < max(lengths)
    output = torch.ones(sum(lengths))
    output[0] = -math.inf
    assert task.scores(output, batch).tolist() == [[-math.inf, *lengths[1:]]]


def test_collate_gives_the_target_as_pair_scoring_does(tokens: HFTokens) -> None:
    task = Prompted()
    known, unknown = task.encode(tiny.questions(3), tokens), task.encode(tiny.questions(2, answers=False), tokens)
    batch = task.collate(known, tokens)
    assert batch["target"].tolist() == [0, 3, 1] and batch["blank"].shape == (3, 5)
    assert (batch["pick"].dtype, batch["weight"].dtype, batch["at"].dtype, batch["token"].dtype) == (torch.int64, torch.float32, torch.int64, torch.int64)
    assert "target" not in task.collate([*known, *unknown], tokens)
    assert task.encode([], tokens) == []


# what the planner asks for


def test_views_are_half_the_tokens_and_all_orders() -> None:
    task = Prompted(max_length=200, label_smoothing=0.1)
    assert task.views() == {"short": (replace(task, max_length=100), False), "orders": (replace(task, orders=26), True)}
    assert [*replace(task, orders=3).views()] == ["short"] and [*Prompted(form="likelihood").views()] == ["short"]
    behind = Prompted(template="{options}{prompt} {context}")
    assert [*behind.views()] == ["short"], "what orders could share stands behind the options"


def test_sizes_count_what_is_shared_once() -> None:
    question = Question("0", "p" * 40, ("a" * 4, "b" * 12), context="c" * 400)
    likelihood = Prompted(form="likelihood", template="{context}{prompt}", option_template="{option}")
    assert likelihood.sizes([question]).tolist() == [110 + 1 + 1 + 3]
    assert replace(likelihood, max_length=60).sizes([question]).tolist() == [60 - 3 + 1 + 3]
    assert replace(likelihood, max_length=8).sizes([question]).tolist() == [11 + 1 + 3], "the question stays"
    assert likelihood.sizes([question], np.array([40])).tolist() == [20 + 1 + 1 + 3]
    letter = Prompted(template="{context}{prompt}{options}...", choices_template="{letter}{option}\n\n\n")
    assert letter.sizes([question]).tolist() == [110 + 1 + (4 + 12 + 2 * 4 + 3) / 4]
    assert replace(letter, orders=2).sizes([question]).tolist() == [110 + 1 + 2 * (4 + 12 + 2 * 4 + 3) / 4]
    assert letter.views()["orders"].task.sizes([question]).tolist() == replace(letter, orders=2).sizes([question]).tolist()
    assert likelihood.sizes([]).shape == letter.sizes([]).shape == replace(letter, orders=5).sizes([]).shape == (0,)


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "letters"}, r"task\.form = 'letters' is unknown \(did you mean 'letter'\?\)"),
        ({"template": "{context} {options}"}, r"task\.template = '\{context\} \{options\}' has no \{prompt\}: put it where the prompt goes"),
        ({"template": "{context}\n{prompt}"}, r"task\.template = '\{context\}\\n\{prompt\}' has no \{options\}"),
        ({"template": "{prompt}{options}{question}"}, r"task\.template = .*: \{question\} is unknown"),
        ({"template": "{prompt}{options}{promt}"}, r"\{promt\} is unknown \(did you mean 'prompt'\?\)"),
        ({"template": "{prompt}{options}{prompt}"}, r"task\.template = .* has \{prompt\} twice: leave one of them out"),
        ({"template": "{prompt}{options} }"}, r"task\.template = .*: a brace in the text is written \{\{ or \}\}"),
        ({"template": "{prompt}{options}{0}"}, r"\{0\} is unknown"),
        ({"template": "{prompt}{options}{}"}, r"task\.template = .*: a brace in the text is written"),
        ({"template": "{prompt!r}{options}"}, r"task\.template = .*: a brace in the text is written"),
        ({"template": "{prompt:>9}{options}"}, r"task\.template = .*: a brace in the text is written"),
        ({"form": "score", "template": "{context}"}, r"task\.template = '\{context\}' has no \{prompt\}"),
        ({"form": "score", "template": "{prompt}{options}"}, r"task\.template = .*: \{options\} is for task\.form = \"letter\""),
        ({"form": "likelihood", "option_template": " {letter}"}, r"task\.option_template = ' \{letter\}' has no \{option\}: put it where the option goes"),
        ({"form": "yes_no", "option_template": "right?"}, r"task\.option_template = 'right\?' has no \{option\}"),
        ({"choices_template": "{option}"}, r"task\.choices_template = '\{option\}' has no \{letter\}"),
        ({"choices_template": "{letter}"}, r"task\.choices_template = '\{letter\}' has no \{option\}"),
        ({"option_template": "{option}"}, r'task\.option_template is for task\.form = "likelihood", "yes_no" or "score", not "letter": leave it out or change the form'),
        ({"form": "score", "choices_template": "{letter}{option}"}, r'task\.choices_template is for task\.form = "letter", not "score"'),
        ({"form": "yes_no", "orders": 2}, r'task\.orders is for task\.form = "letter", not "yes_no"'),
        ({"normalise": True}, r'task\.normalise is for task\.form = "likelihood", not "letter"'),
        ({"objective": "binary"}, r'task\.objective is for task\.form = "yes_no" or "score", not "letter"'),
        ({"form": "score", "yes": "True"}, r'task\.yes is for task\.form = "yes_no", not "score"'),
        ({"orders": 0}, r"task\.orders = 0: give 1, or the number of cyclic orders"),
        ({"orders": 2, "template": "{prompt}{options}{context}"}, r"task\.orders = 2, but task\.template has \{context\} behind \{options\}"),
        ({"form": "yes_no", "yes": "No"}, r"task\.yes = 'No', task\.no = 'No': give two different words"),
        ({"form": "yes_no", "no": " "}, r"task\.yes = 'Yes', task\.no = ' ': give two different words"),
        ({"max_length": 7}, r"task\.max_length = 7"),
        ({"label_smoothing": 1.0}, r"task\.label_smoothing = 1.0"),
    ],
)
def test_settings_without_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Prompted(**settings)
    assert "\n" not in str(error.value)


def test_letters_that_the_tokenizer_does_not_have_are_named(tokens: HFTokens) -> None:
    many = replace(QUESTION, options=tuple(f"option {number}" for number in range(26)))
    with pytest.raises(ConfigError, match=r"'[G-Z]' is \d tokens after 'Answer:' in this tokenizer, not one: .*task\.form = \"likelihood\""):
        Prompted().encode([many], tokens)
    assert Prompted(form="likelihood").encode([many], tokens)[0].tokens
    with pytest.raises(ConfigError, match=r"'Certainly' is \d+ tokens after"):
        Prompted(form="yes_no", yes="Certainly").encode([QUESTION], tokens)


def test_the_rest_is_that_of_pair_scoring() -> None:
    task = Prompted()
    assert isinstance(task, MultipleChoice) and [*task.metrics] == ["map@3", "accuracy", "accuracy@3"]
    (shuffled,) = task.augment([QUESTION], np.random.default_rng(3))
    assert shuffled.options != QUESTION.options and shuffled.options[shuffled.answer or 0] == "dark soil"
