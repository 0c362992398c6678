"""The settings: one strict YAML file, two presets, and what the command line overrides.

Precedence: the preset's defaults < the file given with --config < --set key=value. An unknown key, a wrong type or an
impossible value is one sentence that names the key.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xformer.errors import SettingsError

PRESETS = ("tiny", "paper")
OPEN = ("ablations.base", "ablations.variants", "ablations.benchmarks")  # whose keys a file may add to
MAX_FILE_BYTES = 1_000_000

Count = Annotated[int, Field(ge=1, lt=2**63)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the narrowest of the generators that take one: numpy's legacy seed
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=10)]
Positive = Annotated[float, Field(gt=0)]
Precision = Literal["fp32", "bf16", "fp16"]
Mean = Annotated[tuple[float, float, float], Field(strict=False)]  # a list in YAML; its elements stay strict
Std = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]
Betas = Annotated[tuple[Below1, Below1], Field(strict=False)]


class Section(BaseModel):
    """A frozen part of the settings that refuses unknown keys, other types (true or '3' for a number), NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Corpus(Section):
    train: Count
    val: Count
    val_fraction: Below1
    max_dead_fraction: Share
    max_image_pixels: Count


class Clip(Section):
    weights: str
    architecture: str
    kwargs: dict[str, int | float | bool | str]
    width: Count
    layers: Annotated[list[Count], Field(min_length=1)]
    tokens: Literal["all", "global"]
    mean: Mean
    std: Std
    autocast: Precision
    batch: Count

    @model_validator(mode="after")
    def _layers_differ(self) -> "Clip":
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers ({', '.join(map(str, self.layers))}) must name each block once")
        return self

    def only_global(self, layer: int) -> bool:
        """Whether a block is cached without its patches: only C is; the blocks of Table 5 stand for local features."""
        return self.tokens == "global" and layer == self.layers[0]


class Mae(Section):
    weights: str
    width: Count
    patch: Count
    mask_ratio: Below1
    draws: Count
    mask_seed: Seed
    mean: Mean
    std: Std
    autocast: Precision
    batch: Count


class Store(Section):
    shard_rows: Count
    workers: Count
    views: Count
    view_seed: Seed
    dtype: Literal["fp16", "int8"]
    int8_max_rmse: Share
    cache_dir: str | None
    cache_bytes: Count


class Data(Section):
    weights: list[Annotated[float, Field(ge=0)]]
    block: Whole
    window: Count
    threads: Count
    ahead: Count


class QFormerSettings(Section):
    text: str
    bert: bool
    width: Count
    layers: Count
    heads: Count
    intermediate: Count
    queries: Count
    cross_every: Count
    projection: Count
    dropout: Below1
    max_text: Annotated[int, Field(ge=4, le=512)]
    max_words: Count

    @model_validator(mode="after")
    def _heads_divide(self) -> "QFormerSettings":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class Dual(Section):
    depth: Count
    heads: Count
    ffn_ratio: Whole
    ffn_block2: bool
    itg: Literal["enhanced", "layerwise"]


class Local(Section):
    tokens: Literal["mae", "clip"]
    layer: Count
    mask_ratio: Below1 | None
    draws: Count | None = None


class Llm(Section):
    weights: str
    autocast: Precision
    spread: bool
    prompt: str


class Stage1Weights(Section):
    itc: Rate
    itm: Rate
    itg: Rate
    reconstruction: Rate


class Stage2Weights(Section):
    lm: Rate
    reconstruction: Rate


class Recipe(Section):
    epochs: Count
    max_steps: Whole
    batch: Count
    lr: Rate
    min_lr: Rate
    warmup_lr: Rate
    warmup: Whole
    betas: Betas
    weight_decay: Rate
    clip_norm: Positive
    precision: Precision
    accumulate: Count
    validate_every: Count
    validate_batches: Count
    save_every: Count
    keep: Count
    log_every: Count
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]]
    pictures: Whole
    threads: Whole

    @model_validator(mode="after")
    def _rates_ordered(self) -> "Recipe":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        return self


