"""Scoring rules to the letter: every expected number here is worked out by hand."""

import math

import pytest

from xformer.evaluation import captions, diversity, gqa, mci, oc, retrieval, vqa
from xformer.evaluation.intervals import interval, paired


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red, white dog.", "a red white dog"),  # the comma touches a space: deleted
        ("1,000 people!", "1000 people"),  # digit,digit: everything is deleted
        ("left/right", "left right"),  # touches no space: a space
        ("1,000 left/right", "1000 leftright"),  # digit,digit anywhere deletes the slash too
        ("3.5", "3.5"),  # a period before a digit stays
        ("3.", "3"),
        ("what ?", "what "),
        ("why?", "why "),
        ("a.b", "ab"),
        ("it's", "it's"),  # the apostrophe is no punctuation here
        ("$5 & 6%", "$5 & 6%"),  # nor are these
        ("." * 40, "." * 8),  # the official re.sub takes re.UNICODE (32) for its count
    ],
)
def test_punctuation(text: str, want: str) -> None:
    assert vqa.strip_punctuation(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The two dogs dont see A cat", "2 dogs don't see cat"),
        ("somebody'd id've wouldnt've", "somebodyd id've wouldn't've"),  # the first is reversed in the original
        ("Im Ive", "im ive"),  # keys with a capital never match lower-cased words
        ("none zero ten eleven", "0 0 10 eleven"),
        ("another theory an", "another theory"),  # articles are whole words
        ("  many   spaces ", "many spaces"),
    ],
)
def test_words(text: str, want: str) -> None:
    assert vqa.normalise_words(text) == want


def test_the_whole_normalisation_keeps_the_order() -> None:
    assert len(vqa.CONTRACTIONS) == 120
    assert vqa.normalise("The\nRed\tCar.") == "red car"
    assert vqa.normalise("two-story") == "2 story"  # punctuation first, then number words
    assert vqa.normalise("T.V.") == "tv"


def test_a_question_scores_by_the_other_nine() -> None:
    for matches, want in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        answers = ["yes"] * matches + [f"other{i}" for i in range(10 - matches)]
        assert vqa.score_question("yes", answers, "official") == pytest.approx(want)


def test_the_two_scorers_differ_where_the_truth_says_so() -> None:
    same = ["two"] * 10  # official normalises neither side here, lavis the prediction only
    assert vqa.score_question("two", same, "official") == 1.0 and vqa.score_question("two", same, "lavis") == 0.0
    assert vqa.score_question("Two", same, "official") == 0.0
    mixed = ["two"] * 9 + ["3"]
    assert vqa.score_question("2", mixed, "official") == 1.0 and vqa.score_question("2", mixed, "lavis") == 0.0
    shout = ["no!"] * 10  # ten equal answers keep their punctuation in both scorers
    assert vqa.score_question("no!", shout, "lavis") == 0.0 and vqa.score_question("no!", shout, "official") == 1.0
    comma = ["red, white"] * 9 + ["red"]
    assert vqa.score_question("Red, white.", comma, "lavis") == 1.0  # stripped, since they are not all the same
    assert vqa.score_question("Red, white.", comma[:9] + comma[:1], "lavis") == 0.0
    spaced = ["no!"] * 9 + ["no"]  # "no!" becomes "no " with its space, which equals nothing
    assert vqa.score_question("no", spaced, "lavis") == pytest.approx(0.3)
    assert vqa.score_question("no", spaced, "official") == 1.0


def test_vqa_by_type() -> None:
    rows = [
        {"answers": [truth] * 10, "answer_type": kind, "question_type": kind[:1], "truth": truth}
        for kind, truth in (("number", "2"), ("yes/no", "yes"), ("yes/no", "no"), ("other", "red"))
    ]
    found, each = vqa.score(rows, ["2", "yes", "yes", "blue"], "official")
    assert found["overall"] == 50.0 and each == [1.0, 1.0, 0.0, 0.0]
    assert found["per_answer_type"] == {"number": 100.0, "other": 0.0, "yes/no": 50.0}
    assert vqa.constant_answers(rows) == ["2", "yes", "yes", "red"]


def gqa_row(key: str, truth: str, **more) -> dict:
    row = {"key": key, "truth": truth, "balanced": True, "structural": "query", "semantic": "attr", "detailed": "x"}
    return row | {"group": None, "entailed": [], "choices": None} | more


def test_gqa() -> None:
    choices = {"valid": ["red", "blue"], "plausible": ["blue"]}
    rows = [
        gqa_row("1", "red", group="color", entailed=["1", "2", "3"], choices=choices),
        gqa_row(
            "2",
            "yes",
            structural="verify",
            semantic="obj",
            choices={"valid": ["yes", "no"], "plausible": ["yes", "no"]},
        ),
        gqa_row("3", "no", structural="verify", semantic="rel", balanced=False),
        gqa_row("4", "color", structural="compare", detailed="sameCommon", choices={"valid": [], "plausible": []}),
        gqa_row("5", "blue", group="color", entailed=["3"], choices=choices),
    ]
    found, each = gqa.score(rows, ["red", "yes", "yes", "shape", "red"], "official")
    assert found["overall"] == 50.0 and found["n"] == 4  # of 1, 2, 4, 5; the unbalanced 3 does not count
    assert each[:2] == [1.0, 1.0] and math.isnan(each[2])
    assert found["per_kind"] == {"binary": 50.0, "open": 50.0}
    assert found["per_structural"] == {"compare": 0.0, "query": 50.0, "verify": 100.0}
    assert found["per_semantic"] == {"attr": 33.33, "obj": 100.0}
    assert found["consistency"] == 50.0  # question 1 is right and entails 2 (right) and 3 (wrong); 5 is wrong
    assert found["validity"] == 100.0 and found["plausibility"] == 50.0  # 4 takes colour, material, shape
    # group color: red 1 -> 2 predicted, blue 1 -> 0: (1 + 1) * 2 / 2 / 100
    assert found["distribution"] == 0.02


