"""BLIP-2 from LAVIS files and transformers folders: the paper's Q-Former baseline, and a warm start for X-Former."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xformer import checkpoint
from xformer.accounting import Account, Rules, account, plain, sizes
from xformer.errors import WeightsError
from xformer.model import Stage1, build_xformer
from xformer.params import OPT, known_llm, llm_config
from xformer.settings import Settings
from xformer.weights import is_here, sha256_of, sha256_of_folder

OURS = "xformer.qformer"


def _layers(prefix: str, inner: str) -> Rules:
    """The layers of a Q-Former below `prefix`; `inner` is what the attention calls its projections' parent."""
    start, here = rf"{prefix}\.encoder\.layer\.(\d+)\.", rf"{OURS}.layers.\1."
    rules = [
        (start + rf"(attention|crossattention)\.{inner}\.(query|key|value)\.(weight|bias)", here + r"\2.\3.\4"),
        (start + r"(attention|crossattention)\.output\.dense\.(weight|bias)", here + r"\2.output.\3"),
        (start + r"(attention|crossattention)\.output\.LayerNorm\.(weight|bias)", here + r"\2.norm.\3"),
    ]
    for ffn, tail in (("query_ffn", "_query"), ("text_ffn", "")):
        rules += [
            (start + rf"intermediate{tail}\.dense\.(weight|bias)", here + rf"{ffn}.intermediate.\2"),
            (start + rf"output{tail}\.dense\.(weight|bias)", here + rf"{ffn}.output.\2"),
            (start + rf"output{tail}\.LayerNorm\.(weight|bias)", here + rf"{ffn}.norm.\2"),
        ]
    return rules


