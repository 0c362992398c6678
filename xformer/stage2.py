"""Stage 2 (X-Former, section 3.3): Z' through one linear layer into a frozen OPT; language-model loss only."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, OPTForCausalLM

from xformer.errors import CheckpointError, SettingsError, WeightsError
from xformer.gather import mean_over_ranks
from xformer.local import rebuilds
from xformer.losses import reconstruction
from xformer.model import Batch, XFormer, build_xformer
from xformer.reconstruction import FrozenDecoder
from xformer.settings import Settings
from xformer.text import clean
from xformer.weights import readable, resolve, sha256_of_folder

Text = tuple[
    Tensor, Tensor, Tensor
]  # token ids int64 [B, T]; which exist, bool [B, T]; which carry the loss, bool [B, T]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenLlm(nn.Module):
    """A frozen OPT with its tokenizer. Text ends at a line break; prompts are padded on the left.

    Args:
        spread: its layers lie on all GPUs of this machine (accelerate's device map). Not tested on several GPUs.
    """

    def __init__(self, weights: str, dtype: str, spread: bool = False) -> None:
        super().__init__()
        weight_files = "model.safetensors|pytorch_model.bin|model.safetensors.index.json|pytorch_model.bin.index.json"
        folder = resolve(weights, ("config.json", weight_files, "tokenizer.json|tokenizer_config.json"), "llm.weights")
        with readable(weights):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.model: Any = OPTForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=DTYPES[dtype], device_map="auto" if spread else None
            )
        if self.model.config.model_type != "opt":
            raise WeightsError(f"weights {weights}: a {self.model.config.model_type} model; only OPT is supported.")
        self.model.eval().requires_grad_(False)
        self.newline = int(self.tokenizer.encode("\n", add_special_tokens=False)[-1])
        self.begin, self.pad = int(self.tokenizer.convert_tokens_to_ids("</s>")), int(self.tokenizer.pad_token_id or 1)
        self.sha256, self.context = sha256_of_folder(folder), int(self.model.config.max_position_embeddings)
        self.width = int(self.model.get_input_embeddings().weight.shape[1])

    def train(self, mode: bool = True) -> "FrozenLlm":
        """Stays in evaluation mode: a frozen model drops nothing."""
        return super().train(False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def encode(
        self, texts: list[str], max_tokens: int | None, newline: bool, left: bool, begin: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Texts -> ids int64 [B, T], </s> first, and mask bool. Truncation never drops the final line break."""
        start = [self.begin] if begin else []
        rows = []
        for text in texts:
            ids = [*start, *self.tokenizer.encode(text, add_special_tokens=False)]
            end = [self.newline] if newline else []
            rows.append((ids if max_tokens is None else ids[: max_tokens - len(end)]) + end)
        longest = max(map(len, rows))
        ids, mask = torch.full((len(rows), longest), self.pad), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), True
        return ids, mask

    def encode_targets(self, prompts: list[str], targets: list[str], max_tokens: int) -> Text:
        """Prompt, target and a line break, padded on the right; the loss is on the target and the line break only.

        An empty prompt leaves the loss on the leading </s> too, as LAVIS's OPT does (blip2_opt.py forward: it masks the
        prompt's tokens, of which </s> is one, only where there is a prompt). What is too long loses the beginning of
        the prompt after </s>, then the end of the target, never the line break.
        """
        rows, labelled = [], []
        for prompt, target in zip(prompts, targets, strict=True):
            asked = self.tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
            said = self.tokenizer.encode(target, add_special_tokens=False)[: max_tokens - 2] + [self.newline]
            asked = asked[max(0, len(asked) - (max_tokens - 1 - len(said))) :]
            rows.append([self.begin, *asked, *said])
            labelled.append(0 if not prompt else 1 + len(asked))
        longest = max(map(len, rows))
        ids, place = torch.full((len(rows), longest), self.pad), torch.arange(longest)[None]
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = place < torch.tensor([len(row) for row in rows])[:, None]
        return ids, mask, mask & (place >= torch.tensor(labelled)[:, None])


