"""A stage-2 checkpoint as a transformers model: trained weights in the folder, frozen parts by id and hash."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from xformer import checkpoint
from xformer.errors import CheckpointError
from xformer.evaluation.generate import complete
from xformer.model import build_xformer
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


def model_folder(folder: Path) -> Path:
    """The folder with config.json: of a run its newest checkpoint. Raises CheckpointError."""
    if (folder / "checkpoints").is_dir():
        folder = checkpoint.newest(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; give a run, one of its checkpoints, or a saved model.")
    return folder


class XFormerForConditionalGeneration(PreTrainedModel):
    """Cached tokens and a prompt -> text. `from_pretrained` reads local folders only and loads the frozen OPT by its id."""

    config_class = XFormerConfig
    main_input_name = "clip"

    def __init__(self, config: XFormerConfig) -> None:
        super().__init__(config)
        if config.stage != 2 or "llm" not in config.frozen:
            raise CheckpointError("stage is 1 in this checkpoint and must be 2: only stage 2 has a language model.")
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
        model = cls(XFormerConfig.from_pretrained(str(found), local_files_only=True))
        try:
            tensors = load_file(found / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{found / 'model.safetensors'} cannot be read: {error}") from None
        checkpoint.fill(model, tensors, str(found))
        known = model.config.frozen["llm"]
        frozen = FrozenLlm(llm or known["weights"], model.resolved.llm.autocast)
        refuse_other_llm(known["sha256"], frozen, str(found))
        if frozen.width != known["width"]:
            raise CheckpointError(f"{found}: the LLM's width is {frozen.width} here and {known['width']} in training.")
        model.llm = frozen
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config.json and the trained weights; the frozen language model is named, not copied."""
        super().save_pretrained(save_directory, state_dict=checkpoint.trainable_state(self), **kwargs)

    def prefix(self, clip: Tensor, local: Tensor | None) -> Tensor:
        """C [B, N, Wc] and M [B, 1 + visible, Wm] -> the soft prompt [B, Q, LLM width]."""
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
        `eval.captions` says."""
        search = self.resolved.eval.for_captions() if prompts is None else self.resolved.eval
        begin = [self.resolved.llm.prompt] * len(clip) if prompts is None else prompts
        return complete(self.llm, self.prefix(clip, local), begin, search)

    def ask(self, clip: Tensor, local: Tensor | None, questions: list[str]) -> list[str]:
        """Answers one question per image in the words of `eval.prompt`."""
        return self.generate(clip, local, [self.resolved.eval.prompt.replace("{}", q) for q in questions])