LAVIS: Rules = [
    *_layers(r"Qformer\.bert", "self"),
    (r"query_tokens", f"{OURS}.query_tokens"),
    (r"ln_vision\.(weight|bias)", r"xformer.image_norm.\1"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", rf"{OURS}.norm.\1"),
    (r"Qformer\.bert\.embeddings\.word_embeddings\.weight", f"{OURS}.words.weight"),
    (r"Qformer\.bert\.embeddings\.position_embeddings\.weight", f"{OURS}.positions.weight"),
    (r"Qformer\.cls\.predictions\.transform\.dense\.(weight|bias)", rf"{OURS}.head_dense.\1"),
    (r"Qformer\.cls\.predictions\.transform\.LayerNorm\.(weight|bias)", rf"{OURS}.head_norm.\1"),
    (r"Qformer\.cls\.predictions\.bias", f"{OURS}.head_bias"),
    (r"(vision_proj|text_proj|itm_head)\.(weight|bias)", r"\1.\2"),
    (r"temp", "temperature"),
    (r"opt_proj\.(weight|bias)", r"llm_proj.\1"),
]
LAVIS_LEFT: Rules = [
    (r"Qformer\.bert\.embeddings\.position_ids", "a constant: 0, 1, 2, ..."),
    (r"Qformer\.cls\.predictions\.decoder\.weight", "tied to the word embeddings, and equal to them"),
    (r"Qformer\.cls\.predictions\.decoder\.bias", "tied to Qformer.cls.predictions.bias, and equal to it"),
    (r"opt_model\.lm_head\.weight", "the frozen OPT's tied embedding, which LAVIS does not drop; llm.weights names it"),
]
TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
TRANSFORMERS: Rules = [
    *_layers("qformer", "attention"),
    (r"query_tokens", f"{OURS}.query_tokens"),
    (r"vision_model\.post_layernorm\.(weight|bias)", r"xformer.image_norm.\1"),  # LAVIS ln_vision
    (r"qformer\.layernorm\.(weight|bias)", rf"{OURS}.norm.\1"),
    (r"embeddings\.word_embeddings\.weight", f"{OURS}.words.weight"),
    (r"embeddings\.position_embeddings\.weight", f"{OURS}.positions.weight"),
    (r"vision_projection\.(weight|bias)", r"vision_proj.\1"),
    (r"text_projection\.(weight|bias)", r"text_proj.\1"),
    (r"itm_head\.(weight|bias)", r"itm_head.\1"),
    (r"language_projection\.(weight|bias)", r"llm_proj.\1"),
]
TRANSFORMERS_LEFT: Rules = [
    (r"vision_model\.(embeddings|encoder)\..*", "the frozen CLIP; `xformer extract` runs clip.weights"),
    (r"language_model\..*", "the frozen language model; llm.weights names it"),
    (r"embeddings\.position_ids", "a constant: 0, 1, 2, ..."),
]


def _compare_sizes(source: Path, tensors: dict[str, Tensor], settings: Settings, prefix: str, inner: str) -> None:
    """Raises WeightsError that names the first setting in which a file is of another size, and both values."""
    q, layer = settings.qformer, f"{prefix}.encoder.layer."
    numbered = [found for k in tensors if (found := re.match(rf"{re.escape(layer)}([0-9]+)\.(crossattention\.)?", k))]
    cross = sorted({int(found[1]) for found in numbered if found[2]})
    key, ffn = f"{layer}0.crossattention.{inner}.key.weight", f"{layer}0.intermediate_query.dense.weight"
    for needed in ("query_tokens", key, ffn):
        if needed not in tensors:
            raise WeightsError(f"{source}: {needed} is missing; this is no BLIP-2 Q-Former.")
    _, queries, width = sizes(source, tensors, "query_tokens", (1, q.queries, q.width))
    found = {
        "qformer.queries": (queries, q.queries),
        "qformer.width": (width, q.width),
        "qformer.layers": (len({found[1] for found in numbered}), q.layers),
        "qformer.intermediate": (sizes(source, tensors, ffn, (q.intermediate, q.width))[0], q.intermediate),
        "qformer.cross_every": (cross[1] - cross[0] if len(cross) > 1 else q.cross_every, q.cross_every),
        "clip.width": (sizes(source, tensors, key, (q.width, settings.clip.width))[1], settings.clip.width),
    }
    for name, (theirs, ours) in found.items():
        if theirs != ours:
            hint = "" if settings.preset == "paper" else " (BLIP-2's own size is --preset paper)"
            raise WeightsError(f"{source}: {name} is {theirs} in the file and {ours} in the settings{hint}.")


def _wanted(settings: Settings, stage: int, vocabulary: int, llm_width: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        bridge = build_xformer(settings, "qformer", vocabulary if stage == 1 else 0)
        q = settings.qformer
        if stage == 1:
            return {
                n: p.shape for n, p in Stage1(bridge, None, q.width, q.projection, 0, "layerwise", 0).named_parameters()
            }
        whole = nn.ModuleDict({"xformer": bridge, "llm_proj": nn.Linear(q.width, llm_width)})
        return {n: p.shape for n, p in whole.named_parameters()}


def import_blip2(
    source: Path, tensors: dict[str, Tensor], out: Path, settings: Settings, lavis: bool
) -> dict[str, Any]:
    """Writes a run of the model `qformer` with one checkpoint, step 0; stage 2 where the file has a projection to an LLM.

    Args:
        lavis: LAVIS names; else those of transformers. transformers drops the temperature and the ITG head, which then
            start as new ones.
    """
    if t5 := sorted(k for k in tensors if k.startswith(("t5_proj", "t5_model", "llm_proj", "llm_model"))):
        raise WeightsError(f"{source}: {t5[0]} belongs to a T5 or Vicuna model; only BLIP-2 with OPT is supported.")
    frozen = {k for k in tensors if k.startswith(("visual_encoder.", "opt_model."))} - {"opt_model.lm_head.weight"}
    if eyes := sorted(frozen):
        raise WeightsError(
            f"{source}: {eyes[0]} belongs to a part that stays frozen here; only trained parts are imported."
        )
    _compare_sizes(source, tensors, settings, "Qformer.bert" if lavis else "qformer", "self" if lavis else "attention")
    projection, width = "opt_proj.weight" if lavis else "language_projection.weight", settings.qformer.width
    stage = 2 if projection in tensors else 1
    llm_width = sizes(source, tensors, projection, ("LLM width", width))[0] if stage == 2 else 0
    _refuse_other_llm(source, settings.llm.weights, llm_width)
    words = f"{'Qformer.bert.' if lavis else ''}embeddings.word_embeddings.weight"
    vocabulary = sizes(source, tensors, words, ("vocabulary", width))[0] if words in tensors else 0
    wanted = _wanted(settings, stage, vocabulary, llm_width)
    new = {}
    if stage == 1 and not lavis:
        new = {n: "transformers has no ITG head" for n in wanted if n.startswith(f"{OURS}.head_")}
        new["temperature"] = "transformers drops it"
    for tied, original in TIED.items():
        if tied in tensors and not (original in tensors and _equal(tensors[tied], tensors[original])):
            raise WeightsError(f"{source}: {tied} differs from {original}; here both are one tensor.")
    needed = {n: shape for n, shape in wanted.items() if n not in new}
    rules, left = (LAVIS, LAVIS_LEFT) if lavis else (TRANSFORMERS, TRANSFORMERS_LEFT)
    found = account(source, tensors, rules, left, needed)
    found.new = new
    _start_new(found, wanted)
    identity = {"encoder": "clip", "model": settings.clip.architecture, "final_norm": False,
                "image_size": settings.image_size, "layer": settings.clip.layers[0]}  # fmt: skip
    digest = sha256_of(source) if source.is_file() else sha256_of_folder(source)
    state = {
        "stage": stage, "model": "qformer", "settings": settings.dump(), "features": [], "identities": {"clip": identity},
        "draws": 0, "step": 0, "epoch": 0, "epochs": [], "seconds": 0.0, "validation": {},
        "imported": {"from": str(source), "sha256": digest},
    }  # fmt: skip
    if stage == 2:
        state["llm"] = {"width": llm_width, "sha256": None}
    if checkpoint.checkpoints(out):
        raise WeightsError(f"--out {out} holds a run already; give another folder.")
    checkpoint.write(out, {"model": found.tensors}, state)
    return {"what": f"BLIP-2 stage {stage}", "imported": found.imported, "ignored": found.ignored, "new": found.new}


def _refuse_other_llm(source: Path, weights: str, width: int) -> None:
    """Raises WeightsError where llm.weights, whose width is known or can be read here, is not what a file projects to."""
    name = known_llm(weights)
    if width and (name in OPT or is_here(weights, ("config.json",))):
        ours = llm_config(name, "llm.weights").word_embed_proj_dim
        if ours != width:
            raise WeightsError(
                f"{source}: its language model has width {width}, llm.weights {weights} {ours}; name the file's own with "
                "--set llm.weights=..."
            )


def _equal(tied: Tensor, original: Tensor) -> bool:
    return plain(tied) and plain(original) and tied.shape == original.shape and torch.equal(tied, original.to(tied))


def _start_new(found: Account, wanted: dict[str, torch.Size]) -> None:
    """Tensors that the source lacks start as in a new model: BERT's normal(0, 0.02), norms 1 and 0, LAVIS's 0.07."""
    draw = torch.Generator().manual_seed(0)
    for name in found.new:
        if name == "temperature":
            found.tensors[name] = torch.tensor(0.07)
        elif name.endswith("head_norm.weight"):
            found.tensors[name] = torch.ones(wanted[name])
        elif name.endswith("head_dense.weight"):
            found.tensors[name] = torch.normal(0.0, 0.02, wanted[name], generator=draw)
        else:
            found.tensors[name] = torch.zeros(wanted[name])
