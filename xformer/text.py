"""Captions as the Q-Former reads them: cleaned, tokenised, padded to the longest of the batch only, rounded up to 8."""

import re

import torch
from torch import Tensor

from xformer.weights import readable, resolve


def clean(caption: str, max_words: int) -> str:
    """Lower case, punctuation stripped, at most `max_words` words (LAVIS BlipCaptionProcessor.pre_caption)."""
    text = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(text.split()[:max_words])


class TextTokenizer:
    """A BERT-style tokenizer with the extra token [DEC] that begins generation (BLIP-2: vocabulary 30523)."""

    def __init__(self, spec: str, max_tokens: int, max_words: int) -> None:
        from transformers import AutoTokenizer

        folder = resolve(spec, ("tokenizer.json|vocab.txt",), "qformer.text")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.vocabulary = len(self._tokenizer)
        self.begin = int(self._tokenizer.convert_tokens_to_ids("[DEC]"))
        self.max_tokens, self.max_words = max_tokens, max_words

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids int64 [B, T], [CLS] first and [SEP] last, and mask bool [B, T]."""
        texts = [clean(caption, self.max_words) for caption in captions]
        batch = self._tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            pad_to_multiple_of=8,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def generation_labels(ids: Tensor, mask: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of ITG: [CLS] becomes [DEC]; every token predicts the next one, [SEP] the last.

    Returns: inputs int64 [B, T] and labels int64 [B, T], -100 where nothing is predicted.
    """
    inputs = ids.clone()
    inputs[:, 0] = begin
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return inputs, labels


def bert_state(spec: str) -> dict[str, Tensor]:
    """The weights that fill a Q-Former. Raises WeightsError where they are missing."""
    from safetensors.torch import load_file

    folder = resolve(spec, ("model.safetensors",), "qformer.text")
    with readable(spec):
        state = load_file(folder / "model.safetensors")
    return {
        key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
        for key, value in state.items()
    }
