"""The local tokens that stand beside C: M of the MAE, masked or whole, or the tokens of an earlier CLIP block (Table 5)."""

from typing import Literal

from xformer.settings import Settings

MODELS = ("xformer", "qformer", "concat", "early")
Phase = Literal["stage1", "stage2", "eval"]


def local_tokens(settings: Settings, model: str) -> Literal["mae", "clip"] | None:
    """Which encoder gives a model its local tokens; the plain Q-Former reads none."""
    return None if model == "qformer" else settings.local.tokens


def local_width(settings: Settings) -> int:
    return settings.mae.width if settings.local.tokens == "mae" else settings.clip.width


def mask_ratio(settings: Settings, model: str, phase: Phase) -> float:
    """Share of patches that the MAE does not see; 0 = the whole image. A phase that says nothing does as the one before.

    The paper masks for X-Former (section 3.1) and mentions no mask for concatenation and early cross-attention (2.2).
    """
    said = [settings.local.mask_ratio, settings.stage2.mask_ratio, settings.eval.mask_ratio]
    reached = {"stage1": said[:1], "stage2": said[:2], "eval": said}[phase]
    latest = [ratio for ratio in reached if ratio is not None]
    return latest[-1] if latest else settings.mae.mask_ratio if model == "xformer" else 0.0


def rebuilds(settings: Settings, model: str, stage: Literal["stage1", "stage2"]) -> bool:
    """Whether a stage has a reconstruction loss: only M' of X-Former can be decoded, and only masked patches count."""
    weight = (settings.stage1 if stage == "stage1" else settings.stage2).weights.reconstruction
    masked = settings.local.tokens == "mae" and mask_ratio(settings, model, stage) > 0
    return model == "xformer" and weight > 0 and masked