class Stage1(Recipe):
    label_smoothing: Below1
    hard_negatives_after: Whole
    weights: Stage1Weights


class Stage2(Recipe):
    max_text: Annotated[int, Field(ge=4, le=2048)]
    mask_ratio: Below1 | None
    weights: Stage2Weights


class Captions(Section):
    min_new_tokens: Whole
    max_new_tokens: Count
    length_penalty: float


class Eval(Section):
    prompt: str
    beams: Count
    length_penalty: float
    min_new_tokens: Whole = 1  # this and `captions` may be missing in the settings of an older run
    max_new_tokens: Count
    captions: Captions = Captions(min_new_tokens=8, max_new_tokens=30, length_penalty=1.0)
    batch: Count
    draw: Whole
    mask_ratio: Below1 | None
    split: Literal["train", "val", "all"]

    @model_validator(mode="after")
    def _one_slot(self) -> "Eval":
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must hold one {{}} for the question, not {self.prompt!r}")
        return self

    @model_validator(mode="after")
    def _lengths_ordered(self) -> "Eval":
        for length in (self, self.captions):
            if length.min_new_tokens > length.max_new_tokens:
                low, high = length.min_new_tokens, length.max_new_tokens
                raise ValueError(f"min_new_tokens ({low}) must not be above max_new_tokens ({high})")
        return self

    def for_captions(self) -> "Eval":
        """The same with the lengths of captions instead of short answers."""
        return self.model_copy(update=dict(self.captions))


