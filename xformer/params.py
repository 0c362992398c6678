"""`xformer params`: what every system of the paper trains and what stays frozen, counted on the meta device."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xformer.console import say, table
from xformer.errors import WeightsError
from xformer.local import MODELS
from xformer.model import Stage1, build_xformer
from xformer.settings import Settings, load_settings
from xformer.weights import readable, resolve

VOCABULARY = 30523  # bert-base-uncased and [DEC]

OPT = {  # hidden size, layers, heads, feed-forward: Zhang et al. 2022 (arXiv 2205.01068), table 1
    "opt-125m": (768, 12, 12, 3072),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
}
VIT_MAE_HUGE: dict[str, Any] = {  # He et al. 2022, section 4 and models_mae.py mae_vit_huge_patch14_dec512d8b
    "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14,
    "image_size": 224, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}  # fmt: skip
PAPER = {  # trained in stage 2, as BLIP-2 and X-Former print them
    "opt-2.7b": {"qformer": "107M", "xformer": "129M", "early": "183M"},
    "opt-6.7b": {"qformer": "108M", "xformer": "130M"},
}
NOTE_EARLY = (
    "early cross-attention: the paper's 183M is reached only if the Q-Former's text feed-forwards stay counted (the row "
    "below the paper's); stage 2 reads no text and does not hold them, as BLIP-2's 107M does not."
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def known_llm(name: str) -> str:
    """The short name of OPT weights whose shape is known; any other name as it is."""
    return next((known for known in OPT if name.startswith(f"hub:facebook/{known}@")), name)


def own_config(kind: Any, spec: str, option: str) -> Any:
    """A transformers config of the class `kind` in the weights folder `spec`, which the user gave as `option`.

    Raises: WeightsError where config.json is of another model, or cannot be read.
    """
    file = resolve(spec, ("config.json",), option) / "config.json"
    with readable(spec):
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        if found == kind.model_type:
            return kind.from_dict(values)
    raise WeightsError(f"{option} {spec}: model_type is {found!r} in config.json, not {kind.model_type!r}.")


def llm_config(name: str, option: str) -> Any:
    """An OPT's config: one of the known shapes, or read from a weights folder."""
    from transformers import OPTConfig

    if name in OPT:
        width, layers, heads, inner = OPT[name]
        return OPTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=inner, vocab_size=50272,
            word_embed_proj_dim=width, max_position_embeddings=2048,
        )  # fmt: skip
    if ":" not in name and not Path(name).exists():
        raise WeightsError(f"{option} {name}: known shapes are {', '.join(OPT)}; else give a folder with config.json.")
    return own_config(OPTConfig, name, option)


def mae_config(settings: Settings) -> Any:
    from transformers import ViTMAEConfig

    if settings.mae.weights.startswith("hub:facebook/vit-mae-huge"):
        return ViTMAEConfig(**VIT_MAE_HUGE)
    return own_config(ViTMAEConfig, settings.mae.weights, "mae.weights")


def trained(settings: Settings, model: str, llm_width: int) -> dict[str, int]:
    """Parameters that stage 2 trains, part by part; their sum is the paper's count."""
    bridge: Any = build_xformer(settings, model, 0)
    qformer, every = bridge.qformer, settings.qformer.cross_every
    cross = [layer.crossattention for layer in qformer.layers]
    parts = {
        "norm over C": count(bridge.image_norm),
        "queries": qformer.query_tokens.numel() + count(qformer.norm),
        "self-attention": sum(count(layer.attention) for layer in qformer.layers),
        "query feed-forwards": sum(count(layer.query_ffn) for layer in qformer.layers),
        "cross-attention to C": sum(count(block) for block in cross[::every]),
        "cross-attention to M": sum(count(block) for i, block in enumerate(cross) if i % every and block is not None),
        "linear M -> M*": 0 if bridge.concat is None else count(bridge.concat),
        "dual cross-attention": 0 if bridge.dual is None else count(bridge.dual),
        "norm over local CLIP": 0 if bridge.local_norm is None else count(bridge.local_norm),
        "linear to the LLM": count(nn.Linear(settings.qformer.width, llm_width)),
    }
    assert sum(parts.values()) == count(bridge) + parts["linear to the LLM"]
    return parts