def test_gqa_without_what_it_needs_says_so() -> None:
    rows = [gqa_row("1", "red", entailed=["9"])]
    found, _ = gqa.score(rows, ["red"], "official")
    assert "entailed question 9" in found["consistency"] and "--choices" in found["validity"]
    assert gqa.score(rows, ["The red."], "official")[0]["overall"] == 0.0
    assert gqa.score(rows, ["The red."], "lavis")[0]["overall"] == 100.0


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("two dogs", 2, 2),
        ("Two", 0, 2),  # the official replacement is case-sensitive
        ("someone 3", 1, 3),  # and works inside words: some1
        ("none", 0, 0),
        ("nine", 0, 9),  # the script spells it "nive"
        ("universe", 9, None),  # which it finds inside words
        ("zero", 0, 0),
        ("12 or 13", 12, 12),
        ("", 0, None),
    ],
)
def test_counting(text: str, official: int, strict: int | None) -> None:
    assert (oc.count_official(text), oc.count_strict(text)) == (official, strict)


def test_counting_scores() -> None:
    rows = [{"text_out": truth} for truth in ("4", "1", "2")]
    found, each = oc.score(rows, ["4", "3", "two"], "official")
    assert (found["overall"], found["mae"], found["per_count"]) == (66.67, 0.6667, {"0-2": 50.0, "3-5": 100.0})
    assert found["rmse"] == round(math.sqrt(4 / 3), 4) and each == [1.0, 0.0, 1.0]
    assert oc.constant_answers([{"text_out": "1"}, {"text_out": "2"}, {"text_out": "1"}]) == ["1"] * 3


def test_identification_scores() -> None:
    rows = [{"text_out": truth, "n_obj_exist": n} for truth, n in (("Yes.", 9), ("No.", 10), ("No.", 20))]
    answers = ["Yes, it is", "I do not know", "yes"]  # "know" holds "no"
    assert mci.score(rows, answers, "official")[0]["overall"] == 66.67
    strict, _ = mci.score(rows, answers, "strict")
    assert strict["overall"] == 33.33 and strict["per_objects"] == {"<10": 100.0, "<20": 0.0, ">=20": 0.0}


def test_retrieval() -> None:
    data = {"images": ["a", "b"], "texts": ["a0", "a1", "b0"], "own": [[0, 1], [2]]}
    rankings = {"image_to_text": [[2, 1, 0], [2, 0, 1]], "text_to_image": [[0, 1], [1, 0], [0, 1]]}
    found, each = retrieval.score(rankings, data)
    assert found["image_to_text"] == {"R@1": 50.0, "R@5": 100.0, "R@10": 100.0}  # a's best caption is second
    assert found["text_to_image"]["R@1"] == 33.33 and each == [0, 1, 1, 0, 0]
    assert found["overall"] == round((50 + 100 + 100 + 33.33 + 100 + 100) / 6, 2)
    swapped, _ = retrieval.score(retrieval.shuffled(rankings, [1, 0]), data)
    assert swapped["image_to_text"]["R@1"] == 50.0 and swapped["text_to_image"]["R@1"] == 66.67
    assert retrieval.chance(data)["image_to_text"]["R@1"] == 50.0  # (2/3 + 1/3) / 2
    assert retrieval.chance(data)["text_to_image"]["R@1"] == 50.0


def test_diversity() -> None:
    import numpy as np

    same = np.ones((2, 4, 3))
    different = np.eye(4)[None]
    assert diversity.measure(same)[0]["overall"] == 100.0 and diversity.measure(different)[0]["overall"] == 0.0
    assert diversity.effective_rank(same)[0] == pytest.approx(1) and diversity.effective_rank(different)[
        0
    ] == pytest.approx(4)
    opposite = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    assert diversity.mean_cosine(diversity.cosines(opposite)).tolist() == [-1.0]


def test_intervals() -> None:
    assert interval([1.0] * 50) == [100.0, 100.0]
    low, high = interval([0.0, 1.0] * 200)  # the normal approximation gives 50 +- 4.9
    assert 44 < low < 46.5 and 53.5 < high < 56 and interval([0.0, 1.0] * 200) == [low, high]


def test_the_paired_test() -> None:
    same = paired([1.0, 0.0, 0.3], [1.0, 0.0, 0.3])
    assert same["difference"] == 0.0 and same["p"] == 1.0 and (same["better"], same["worse"]) == (0, 0)
    # 6 differences of the same sign: all flips but 2 of 64 lie closer to zero
    found = paired([1.0] * 6, [0.0] * 6)
    assert found["difference"] == 100.0 and found["p"] == pytest.approx(2 / 64, abs=0.01)
    assert paired([1.0] * 40, [0.0] * 40)["p"] < 0.001


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A man's dog, isn't it?", "a man 's dog is n't it"),
        ("a T-shirt (red) and 1,000 cats.", "a t-shirt red and 1,000 cats"),
        ("Wait... 3.5 m -- ok!", "wait 3.5 m ok"),
    ],
)
def test_the_plain_tokeniser(text: str, want: str) -> None:
    assert captions.tokenise_plainly(text) == want
