"""Made-up VQA predictions from a seed, to see what the two scorers make of the same file.

python -m benchmarks.predictions ANNOTATIONS OUT [SEED]

Half of the answers are one annotator's, a fifth are that but spelt as a language model may (capital, article, period,
number word), the rest belong to another question.
"""

import random
import sys
from pathlib import Path

from xformer import publish
from xformer.evaluation.files import read_json

WORDS = {"0": "none", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five"}


def make_up(annotations: Path, out: Path, seed: int = 0) -> None:
    """Writes a VQA results file [{question_id, answer}] for every question of an annotation file."""
    draw = random.Random(seed)
    rows = read_json(annotations, "annotations")["annotations"]
    results = []
    for row in rows:
        chance = draw.random()
        answer = draw.choice((row if chance < 0.7 else draw.choice(rows))["answers"])["answer"]
        if 0.5 <= chance < 0.7:
            spelt = (answer.capitalize(), f"a {answer}", f"{answer}.", WORDS.get(answer, answer))
            answer = spelt[3] if answer in WORDS else draw.choice(spelt[:3])
        results.append({"question_id": row["question_id"], "answer": answer})
    publish.write_json(out, results)


if __name__ == "__main__":
    make_up(Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or ["0"])[0]))
