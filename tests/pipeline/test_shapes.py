"""The embedded corpus: the same bytes from the same seed, true captions, and questions in the real formats."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline import shapes, shapes_text
from pipeline.shapes_text import NUMBERS
from xformer.errors import CorpusError
from xformer.text import clean


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        shapes.write_shapes(tmp_path / name, 12, 6, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path / "few", 2, 1, 0)
    shapes.write_shapes(tmp_path / "many", 9, 1, 0)
    name = "train/images/000000000002.png"
    assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_a_folder_with_something_in_it_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CorpusError, match="not empty"):
        shapes.write_shapes(tmp_path, 1, 1, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_scenes_hold_one_to_eight_shapes_of_every_kind_and_colour() -> None:
    drawn = [scene for _, scene, _ in shapes.scenes("train", 400, 0)]
    counts = Counter(len(scene.shapes) for scene in drawn)
    assert set(counts) == set(range(1, 9)) and min(counts.values()) > 25
    assert {s.kind for scene in drawn for s in scene.shapes} == set(shapes.KINDS)
    assert {s.colour for scene in drawn for s in scene.shapes} == set(shapes.COLOURS)
    hidden = sum(
        any((a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.radius + b.radius) ** 2 for b in scene.shapes[:i])
        for scene in drawn
        for i, a in enumerate(scene.shapes)
    )
    assert hidden > 10


def test_captions_state_true_counts_and_positions() -> None:
    counted = total = placed = 0
    for _, scene, rng in shapes.scenes("train", 300, 1):
        groups = {(g[0].colour, g[0].kind): g for g in shapes_text.groups(scene)}
        for text in shapes_text.captions(scene, rng):
            total += 1
            words = text.replace(",", " ").replace(":", " ").split()
            counted += any(w in shapes_text.NUMBERS for w in words)
            for (colour, kind), group in groups.items():
                noun = kind if len(group) == 1 else shapes_text.plural(kind)
                assert colour in words and noun in words
                where = shapes_text.position(group)
                placed += bool(where) and where in text
            if "on the left" in text:
                assert any(max(s.x for s in g) < 0.5 for g in groups.values())
    assert counted / total > 0.9 and placed > 50


def test_web_captions_name_neither_counts_nor_positions() -> None:
    for _, scene, rng in shapes.scenes("train", 100, 2):
        for text in shapes_text.web_captions(scene, rng):
            assert not set(text.replace(",", " ").split()) & {*shapes_text.NUMBERS, "left", "right", "top", "bottom"}


def test_counting_questions_have_true_answers() -> None:
    for _, scene, rng in shapes.scenes("val", 200, 3):
        question, answer = shapes_text.ASKERS["number"](scene, rng)
        words = question.removesuffix("?").split()[2:]
        matching = [
            s
            for s in scene.shapes
            if all(w in (s.colour, shapes_text.plural(s.kind), "objects", "are", "there") for w in words)
        ]
        assert int(answer) == len(matching)


def read_caption(caption: str) -> list[tuple[str, str, int | None]]:
    """(kind, colour, how many or None where it does not say) of every group a caption names."""
    kinds = {k: k for k in shapes.KINDS} | {shapes_text.plural(k): k for k in shapes.KINDS}
    words = clean(caption, 50).replace(",", " ").split()
    found = []
    for i, word in enumerate(words):
        if word in kinds:
            before = [w for w in words[max(0, i - 3) : i - 1] if w not in ("small", "large")]
            number = before[-1] if before else ""
            found.append((kinds[word], words[i - 1], NUMBERS.index(number) if number in NUMBERS[1:] else None))
    return found


def read_answer(question: str, groups: list[tuple[str, str, int | None]]) -> str | None:
    """What an exact reader of a caption answers; None where the caption does not say."""
    words = question.rstrip("?").split()
    named = [k for w in words for k in shapes.KINDS if w in (k, shapes_text.plural(k))]
    colour = next((w for w in words if w in shapes.COLOURS), None)

    def count(kind: str | None) -> int | None:
        counts = [n for k, c, n in groups if kind in (None, k) and colour in (None, c)]
        return None if None in counts else sum(n for n in counts if n is not None)

    kind = named[0] if named else None
    if words[0] == "What":
        return next((k if colour else c for k, c, _ in groups if (c == colour if colour else k == kind)), None)
    if words[:2] == ["Is", "there"] and "exactly" not in words:
        return "yes" if any(k == kind and colour in (None, c) for k, c, _ in groups) else "no"
    numbers = [count(k) for k in named or [None]]
    if None in numbers:
        return None
    if words[0] == "How":
        return str(numbers[0])
    wanted = numbers[1] if "more" in words else NUMBERS.index(words[words.index("exactly") + 1])
    return "yes" if (numbers[0] > wanted if "more" in words else numbers[0] == wanted) else "no"  # type: ignore[operator]


def test_nearly_every_question_is_answered_by_any_one_caption() -> None:
    """The true upper bound of reading: the language model's ceiling has to be measured against it."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for _, scene, rng in shapes.scenes("val", 300, 0):
        told = shapes_text.captions(scene, rng)
        for kind, ask in shapes_text.ASKERS.items():
            question, answer = ask(scene, rng)
            for caption in told:
                asked[kind] += 1
                right[kind] += read_answer(question, read_caption(caption)) == answer
    assert {kind: right[kind] / asked[kind] > 0.96 for kind in asked} == dict.fromkeys(shapes_text.ASKERS, True)