class Settings(Section):
    """All settings of one run; `dump` gives what is saved with it."""

    preset: str
    seed: Seed
    corpus: Corpus
    image_size: Count
    clip: Clip
    mae: Mae
    store: Store
    data: Data
    qformer: QFormerSettings
    dual: Dual
    local: Local
    llm: Llm
    stage1: Stage1
    stage2: Stage2
    finetune: Stage2
    eval: Eval

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.image_size % self.mae.patch:
            raise ValueError(f"mae.patch ({self.mae.patch}) must divide image_size ({self.image_size})")
        local = self.mae.width if self.local.tokens == "mae" else self.clip.width
        if local % self.dual.heads or self.qformer.width % self.dual.heads:
            raise ValueError(f"dual.heads ({self.dual.heads}) must divide qformer.width and the width of local.tokens")
        return self

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number and refuses a key that stands twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)
# Whole numbers are tried first, so "1" stays an int.
for _letter, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _resolvers.sort(key=lambda pair: pair[0] == "tag:yaml.org,2002:float")


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"line {key.start_mark.line + 1}: a key must be a plain word.")
        if key.value in seen:
            raise SettingsError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice.")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML without tags, aliases or deep nesting. Raises SettingsError, which names `where`."""
    if len(text) > MAX_FILE_BYTES:
        raise SettingsError(f"{where}: larger than {MAX_FILE_BYTES:,} bytes; this is not a settings file.")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 20:
                raise SettingsError(f"{where}: nested more than 20 levels deep.")
            if isinstance(event, yaml.AliasEvent):
                raise SettingsError(f"{where}: YAML aliases are not allowed.")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except SettingsError as error:
        raise SettingsError(error.args[0] if where in error.args[0] else f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits, a date
        raise SettingsError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def stages_file() -> Path:
    """The settings file: inside an installed package, else at the top of the source tree."""
    here = Path(__file__).resolve().parent
    return here / "stages.yaml" if (here / "stages.yaml").exists() else here.parent / "stages.yaml"


def _merge(base: dict, over: Any, where: str, path: str = "") -> dict:
    if not isinstance(over, dict):
        what = f"{where}: {path.rstrip('.')}" if path else where
        raise SettingsError(f"{what} is a section with the keys {', '.join(map(str, base))}.")
    merged = dict(base)
    for key, value in over.items():
        name = f"{path}{key}"
        if key not in base:
            raise SettingsError(f"{where}: unknown key {name!r}; allowed here: {', '.join(map(str, base))}.")
        if isinstance(base[key], dict) and name != "clip.kwargs":
            opened = name in OPEN and isinstance(value, dict)
            value = base[key] | value if opened else _merge(base[key], value, where, f"{name}.")
        merged[key] = value
    return merged


def _override(assignment: str) -> list[dict]:
    key, sign, text = assignment.partition("=")
    if not sign or not key.strip():
        raise SettingsError(f"--set {assignment}: write --set key=value, for example --set train.lr=1e-4.")
    return _trees(key.strip(), parse_yaml(text, f"--set {assignment}") if text else "")


def _trees(key: str, value: Any) -> list[dict]:
    """`train.lr` and a value -> {stage1: {lr: value}} and {stage2: {lr: value}}."""
    names = key.split(".")
    tops = ("stage1", "stage2", "finetune") if names[0] == "train" else (names[0],)
    trees = []
    for top in tops:
        tree = value
        for name in reversed([top, *names[1:]]):
            tree = {name: tree}
        trees.append(tree)
    return trees


def load_settings(
    preset: str = "tiny",
    config: Path | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    seed: int | None = None,
) -> Settings:
    """Resolves the settings of one run.

    Args:
        preset: `tiny` or `paper`.
        config: a YAML file laid out as stages.yaml; it may hold any part of a preset.
        overrides: `key=value` texts; `train.X` stands for stage1.X, stage2.X and finetune.X.
        seed: replaces `seed`.

    Raises: SettingsError, one sentence that names the key.
    """
    values = load_values(preset, config, overrides)
    del values["ablations"]  # what several runs are compared for is no setting of one run (xformer/lab/variants.py)
    if seed is not None:
        values["seed"] = seed
    return settings_from(values | {"preset": preset}, "settings")


def load_values(preset: str, config: Path | None, overrides: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """A preset with a file's and the command line's changes, keys checked and values not. Raises SettingsError."""
    if preset not in PRESETS:
        raise SettingsError(f"--preset {preset}: allowed are {' and '.join(PRESETS)}.")
    presets = parse_yaml(stages_file().read_text(encoding="utf-8"), "stages.yaml")
    if config is not None:
        if not config.is_file():
            what = "this is a folder, not a YAML file" if config.is_dir() else "there is no such file"
            raise SettingsError(f"--config {config}: {what}.")
        over = parse_yaml(config.read_text(encoding="utf-8", errors="replace"), str(config))
        over = {} if over is None else over
        if not isinstance(over, dict) or not set(over) <= set(PRESETS):
            raise SettingsError(f"{config}: the top level must hold only the presets {' and '.join(PRESETS)}.")
        for name, part in over.items():
            if part is not None:
                presets[name] = _merge(presets[name], part, f"{config}: {name}")
            if name != preset:  # a mistake there would stay hidden until that preset is used
                settings_from(
                    {k: v for k, v in presets[name].items() if k != "ablations"} | {"preset": name}, str(config)
                )
    values = presets[preset]
    for assignment in overrides:
        for tree in _override(assignment):
            values = _merge(values, tree, f"--set {assignment}")
    return values


def changed(values: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """Values with `changes`, from dotted key to value, on top. Raises SettingsError, which names `where` and the key."""
    for key, value in changes.items():
        for tree in _trees(key, value):
            values = _merge(values, tree, where)
    return values


def settings_from(values: dict[str, Any], where: str) -> Settings:
    """Validates resolved values, for example those saved with a run. Raises SettingsError."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "these values"
        message = first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r})" if first["loc"] and not isinstance(first["input"], dict) else ""
        raise SettingsError(f"{where}: {key}: {message}{got}.") from None


def with_overrides(settings: Settings, overrides: tuple[str, ...] | list[str]) -> Settings:
    """Resolved settings with `key=value` texts on top. Raises SettingsError."""
    values = settings.dump()
    for assignment in overrides:
        for tree in _override(assignment):
            values = _merge(values, tree, f"--set {assignment}")
    return settings_from(values, "settings")
