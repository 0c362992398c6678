"""The Q-Former's tiny WordPiece tokenizer: the words of the shapes corpus, and single characters for everything else."""

import string
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline import pretrain
from xformer.console import say

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_text_tokenizer(corpus: Path, out: Path) -> None:
    """Writes tokenizer.json in the layout of bert-base-uncased's."""
    found: set[str] = set()
    for texts in pretrain.texts_by_image(pretrain.shapes_split(corpus, "train") / "captions.json").values():
        for text in texts:
            found |= set(text.lower().replace(",", " ").replace(":", " ").split())
    characters = string.ascii_lowercase + string.digits + string.punctuation
    entries = [*SPECIAL, *characters, *[f"##{c}" for c in characters], *sorted(found - set(characters))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    out.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(out)
    pretrain.write_card(
        out,
        "Tiny WordPiece tokenizer",
        [
            "Words of the shapes corpus's training captions, and single characters, so that any ASCII text is readable.",
            "Made again by: xformer pretrain text --corpus DIR --out DIR",
        ],
        {"entries": len(entries)},
    )
    say(f"wrote {out}")