def test_a_question_does_not_betray_its_answer() -> None:
    """Yes is as likely as no after every kind of beginning."""
    said: dict[str, list[bool]] = {}
    for _, scene, rng in shapes.scenes("val", 1500, 0):
        question, answer = shapes_text.ASKERS["yes/no"](scene, rng)
        said.setdefault(" ".join(question.split()[:3]), []).append(answer == "yes")
    assert all(0.35 < sum(v) / len(v) < 0.65 for v in said.values() if len(v) > 100)


def test_gqa_asks_for_what_is_there_as_often_as_for_what_is_not() -> None:
    writer = shapes_text.QuestionWriter()
    truth = {}
    for image_id, scene, rng in shapes.scenes("val", 600, 0):
        writer.add(image_id, scene, rng)
        truth[str(image_id)] = {s.kind for s in scene.shapes}
    gqa: dict = writer.benchmarks()["gqa_questions.json"]  # type: ignore[assignment]
    asked = [q for q in gqa.values() if q["types"]["detailed"] == "exist"]
    for q in asked:
        there = q["question"].removeprefix("Is there a ").rstrip("?") in truth[q["imageId"]]
        assert (q["answer"], q["fullAnswer"]) == (("yes", "Yes.") if there else ("no", "No."))
    assert 0.4 < sum(q["answer"] == "yes" for q in asked) / len(asked) < 0.6


def test_questions_in_the_real_formats(corpus: Path) -> None:
    val = corpus / "val"
    read = {name: json.loads((val / f"{name}.json").read_text()) for name in
            ("vqa_questions", "vqa_annotations", "gvtbench_oc", "gvtbench_mci", "gqa_questions")}  # fmt: skip
    questions, annotations = read["vqa_questions"]["questions"], read["vqa_annotations"]["annotations"]
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in annotations]
    assert len({q["question_id"] for q in questions}) == len(questions)
    assert {a["answer_type"] for a in annotations} == {"yes/no", "number", "other"}
    assert all(len(a["answers"]) == 10 for a in annotations)
    assert all(set(r) == {"image_id", "text_in", "text_out", "n_obj_exist"} for r in read["gvtbench_oc"])
    assert {r["text_out"] for r in read["gvtbench_mci"]} == {"Yes.", "No."}
    gqa = read["gqa_questions"]
    assert {"query", "verify"} <= {q["types"]["structural"] for q in gqa.values()}
    assert {"attr", "cat"} <= {q["types"]["semantic"] for q in gqa.values()}
    assert all(e in gqa for q in gqa.values() for e in q["entailed"])
    assert {str(r["image_id"]) for r in read["gvtbench_oc"]} >= {q["imageId"] for q in gqa.values()}