class Stage2(nn.Module):
    """X-Former without text, one linear layer, a frozen OPT."""

    def __init__(self, xformer: XFormer, llm: FrozenLlm, width: int, decoder: FrozenDecoder | None = None) -> None:
        super().__init__()
        self.xformer, self.llm, self.decoder = xformer, llm, decoder
        self.llm_proj = nn.Linear(width, llm.width)

    def prefix(self, clip: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """C and M -> soft prompt [B, Q, LLM width], and M'."""
        enhanced, rebuilt = self.xformer(clip.float(), None if local is None else local.float())
        return self.llm_proj(enhanced), rebuilt

    def forward(self, batch: Batch, ids: Tensor, mask: Tensor, labelled: Tensor | None = None) -> dict[str, Tensor]:
        """Language-model loss of the texts after the soft prompt, at the tokens that are `labelled`.

        Args:
            ids: int64 [B, T], </s> first and a line break last; mask: bool [B, T].
            labelled: bool [B, T]; None = all of mask.
        """
        soft, rebuilt = self.prefix(batch.clip, batch.mae)
        embedded = torch.cat([soft.to(self.llm.model.dtype), self.llm.embed(ids)], 1)
        seen = torch.cat([mask.new_ones(len(mask), soft.shape[1]), mask], 1)
        target = mask if labelled is None else labelled
        labels = torch.cat([torch.full(soft.shape[:2], -100, device=ids.device), ids.masked_fill(~target, -100)], 1)
        count = mean_over_ranks((labels != -100).sum())
        said = self.llm.model(
            inputs_embeds=embedded, attention_mask=seen.long(), labels=labels, num_items_in_batch=count
        )
        found = {"lm": said.loss.float()}
        if self.decoder is not None and rebuilt is not None and batch.kept is not None and batch.pixels is not None:
            predicted, masked = self.decoder(rebuilt, batch.kept), mean_over_ranks((~batch.kept).sum())
            found["reconstruction"] = reconstruction(
                predicted, batch.pixels, batch.kept, self.decoder.patch, self.decoder.norm_pix, masked
            )
        return found


def caption_text(llm: FrozenLlm, captions: list[str], settings: Settings) -> Text:
    """Captions after the settings' prompt, which carries no loss; stage 2 and caption fine-tuning."""
    prompt = settings.llm.prompt.rstrip()
    said = [(" " if prompt else "") + clean(caption, settings.qformer.max_words) for caption in captions]
    return llm.encode_targets([prompt] * len(said), said, settings.stage2.max_text)


def question_text(llm: FrozenLlm, questions: list[str], answers: list[str], settings: Settings) -> Text:
    """Questions in the prompt that they are evaluated with, without a loss, and their answers with one."""
    prompts = [settings.eval.prompt.replace("{}", question) for question in questions]
    return llm.encode_targets(prompts, [f" {answer}" for answer in answers], settings.stage2.max_text)


def refuse_long_text(llm: FrozenLlm, settings: Settings, section: str) -> None:
    """Raises SettingsError where queries and the longest text that `section` allows exceed the language model's context."""
    text, queries = settings.stage2.max_text, settings.qformer.queries
    if text + queries > llm.context:
        raise SettingsError(
            f"{section}.max_text is {text:,} tokens, with {queries} image tokens (qformer.queries) before them, and the "
            f"language model's context (max_position_embeddings) is {llm.context:,}: set it to at most "
            f"{llm.context - queries:,}."
        )


def refuse_other_llm(trained_with: str | None, llm: FrozenLlm, checkpoint_name: str) -> None:
    """Raises CheckpointError where the language model is not the one that a checkpoint was trained with."""
    if trained_with is not None and trained_with != llm.sha256:
        raise CheckpointError(
            f"{checkpoint_name}: the language model's sha256 is {llm.sha256[:12]} here and {trained_with[:12]} in training; "
            "give the same llm.weights."
        )


def build_stage2(settings: Settings, model: str, spread: bool = False) -> Stage2:
    xformer = build_xformer(settings, model, vocabulary=0)
    llm = FrozenLlm(settings.llm.weights, settings.llm.autocast, spread)
    decoder = FrozenDecoder(settings.mae.weights) if rebuilds(settings, model, "stage2") else None
    return Stage2(xformer, llm, settings.qformer.width, decoder)