def text_feed_forwards(settings: Settings) -> int:
    bridge: Any = build_xformer(settings, "qformer", VOCABULARY)
    return sum(count(layer.text_ffn) for layer in bridge.qformer.layers)


def trained_stage1(settings: Settings, model: str) -> int:
    bridge = build_xformer(settings, model, VOCABULARY)
    return count(Stage1(bridge, None, settings.qformer.width, settings.qformer.projection, 0, "layerwise", 0.0))


def frozen(settings: Settings, llm: Any, name: str) -> dict[str, int]:
    """Parameters of the frozen parts: CLIP up to the block whose output is C, the MAE's two halves, the OPT."""
    import timm
    from transformers import OPTForCausalLM, ViTMAEForPreTraining

    arguments: dict[str, Any] = dict(settings.clip.kwargs)
    with readable(settings.clip.architecture):
        clip: Any = timm.create_model(settings.clip.architecture, pretrained=False, num_classes=0, **arguments)
    unused = [*clip.blocks[settings.clip.layers[0] :], clip.norm, clip.fc_norm]
    with readable(settings.mae.weights):
        mae = ViTMAEForPreTraining(mae_config(settings))
    with readable(name):
        opt = OPTForCausalLM(llm)
    return {
        f"CLIP to block {settings.clip.layers[0]}": count(clip) - sum(count(part) for part in unused),
        "MAE encoder": count(mae.vit),
        "MAE decoder": count(mae.decoder),
        "OPT": count(opt),
    }


def params(settings: Settings, llm: str | None, as_json: bool) -> dict[str, Any]:
    """Counts all systems and prints them beside the paper's figures, as tables or as JSON. Returns what JSON holds."""
    name = known_llm(llm or settings.llm.weights)
    config = llm_config(name, "--llm" if llm else "llm.weights")
    with torch.device("meta"):
        fixed = frozen(settings, config, name)  # first: it refuses sizes that no OPT can have
        parts = {model: trained(settings, model, config.word_embed_proj_dim) for model in MODELS}
        first = {model: trained_stage1(settings, model) for model in MODELS}
        text = text_feed_forwards(settings)
    own, paper = settings.dump(), load_settings("paper").dump()
    same = all(own[part] == paper[part] for part in ("clip", "mae", "qformer", "dual", "local"))
    figures = PAPER.get(name, {}) if same else {}
    report = {
        "preset": settings.preset,
        "llm": name,
        "trainable": {
            model: {
                "stage2": sum(found.values()),
                "parts": found,
                "stage2_with_text_feed_forwards": sum(found.values()) + text,
                "stage1": first[model],
                "paper": figures.get(model),
            }
            for model, found in parts.items()
        },
        "frozen": fixed,
        "note": NOTE_EARLY,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return report
    titles = {"xformer": "X-Former", "qformer": "Q-Former", "concat": "concatenation", "early": "early cross-attention"}
    rows = [(part, *[f"{found[part]:,}" for found in parts.values()]) for part in parts["xformer"]]
    rows = [row for row in rows if set(row[1:]) != {"0"}]
    rows += [("stage 2", *[f"{sum(found.values()):,}" for found in parts.values()])]
    rows += [("the paper", *[figures.get(model) for model in parts])]
    rows += [("with text feed-forwards", *[f"{(sum(found.values()) + text) / 1e6:.1f}M" for found in parts.values()])]
    rows += [("stage 1", *[f"{n:,}" for n in first.values()])]
    table(f"trainable parameters, preset {settings.preset}, {name}", ("", *[titles[model] for model in parts]), rows)
    table("frozen parameters", ("", "count"), [(part, f"{n:,}") for part, n in fixed.items()])
    say(f"\nNote. {NOTE_EARLY}")
    return report
