"""Image-text retrieval on Flickr30k and COCO, scored as LAVIS does (lavis/tasks/retrieval.py): R@1, 5, 10 both ways."""

from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.files import format_of, need, read_json
from xformer.evaluation.intervals import interval

KS = (1, 5, 10)
Rankings = dict[
    str, list[list[int]]
]  # image_to_text: caption numbers per image; text_to_image: image numbers per caption


def load(annotations: Path) -> dict[str, Any]:
    """LAVIS's list [{image, caption: [...]}], or a COCO caption file.

    Returns: `images`, their ids; `texts`, all captions; `own`, the caption numbers of each image.

    Raises: EvaluationError.
    """
    where, content = f"--annotations {annotations}", read_json(annotations, "annotations")
    captions: dict[str, list[str]] = {}
    if isinstance(content, list):
        for row in content:
            need(row, ("image", "caption"), where)
            texts = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
            captions.setdefault(_image_id(str(row["image"])), []).extend(texts)
    else:
        need(content, ("images", "annotations"), where)
        captions = {str(need(row, ("id",), where)["id"]): [] for row in content["images"]}
        for row in content["annotations"]:
            need(row, ("image_id", "caption"), where)
            captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    captions = {key: texts for key, texts in captions.items() if texts}
    if not captions:
        raise EvaluationError(f"{where}: holds no captions.")
    if not all(isinstance(text, str) for texts in captions.values() for text in texts):
        raise EvaluationError(f"{where}: a caption is not text.")
    own, texts = [], []
    for group in captions.values():
        own.append(list(range(len(texts), len(texts) + len(group))))
        texts += group
    return {"images": list(captions), "texts": texts, "own": own}


def first(data: dict[str, Any], limit: int) -> dict[str, Any]:
    """The first images with their captions: a smaller and easier set."""
    own = data["own"][:limit]
    return {"images": data["images"][:limit], "texts": data["texts"][: own[-1][-1] + 1], "own": own}


def _image_id(name: str) -> str:
    """As in a feature store: COCO-style names carry their integer id, others are their own id."""
    digits = Path(name).stem.rpartition("_")[2]
    return str(int(digits)) if len(digits) == 12 and digits.isascii() and digits.isdigit() else name


def read_rankings(results: Path, data: dict[str, Any]) -> Rankings:
    """A results file: {"image_to_text": {image id: [caption numbers, best first]}, "text_to_image": {caption number: [image
    ids, best first]}}, captions numbered from 0 in the order of the annotations; at least ten each.

    Raises: EvaluationError.
    """
    where, content = f"--results {results}", read_json(results, "results")
    if not isinstance(content, dict) or format_of(content) != "retrieval":
        other = format_of(content)
        found = f" (this is in the format of {other})" if other else ""
        raise EvaluationError(f"{where}: must be an object with image_to_text and text_to_image{found}.")
    images = {key: i for i, key in enumerate(data["images"])}
    texts = {str(i): i for i in range(len(data["texts"]))}
    return {
        "image_to_text": _ranked(content["image_to_text"], images, texts, f"{where}: image_to_text"),
        "text_to_image": _ranked(content["text_to_image"], texts, images, f"{where}: text_to_image"),
    }


def _ranked(given: Any, queries: dict[str, int], targets: dict[str, int], where: str) -> list[list[int]]:
    if not isinstance(given, dict):
        raise EvaluationError(f"{where}: must be an object from query to ranking.")
    if missing := [key for key in queries if key not in given]:
        raise EvaluationError(
            f"{where}: {len(missing)} of {len(queries)} queries have no ranking (first: {missing[0]!r})."
        )
    if extra := [key for key in given if key not in queries]:
        raise EvaluationError(f"{where}: {len(extra)} rankings belong to no query (first: {extra[0]!r}).")
    need_at_least = min(KS[-1], len(targets))
    found = []
    for key in queries:
        ranking = given[key]
        names = [str(v) for v in ranking] if isinstance(ranking, list) else []
        if len(names) < need_at_least:
            raise EvaluationError(f"{where}: the ranking of {key!r} needs at least {need_at_least} entries.")
        if len(set(names)) != len(names):
            raise EvaluationError(f"{where}: the ranking of {key!r} names something twice.")
        if unknown := [name for name in names if name not in targets]:
            raise EvaluationError(
                f"{where}: the ranking of {key!r} names {unknown[0]!r}, which is not in the annotations."
            )
        found.append([targets[name] for name in names])
    return found


def write_rankings(rankings: Rankings, data: dict[str, Any]) -> dict[str, Any]:
    """The same in the format of a results file."""
    return {
        "image_to_text": dict(zip(data["images"], rankings["image_to_text"], strict=True)),
        "text_to_image": {str(i): [data["images"][j] for j in r] for i, r in enumerate(rankings["text_to_image"])},
    }


def score(rankings: Rankings, data: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """R@k both ways (percent) with 95% intervals, and `overall`, the mean of the six as in LAVIS. An image counts by the
    best-ranked of its captions.

    Returns: the report, and for every image, then every caption, whether its first answer is right.
    """
    image_of = {number: i for i, numbers in enumerate(data["own"]) for number in numbers}
    ways = {
        "image_to_text": [set(numbers) for numbers in data["own"]],
        "text_to_image": [{image_of[i]} for i in range(len(data["texts"]))],
    }
    report: dict[str, Any] = {}
    each: list[float] = []
    for way, truths in ways.items():
        hits = {k: [float(bool(t & set(r[:k]))) for t, r in zip(truths, rankings[way], strict=True)] for k in KS}
        report[way] = {f"R@{k}": round(100 * sum(hits[k]) / len(hits[k]), 2) for k in KS}
        report[f"{way}_intervals"] = {f"R@{k}": interval(hits[k]) for k in KS}
        each += hits[1]
    values = [v for way in ways for v in report[way].values()]
    return {
        "overall": round(sum(values) / len(values), 2),
        **report,
        "n": len(data["images"]),
        "n_texts": len(data["texts"]),
    }, each


def chance(data: dict[str, Any]) -> dict[str, Any]:
    """The expected R@k of a random ranking."""
    images, texts = len(data["images"]), len(data["texts"])

    def hit(own: int, k: int) -> float:
        missed = 1.0
        for j in range(min(k, texts)):
            missed *= max(0, texts - own - j) / (texts - j)
        return 1 - missed

    to_text = {f"R@{k}": round(100 * sum(hit(len(o), k) for o in data["own"]) / images, 2) for k in KS}
    to_image = {f"R@{k}": round(100 * min(1.0, k / images), 2) for k in KS}
    values = [*to_text.values(), *to_image.values()]
    return {
        "overall": round(sum(values) / len(values), 2),
        "image_to_text": to_text,
        "text_to_image": to_image,
        "n": images,
    }


def shuffled(rankings: Rankings, order: list[int]) -> Rankings:
    """The rankings of a model that sees image `order[i]` in the place of image i."""
    place = {image: i for i, image in enumerate(order)}
    return {
        "image_to_text": [rankings["image_to_text"][j] for j in order],
        "text_to_image": [[place[j] for j in ranking] for ranking in rankings["text_to_image"]],
    }
