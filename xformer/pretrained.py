"""A stage-2 checkpoint as a transformers model: trained weights in the folder, frozen parts by id and hash."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from xformer import checkpoint
from xformer.errors import CheckpointError, EvaluationError
from xformer.evaluation.generate import complete
from xformer.local import local_tokens, local_width
from xformer.model import build_xformer
from xformer.saved import model_folder, read_config
from xformer.settings import settings_from
from xformer.stage2 import FrozenLlm, refuse_other_llm


class XFormerConfig(PreTrainedConfig):
    """The variant (one of MODELS), the resolved settings, and the frozen parts: {"llm": {weights, sha256, width}, ...}."""

    model_type = "xformer"

    def __init__(
        self, variant: str = "xformer", settings: dict | None = None, identities: dict | None = None,
        frozen: dict | None = None, stage: int = 2, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.variant, self.settings, self.stage = variant, settings or {}, stage
        self.identities, self.frozen = identities or {}, frozen or {}
        super().__init__(**kwargs)


class XFormerForConditionalGeneration(PreTrainedModel):
    """Cached tokens and a prompt -> text. `from_pretrained` reads local folders only and loads the frozen OPT by its id."""

    config_class = XFormerConfig
    main_input_name = "clip"

    def __init__(self, config: XFormerConfig) -> None:
        super().__init__(config)
        _refuse_stage1(config.stage, "the config")
        self.resolved = settings_from(config.settings, "config.json")
        self.xformer = build_xformer(self.resolved, config.variant, vocabulary=0)
        self.llm_proj = nn.Linear(self.resolved.qformer.width, config.frozen["llm"]["width"])
        self.llm: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The modules initialise themselves."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, llm: str | None = None) -> "XFormerForConditionalGeneration":  # type: ignore[override]
        """Every tensor is checked for its name, shape and values.

        Args:
            folder: a run, a checkpoint, or what `save_pretrained` wrote.
            llm: where the same language model lies on this machine, if not where it was in training.

        Raises: CheckpointError, WeightsError.
        """
        found = model_folder(Path(folder))
        config = read_config(found)
        _refuse_stage1(config["stage"], str(found))
        known = config["frozen"]["llm"]
        settings = settings_from(config["settings"], str(found))
        frozen = FrozenLlm(llm or known["weights"], settings.llm.autocast)
        refuse_other_llm(known["sha256"], frozen, str(found))
        if frozen.width != known["width"]:
            raise CheckpointError(f"{found}: the LLM's width is {frozen.width} here and {known['width']} in training.")
        fields = ("variant", "settings", "identities", "frozen", "stage")  # and nothing else that the file may hold
        model = cls(XFormerConfig(**{field: config[field] for field in fields}))
        checkpoint.load_model(found, model)
        model.llm = frozen
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config.json and the trained weights; the frozen language model is named, not copied."""
        super().save_pretrained(save_directory, state_dict=checkpoint.trainable_state(self), **kwargs)

    def _refuse_features(self, clip: Tensor, local: Tensor | None) -> None:
        """Raises EvaluationError where C or M is not what the variant reads."""
        kind = local_tokens(self.resolved, self.config.variant)
        read: list[tuple[str, Any, int]] = [("clip", clip, self.resolved.clip.width)]
        if kind is not None:
            read.append(("local", local, local_width(self.resolved)))
        for name, value, width in read:
            wanted = f"the variant {self.config.variant!r} reads floating-point numbers [images, tokens, {width}]"
            if not isinstance(value, Tensor):
                raise EvaluationError(f"{name} is {'None' if value is None else type(value).__name__}; {wanted}.")
            if value.ndim != 3 or value.shape[2] != width or 0 in value.shape or not value.is_floating_point():
                raise EvaluationError(f"{name} is {value.dtype} {tuple(value.shape)}; {wanted}.")
            if len(value) != len(clip):
                raise EvaluationError(f"{name} holds {len(value)} images and clip {len(clip)}; give both of the same.")
            broken = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if broken:
                raise EvaluationError(f"{name} holds values that are NaN or infinite (first: image {broken[0]}).")

    def prefix(self, clip: Tensor, local: Tensor | None) -> Tensor:
        """C [B, N, Wc] and M [B, 1 + visible, Wm] -> the soft prompt [B, Q, LLM width]."""
        self._refuse_features(clip, local)
        like = self.llm_proj.weight
        enhanced, _ = self.xformer(clip.to(like), None if local is None else local.to(like))
        return self.llm_proj(enhanced)

    def forward(self, clip: Tensor, local: Tensor | None, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Logits of the language model for the soft prompt followed by input_ids int64 [B, T]."""
        soft = self.prefix(clip, local)
        embedded = torch.cat([soft.to(self.llm.model.dtype), self.llm.embed(input_ids)], 1)
        seen = torch.cat([attention_mask.new_ones(len(soft), soft.shape[1]), attention_mask], 1)
        return self.llm.model(inputs_embeds=embedded, attention_mask=seen.long())

    @torch.inference_mode()
    def generate(self, clip: Tensor, local: Tensor | None = None, prompts: list[str] | None = None) -> list[str]:
        """Continues each prompt after its image by the beam search of `eval`; without prompts describes it, as long as
        `eval.captions` says.

        Args:
            clip, local: as a processor gives them (`prefix`); local is None for a variant that reads none.

        Raises: EvaluationError where features are not what the variant reads, or prompts not one text per image.
        """
        soft = self.prefix(clip, local)
        if prompts is None:
            return complete(self.llm, soft, [self.resolved.llm.prompt] * len(soft), self.resolved.eval.for_captions())
        _refuse_texts("prompts", prompts, len(soft))
        return complete(self.llm, soft, prompts, self.resolved.eval)

    def ask(self, clip: Tensor, local: Tensor | None, questions: list[str]) -> list[str]:
        """Answers one question per image in the words of `eval.prompt`. Raises as `generate`."""
        self._refuse_features(clip, local)
        _refuse_texts("questions", questions, len(clip))
        if blank := [i for i, question in enumerate(questions) if not question.strip()]:
            raise EvaluationError(f"questions[{blank[0]}] is {questions[blank[0]]!r}; ask something.")
        return self.generate(clip, local, [self.resolved.eval.prompt.replace("{}", q) for q in questions])


def _refuse_stage1(stage: int, where: str) -> None:
    if stage != 2:
        raise CheckpointError(f"{where}: stage is {stage} and must be 2: only stage 2 has a language model.")


def _refuse_texts(name: str, texts: Any, images: int) -> None:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise EvaluationError(f"{name} is {texts!r}; give a list of one text per image ({images}).")
    if len(texts) != images:
        raise EvaluationError(f"{name} holds {len(texts)} texts and clip {images} images; give one per image.")
