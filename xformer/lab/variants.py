"""The `ablations` part of stages.yaml: variants as changes to one base, resolved into settings and checked together."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from xformer.errors import SettingsError
from xformer.evaluation.suite import TITLES
from xformer.local import MODELS
from xformer.settings import Section, Seed, Settings, Whole, changed, load_values, settings_from

# One cache serves all variants: what decides a feature may differ only where the cache holds several kinds of it.
SHARED = ("clip", "mae", "store", "corpus", "image_size")
LATER = ("stage2", "finetune", "eval")  # sections that stage 1 does not read
MEASURED = tuple(name for name in TITLES if name != "retrieval")


File = Annotated[Path | None, Field(strict=False)]  # a text in YAML


class BenchmarkFiles(Section):
    """Files of a benchmark; without them those of the shapes corpus. `images` are extracted into a store of their own."""

    questions: File = None
    annotations: File = None
    images: File = None


class Quick(Section):
    seeds: Annotated[list[Seed], Field(min_length=1)]
    variants: Annotated[list[str], Field(min_length=1)]
    limit: Whole


class Ablations(Section):
    """What is compared, over which seeds, by which benchmarks. A null takes a predefined entry out."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    limit: Whole
    quick: Quick
    base: dict[str, Any]
    benchmarks: dict[str, BenchmarkFiles | None]
    variants: dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Variant:
    """One system: its changes to the base, and what they resolve to."""

    name: str
    model: str
    changes: dict[str, Any]
    settings: Settings
    stage1_of: str  # the first variant with the same stage 1; they share that run

    def seeded(self, seed: int) -> Settings:
        return self.settings.model_copy(update={"seed": seed})

    def seeded_stage1(self, seed: int, base: Settings) -> Settings:
        """The settings of the shared stage-1 run: what only later phases read is the base's."""
        return self.settings.model_copy(update={"seed": seed} | {name: getattr(base, name) for name in LATER})


def load_ablations(
    preset: str, config: Path | None, overrides: list[str]
) -> tuple[Ablations, Settings, dict[str, Variant]]:
    """The ablations of a preset, the settings of their base, and all variants by name.

    Raises: SettingsError, which names the variant and the setting that is unknown, impossible, or needs another cache.
    """
    values = load_values(preset, config, overrides)
    try:
        ablations = Ablations.model_validate(values.pop("ablations"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SettingsError(f"ablations.{key}: {first['msg']} (got {first['input']!r}).") from None
    if unknown := next((name for name in ablations.benchmarks if name not in MEASURED), None):
        raise SettingsError(f"ablations.benchmarks.{unknown}: unknown; allowed are {', '.join(MEASURED)}.")
    values = changed(values | {"preset": preset}, ablations.base, "ablations.base")
    base = settings_from(values, "ablations.base")
    found: dict[str, Variant] = {}
    for name, changes in ablations.variants.items():
        if changes is not None:
            variant = _resolve(name, changes, values, base, list(found.values()))
            found[name] = variant
    for name in ablations.quick.variants:
        if name not in found:
            raise SettingsError(f"ablations.quick.variants: there is no variant {name!r}.")
    return ablations, base, found


def _resolve(
    name: str, changes: dict[str, Any], values: dict[str, Any], base: Settings, others: list[Variant]
) -> Variant:
    where = f"ablations.variants.{name}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise SettingsError(f"{where}: a name holds small letters, digits and - only; runs are named after it.")
    rest = dict(changes)
    model = rest.pop("model", "xformer")
    if model not in MODELS:
        raise SettingsError(f"{where}.model: {model!r} is none of {', '.join(MODELS)}.")
    if "seed" in rest:
        raise SettingsError(f"{where}.seed: seeds are the same for all variants; set ablations.seeds.")
    settings = settings_from(changed(values, rest, where), where)
    for section in SHARED:
        ours, theirs = settings.dump()[section], base.dump()[section]
        if ours == theirs:
            continue
        key = next((f"{section}.{k}" for k in ours if ours[k] != theirs[k]), section) if type(ours) is dict else section
        if key != "mae.mask_ratio":
            raise SettingsError(
                f"{where}: {key} is {_at(ours, key)!r} there and {_at(theirs, key)!r} in the base; all variants read one "
                "cache: set it in ablations.base and give another --out."
            )
    mine = stage1_key(model, settings)
    same = next((v.stage1_of for v in others if stage1_key(v.model, v.settings) == mine), name)
    return Variant(name, model, changes, settings, same)


def _at(section: Any, key: str) -> Any:
    return section[key.partition(".")[2]] if isinstance(section, dict) else section


def stage1_key(model: str, settings: Settings) -> str:
    """Equal for variants whose first stage is the same."""
    values = settings.dump()
    for later in LATER:
        del values[later]
    return hashlib.sha256(json.dumps([model, values], sort_keys=True).encode()).hexdigest()


def chosen(
    ablations: Ablations, variants: dict[str, Variant], quick: bool, only: list[str], seeds: list[int] | None
) -> tuple[list[Variant], list[int], int]:
    """Which variants and seeds to run, and how many questions of each benchmark (0 = all). Raises SettingsError."""
    names = only or (ablations.quick.variants if quick else list(variants))
    for name in names:
        if name not in variants:
            raise SettingsError(f"--only {name}: there is no such variant; there are {', '.join(variants)}.")
    if not names:
        raise SettingsError("ablations: there is no variant to run; every one is null.")
    picked = seeds if seeds is not None else ablations.quick.seeds if quick else ablations.seeds
    return [variants[name] for name in dict.fromkeys(names)], list(dict.fromkeys(picked)), (
        ablations.quick.limit if quick else ablations.limit
    )  # fmt: skip
