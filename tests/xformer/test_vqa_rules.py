"""The VQA evaluator against a second one, written from the rules letter by letter; they agree on any text."""

from functools import lru_cache
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from xformer.evaluation import vqa

DIGITS = "0123456789"
PIECES = [
    "a",
    "The",
    "Two",
    "ten",
    "none",
    "dont",
    "somebody'd",
    "yes",
    "3",
    ",",
    ".",
    "...",
    "?",
    "-",
    "'",
    "/",
    " ",
    "\t",
    "_",
]
texts = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@lru_cache
def punctuation(text: str) -> str:
    everywhere = any(
        a in DIGITS and b == "," and c in DIGITS for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    beside_space = {a for a, b in pairwise(text) if b == " "} | {b for a, b in pairwise(text) if a == " "}
    kept = ""
    for letter in text:
        if letter not in ';/[]"{}()=+\\_-><@`,?!':
            kept += letter
        elif not everywhere and letter not in beside_space:
            kept += " "
    gone, out = 0, ""
    for letter, after in pairwise(kept + " "):
        if letter == "." and after not in DIGITS and gone < 32:
            gone += 1
        else:
            out += letter
    return out


@lru_cache
def words(text: str) -> str:
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    out = []
    for word in text.lower().split():
        word = "0" if word == "none" else str(numbers.index(word)) if word in numbers else word
        if word not in ("a", "an", "the"):
            out.append({"dont": "don't", "somebody'd": "somebodyd"}.get(word, word))
    return " ".join(out)


def score(prediction: str, answers: list[str], scorer: str) -> float:
    def spaces(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    said = spaces(prediction)
    if scorer == "official":
        answers = [spaces(a) for a in answers]
    differ = any(a != answers[0] for a in answers)
    if differ:
        answers = [punctuation(a) for a in answers]
        answers = [words(a) for a in answers] if scorer == "official" else answers
    if differ or scorer == "lavis":
        said = words(punctuation(said))
    each = []
    for i in range(10):
        others = [a for j, a in enumerate(answers) if j != i]
        each.append(min(1.0, sum(a == said for a in others) / 3))
    return sum(each) / 10


@settings(max_examples=300, deadline=None)
@given(texts)
def test_one_text(text: str) -> None:
    assert vqa.strip_punctuation(text) == punctuation(text)
    assert vqa.normalise_words(text) == words(text)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ten_answers(data: st.DataObject) -> None:
    few = data.draw(st.lists(texts, min_size=1, max_size=3))
    answers = data.draw(st.lists(st.sampled_from(few), min_size=10, max_size=10))
    prediction = data.draw(st.sampled_from(few) | texts)
    for scorer in vqa.SCORERS:
        assert abs(vqa.score_question(prediction, answers, scorer) - score(prediction, answers, scorer)) < 1e-12
