"""The language of the shapes corpus: captions, web captions, and questions in the formats of the real benchmarks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.shapes import Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
COUNTED = 0.98  # share of captions that state counts; from the others no count can be learned
MORE_QUESTIONS = 10  # of each training picture, for the language model, beside those that every split has
ABSENT = 1_000_000  # GQA ids from here on: questions for a kind that is not there
COUNTS = (0.44, 0.2, 0.13, 0.09, 0.06, 0.04, 0.02, 0.02)  # how often a kind that is there occurs 1, 2, .. 8 times


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def groups(scene: Scene) -> list[list[Shape]]:
    """The shapes of a scene by (kind, colour), in drawing order."""
    found: dict[tuple[str, str], list[Shape]] = {}
    for s in scene.shapes:
        found.setdefault((s.kind, s.colour), []).append(s)
    return list(found.values())


def position(group: list[Shape]) -> str:
    """Where the whole group lies, or "" when it is spread out."""
    xs, ys = [s.x for s in group], [s.y for s in group]
    if max(xs) < 0.5:
        return "on the left"
    if min(xs) > 0.5:
        return "on the right"
    if max(ys) < 0.5:
        return "at the top"
    return "at the bottom" if min(ys) > 0.5 else ""


def _group_text(group: list[Shape], counted: bool, sized: bool, placed: bool) -> str:
    s, n = group[0], len(group)
    words = [NUMBERS[n]] if counted else []
    words += [s.size] if sized else []
    words += [s.colour, s.kind if n == 1 else plural(s.kind)]
    where = position(group)
    words += [where] if placed and where else []
    return " ".join(words)


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(scene: Scene, rng: np.random.Generator, n: int = 3) -> list[str]:
    """`n` differently worded captions; 98% of them state every count, most of them positions."""
    texts = []
    for _ in range(n):
        counted = bool(rng.random() < COUNTED)
        parts = groups(scene)
        parts = [parts[i] for i in rng.permutation(len(parts))]
        sized, placed = bool(rng.random() < 0.3), bool(rng.random() < 0.6)
        body = _join([_group_text(g, counted, sized, placed) for g in parts])
        total = len(scene.shapes)
        thing = "object" if total == 1 else "objects"
        forms = [body, f"a picture of {body}", f"there {'is' if len(parts[0]) == 1 else 'are'} {body}"]
        if counted:
            forms += [f"{NUMBERS[total]} {thing}: {body}"]
        else:
            forms += [f"some {thing}: {body}"]
        shade = "dark" if scene.dark else "bright"
        forms += [f"{body} on a {shade} background"]
        texts.append(forms[int(rng.integers(len(forms)))])
    return texts


def web_captions(scene: Scene, rng: np.random.Generator, n: int = 2) -> list[str]:
    """Captions as most of the web writes them: what is there, in which colour; no counts and no positions."""
    texts = []
    for _ in range(n):
        parts = [f"{g[0].colour} {g[0].kind}" for g in groups(scene)]
        parts = [parts[i] for i in rng.permutation(len(parts))]
        body = _join(parts)
        forms = [body, f"a photo of {body}", f"{body} picture", f"nice {body}"]
        texts.append(forms[int(rng.integers(len(forms)))])
    return texts


def _pick(rng: np.random.Generator, options: list):
    return options[int(rng.integers(len(options)))]


def _ask_number(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A counting question whose answer is 1..8, or now and then 0."""
    from pipeline.shapes import COLOURS, KINDS

    s = _pick(rng, list(scene.shapes))
    form = int(rng.integers(4))
    if rng.random() < 0.08:
        colour, kind = _pick(rng, list(COLOURS)), _pick(rng, list(KINDS))
        n = sum(t.colour == colour and t.kind == kind for t in scene.shapes)
        return f"How many {colour} {plural(kind)} are there?", str(n)
    if form == 0:
        return "How many objects are there?", str(len(scene.shapes))
    if form == 1:
        return f"How many {plural(s.kind)} are there?", str(sum(t.kind == s.kind for t in scene.shapes))
    if form == 2:
        return f"How many {s.colour} objects are there?", str(sum(t.colour == s.colour for t in scene.shapes))
    n = sum(t.kind == s.kind and t.colour == s.colour for t in scene.shapes)
    return f"How many {s.colour} {plural(s.kind)} are there?", str(n)


