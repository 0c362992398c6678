"""A tiny OPT on the training split's text only: captions, questions, and caption + question + answer.

A frozen OPT knows the language and the question format before it ever meets an image; so does this one. After stage 2
the projected queries stand where the first caption stands here: in front of the leading </s>.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from pipeline import pretrain
from xformer.console import progress, say

VOCABULARY, WIDTH, DEPTH, CONTEXT = 512, 128, 4, 256
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids: 1 pads, 2 begins and ends
PROMPT = "Question: {} Short Answer:"


def byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE as OPT's: every text is representable, </s> leads, a line break is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def write_sample(rng: np.random.Generator, captions: list[str], asked: list[tuple[str, str]]) -> str:
    """One training text about one picture; </s> is written out where it stands."""
    first, second = (captions[i] for i in rng.permutation(len(captions))[:2])
    order = rng.permutation(len(asked))
    answers = [f"{PROMPT.format(asked[i][0])} {asked[i][1]}\n" for i in order]
    form = rng.random()
    if form < 0.50:  # comprehension: the caption holds the answer
        return first + "</s>" + "</s>".join(answers[:3])
    if form < 0.80:
        return f"{first}</s>{second}\n"
    if form < 0.88:
        return f"</s>{first}\n"
    return f"</s>{answers[0]}"


def read_answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, prefixes: list[str], questions: list[str]
) -> list[str]:
    """Greedy answers to questions, each after its prefix (a caption, or nothing)."""
    found = []
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    for start in range(0, len(questions), 100):
        part = slice(start, start + 100)
        texts = [f"{p}</s>{PROMPT.format(q)}" for p, q in zip(prefixes[part], questions[part], strict=True)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=newline, pad_token_id=1
        )
        found += [t.strip() for t in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]
    return found


def pretrain_llm(corpus: Path, out: Path, seed: int = 0, steps: int = 14000, batch: int = 32) -> dict[str, object]:
    """Trains and writes `out` (weights, config, tokenizer) with its card; returns the card's figures."""
    rng = pretrain.begin(seed)
    folder = pretrain.shapes_split(corpus, "train")
    captions = pretrain.texts_by_image(folder / "captions.json")
    asked: dict[int, list[tuple[str, str]]] = {}
    for row in json.loads((folder / "qa.json").read_text(encoding="utf-8")):
        asked.setdefault(row["image_id"], []).append((row["question"], row["answer"]))
    ids = np.array(sorted(set(captions) & set(asked)))
    sample = [write_sample(rng, captions[i], asked[i]) for i in ids[:5000]]
    tokenizer = byte_tokenizer([part for text in sample for part in text.split("</s>")])
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        ffn_dim=4 * WIDTH,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = pretrain.warm_cosine(optimizer, steps, 300)
    with progress("pretrain llm", steps, "steps") as bar:
        for _ in range(steps):
            texts = [write_sample(rng, captions[i], asked[i]) for i in rng.choice(ids, batch)]
            tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
            loss = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    model.eval()
    figures = {"training loss, last step": round(loss.item(), 4), "steps": steps, "batch": batch}
    figures |= _reading(model, tokenizer, pretrain.shapes_split(corpus, "val"))
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    pretrain.write_card(
        out,
        "Tiny OPT",
        [
            f"transformers OPTForCausalLM, {sum(p.numel() for p in model.parameters()):,} parameters, byte-level BPE of "
            f"{len(tokenizer)} tokens.",
            f"Trained on the text of {len(ids):,} training pictures of the shapes corpus (captions, questions, and caption "
            f"+ question + answer), never on a picture; seed {seed}.",
            "The reading ceiling below is its accuracy on validation questions when it is given a true caption.",
            f"Made again by: xformer pretrain llm --corpus DIR --out DIR --seed {seed}",
        ],
        figures,
    )
    say(f"wrote {out}")
    return figures


def _reading(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, object]:
    """Accuracy (exact match) on validation questions with a true caption, and with nothing, per answer type."""
    captions = pretrain.texts_by_image(folder / "captions.json")
    questions = json.loads((folder / "vqa_questions.json").read_text(encoding="utf-8"))["questions"][:2000]
    annotations = json.loads((folder / "vqa_annotations.json").read_text(encoding="utf-8"))["annotations"][:2000]
    texts = [q["question"] for q in questions]
    given = [captions[q["image_id"]][0] for q in questions]
    figures: dict[str, object] = {}
    for name, prefixes in (("given a true caption", given), ("blind", [""] * len(texts))):
        answers = read_answers(model, tokenizer, prefixes, texts)
        for kind in ("number", "yes/no", "other"):
            right = [
                a == row["multiple_choice_answer"]
                for a, row in zip(answers, annotations, strict=True)
                if row["answer_type"] == kind
            ]
            figures[f"accuracy {name}, {kind}"] = round(sum(right) / len(right), 4)
    return figures