def _ask_yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question whose answer is yes in about half of the cases."""
    from pipeline.shapes import COLOURS, KINDS

    wanted = bool(rng.random() < 0.5)
    present = {(s.kind, s.colour) for s in scene.shapes}
    kinds = Counter(s.kind for s in scene.shapes)
    form = int(rng.integers(3))
    if form == 0 and len(kinds) >= 2:
        a, b = (_pick(rng, sorted(kinds)) for _ in range(2))
        if a != b and kinds[a] != kinds[b]:
            more, fewer = (a, b) if kinds[a] > kinds[b] else (b, a)
            first, second = (more, fewer) if wanted else (fewer, more)
            return f"Are there more {plural(first)} than {plural(second)}?", "yes" if wanted else "no"
    if form == 1:  # a false number is drawn as true ones are distributed: the question alone must not betray the answer
        kind = _pick(rng, sorted(kinds))
        n, wrong = kinds[kind], np.array(COUNTS)
        wrong[n - 1] = 0
        n = n if wanted else int(rng.choice(np.arange(1, 9), p=wrong / wrong.sum()))
        verb, noun = ("Is", kind) if n == 1 else ("Are", plural(kind))
        return f"{verb} there exactly {NUMBERS[n]} {noun}?", "yes" if n == kinds[kind] else "no"
    if wanted:
        kind, colour = _pick(rng, sorted(present))
    else:
        absent = [(k, c) for k in KINDS for c in COLOURS if (k, c) not in present]
        kind, colour = _pick(rng, absent)
    return f"Is there a {colour} {kind}?".replace("a orange", "an orange"), "yes" if wanted else "no"


def _ask_other(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Colour or shape; always answerable without a doubt, by the picture and by any of its captions."""
    by_kind: dict[str, set[str]] = {}
    by_colour: dict[str, set[str]] = {}
    for s in scene.shapes:
        by_kind.setdefault(s.kind, set()).add(s.colour)
        by_colour.setdefault(s.colour, set()).add(s.kind)
    counts = Counter(s.kind for s in scene.shapes)
    options = [
        (f"What color {'is the ' + k if counts[k] == 1 else 'are the ' + plural(k)}?", next(iter(c)))
        for k, c in sorted(by_kind.items())
        if len(c) == 1
    ]
    options += [(f"What shape is {c}?", next(iter(k))) for c, k in sorted(by_colour.items()) if len(k) == 1]
    return _pick(rng, options)


ASKERS = {"number": _ask_number, "yes/no": _ask_yes_no, "other": _ask_other}


def _ten_answers(answer: str, answer_type: str, rng: np.random.Generator) -> list[dict]:
    """Ten annotators, of whom one in twenty is mistaken."""
    out = []
    for i in range(10):
        given = answer
        if rng.random() < 0.05:
            if answer_type == "number":
                given = str(max(0, int(answer) + (1 if rng.random() < 0.5 else -1)))
            elif answer_type == "yes/no":
                given = "no" if answer == "yes" else "yes"
            else:
                given = _pick(rng, ["red", "blue", "green", "square", "circle"])
        out.append({"answer": given, "answer_confidence": "yes" if given == answer else "maybe", "answer_id": i + 1})
    return out


def _gqa(scene: Scene, rng: np.random.Generator) -> dict[str, dict]:
    """Up to four GQA questions of a scene: structural and semantic types, groups and entailment as in the real file."""
    found: dict[str, dict] = {}

    def ask(question: str, answer: str, structural: str, semantic: str, detailed: str, group: str | None) -> str:
        key = str(len(found))
        found[key] = {
            "question": question,
            "answer": answer,
            "fullAnswer": answer.capitalize() + ".",
            "isBalanced": True,
            "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
            "groups": {"global": group, "local": f"{detailed}-{group}"},
            "entailed": [],
            "equivalent": [],
        }
        return key

    parts = groups(scene)
    kinds = Counter(s.kind for s in scene.shapes)
    question, answer = _ask_other(scene, rng)
    if question.startswith("What color"):
        kind = next(k for k in kinds if k in question)
        query = ask(question, answer, "query", "attr", "attrColor", "color")
        exists = ask(f"Is there a {kind}?", "yes", "verify", "obj", "exist", None)
        found[query]["entailed"] = [exists]
    else:
        ask(question, answer, "query", "cat", "categoryThat", "shape")
    if rng.random() < 0.1:
        shade = "dark" if scene.dark else "bright"
        ask("Is the background dark or bright?", shade, "choose", "global", "sceneChoose", "background")
    s = _pick(rng, list(scene.shapes))
    others = [c for c in ("red", "green", "blue", "yellow", "purple", "orange") if c != s.colour]
    if all(t.colour == s.colour for t in scene.shapes if t.kind == s.kind):
        pair = [s.colour, _pick(rng, others)]
        pair = [pair[i] for i in rng.permutation(2)]
        ask(f"Is the {s.kind} {pair[0]} or {pair[1]}?", s.colour, "choose", "attr", "attrChoose", "color")
    if len(parts) >= 2:
        a, b = parts[0][0], parts[1][0]
        sides = {position(parts[0]), position(parts[1])} == {"on the left", "on the right"}
        if len(parts[0]) == len(parts[1]) == kinds[a.kind] == kinds[b.kind] == 1 and sides:
            wanted = "yes" if a.x < b.x else "no"
            ask(f"Is the {a.kind} to the left of the {b.kind}?", wanted, "verify", "rel", "relVerify", None)
        if a.kind != b.kind and kinds[a.kind] == len(parts[0]) and kinds[b.kind] == len(parts[1]):
            same = "yes" if a.colour == b.colour else "no"
            ask(f"Do the {a.kind} and the {b.kind} have the same color?", same, "compare", "attr", "sameColor", None)
        absent = sorted({"circle", "square", "triangle", "cross"} - set(kinds))
        if a.kind != b.kind:
            second, answer = (_pick(rng, absent), "no") if absent and rng.random() < 0.5 else (b.kind, "yes")
            both = f"Are there both {plural(a.kind)} and {plural(second)}?"
            ask(both, answer, "logical", "obj", "existAnd", None)
    return found


class QuestionWriter:
    """Collects the questions of a split, picture by picture."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.more: list[dict] = []
        self.oc: list[dict] = []
        self.mci: list[dict] = []
        self.gqa: dict[str, dict] = {}
        self.asked = 0  # of GQA, without the questions for absent kinds

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, image_id: int, scene: Scene, rng: np.random.Generator) -> None:
        from pipeline.shapes import KINDS

        seen = set()
        for answer_type in ("number", "number", "yes/no", "other"):
            question, answer = ASKERS[answer_type](scene, rng)
            if question in seen:
                continue
            seen.add(question)
            row = {"image_id": image_id, "question": question, "answer": answer, "answer_type": answer_type}
            self.rows.append(row | {"answers": _ten_answers(answer, answer_type, rng)})
        kinds = Counter(s.kind for s in scene.shapes)
        kind, total = _pick(rng, sorted(kinds)), len(scene.shapes)
        self.oc.append(
            {
                "image_id": image_id,
                "text_in": f"How many {plural(kind)} are there?",
                "text_out": str(kinds[kind]),
                "n_obj_exist": total,
            }
        )
        there = bool(rng.random() < 0.5) or len(kinds) == len(KINDS)
        kind = _pick(rng, sorted(kinds) if there else [k for k in KINDS if k not in kinds])
        answer = "Yes." if there else "No."
        self.mci.append(
            {"image_id": image_id, "text_in": f"Is there a {kind}?", "text_out": answer, "n_obj_exist": total}
        )
        base = self.asked
        for key, row in _gqa(scene, rng).items():
            row["entailed"] = [str(base + int(k)) for k in row["entailed"]]
            number, self.asked = base + int(key), self.asked + 1
            self.gqa[str(number)] = row | {"imageId": str(image_id)}
            gone = [k for k in KINDS if k not in kinds]
            if row["types"]["detailed"] == "exist" and gone:  # without a draw: all else of the corpus stays as it was
                other = {"question": f"Is there a {gone[total % len(gone)]}?", "answer": "no", "fullAnswer": "No."}
                self.gqa[str(ABSENT + number)] = row | other | {"imageId": str(image_id)}

    def plain(self) -> list[dict]:
        """Questions and answers as text, for the language model: of every benchmark, in VQA's answer format (without
        the absent kinds of GQA: the embedded model was trained on this list)."""
        rows = [(row["image_id"], row["question"], row["answer"]) for row in [*self.rows, *self.more]]
        rows += [(row["image_id"], row["text_in"], row["text_out"].lower().strip(".")) for row in self.mci]
        rows += [
            (int(row["imageId"]), row["question"], row["answer"]) for key, row in self.gqa.items() if int(key) < ABSENT
        ]
        return [dict(zip(("image_id", "question", "answer"), row, strict=True)) for row in rows]

    def add_more(self, image_id: int, scene: Scene, rng: np.random.Generator) -> None:
        """Further questions about a training picture: text costs nothing, and reading is learned from many of them."""
        for i in range(MORE_QUESTIONS):
            question, answer = ASKERS[("number", "yes/no", "number", "other", "yes/no")[i % 5]](scene, rng)
            self.more.append({"image_id": image_id, "question": question, "answer": answer})

    def benchmarks(self) -> dict[str, object]:
        """The validation files by name, in the formats of VQAv2, GVTBench and GQA."""
        questions, annotations = [], []
        for i, row in enumerate(self.rows):
            key = {"question_id": row["image_id"] * 10 + i % 10, "image_id": row["image_id"]}
            questions.append(key | {"question": row["question"]})
            annotations.append(
                key
                | {
                    "question_type": " ".join(row["question"].lower().split()[:2]),
                    "answer_type": row["answer_type"],
                    "multiple_choice_answer": row["answer"],
                    "answers": row["answers"],
                }
            )
        head = {"info": {"description": "X-Former shapes"}, "data_subtype": "val", "license": {"name": "Apache-2.0"}}
        return {
            "vqa_questions.json": head | {"task_type": "Open-Ended", "questions": questions},
            "vqa_annotations.json": head | {"annotations": annotations},
            "gvtbench_oc.json": self.oc,
            "gvtbench_mci.json": self.mci,
            "gqa_questions.json": self.gqa,
        }
