"""A tiny OPT on the training split's text only: captions, questions, and caption + question + answer.

A frozen OPT knows the language and the question format before it ever meets an image; so does this one. After stage 2
the projected queries stand where the first caption stands here: in front of the leading </s>.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from pipeline import pretrain
from xformer.console import progress, say
from xformer.text import clean

VOCABULARY, WIDTH, DEPTH, CONTEXT = 512, 128, 4, 256
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids: 1 pads, 2 begins and ends
END, PAD = 2, 1
MAX_WORDS = 50  # captions are cleaned as stage 2 cleans them
QUESTIONS = 6  # per caption in a training text
BLIND = 0.1  # share of training texts without a caption in front: what the language alone can know
NOISE = 0.5  # of the embeddings' own standard deviation, at most, on the caption in front
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


@dataclass(frozen=True)
class Known:
    """What can be said about one training picture, tokenised: captions, and questions with their answers."""

    captions: list[list[int]]
    asked: list[tuple[list[int], list[int]]]


def write_sample(rng: np.random.Generator, known: Known, newline: int) -> tuple[list[int], list[tuple[list[int], int]]]:
    """One training text about one picture: a caption in front (now and then nothing), and what may follow it.

    Returns: the front's ids, and the continuations: ids, </s> first and a line break last, and how many of the last
    ids are an answer. The first continuation is another caption, the others are questions.
    """
    first, second = (known.captions[i] for i in rng.permutation(len(known.captions))[:2])
    chosen = [known.asked[i] for i in rng.permutation(len(known.asked))[:QUESTIONS]]
    said = [([END, *second, newline], 0)]
    said += [([END, *question, *answer], len(answer)) for question, answer in chosen]
    return ([] if rng.random() < BLIND else first), said


@dataclass(frozen=True)
class Packed:
    """Samples side by side in rows: a continuation sees the front and itself, at the positions that follow the front."""

    ids: Tensor  # int64 [B, T], PAD where nothing is
    positions: Tensor  # int64 [B, T]
    front: Tensor  # bool [B, T]
    allowed: Tensor  # bool [B, 1, T, T], true = may be attended to
    labels: Tensor  # int64 [B, T], the next id of the same text; -100 where there is none
    answers: Tensor  # bool [B, T], true where the label is part of an answer


def pack(samples: list[tuple[list[int], list[tuple[list[int], int]]]]) -> Packed:
    """Every text as if it stood alone after the front: many questions cost one reading of the caption."""
    longest = max(len(front) + sum(len(ids) for ids, _ in said) for front, said in samples)
    shape = (len(samples), longest)
    ids, positions, part = np.full(shape, PAD), np.zeros(shape, np.int64), np.full(shape, -1)
    labels, answers = np.full(shape, -100), np.zeros(shape, bool)
    for i, (front, said) in enumerate(samples):
        start = 0
        for number, (text, answered) in enumerate([(front, 0), *said]):
            if not text:
                continue
            here = slice(start, start + len(text))
            ids[i, here], part[i, here] = text, number
            positions[i, here] = np.arange(len(text)) + (len(front) if number else 0)
            labels[i, start : start + len(text) - 1] = text[1:]
            answers[i, start + len(text) - 1 - answered : start + len(text) - 1] = True
            start += len(text)
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    allowed = same & np.tri(longest, dtype=bool)
    packed = (ids, positions, part == 0, allowed[:, None], labels, answers)
    return Packed(*map(torch.from_numpy, packed))


def text_losses(model: Any, packed: Packed, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean loss over all tokens, and over answer tokens, which are few and count as much as all the others.

    The caption in front gets Gaussian noise of up to half the embeddings' standard deviation: soft prompts, which take
    its place in stage 2, are never exactly words, and an OPT of billions of weights bears that unasked.
    """
    embedded = model.get_input_embeddings()(packed.ids)
    table = model.get_input_embeddings().weight.detach()
    spread = table.std() * NOISE * torch.rand(len(packed.ids), 1, 1, generator=generator)
    noise = torch.randn(embedded.shape, generator=generator) * spread
    hidden = model.model(
        inputs_embeds=embedded + noise * packed.front[..., None],
        attention_mask=packed.allowed,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    said = packed.labels != -100
    loss = F.cross_entropy(model.lm_head(hidden[said]), packed.labels[said], reduction="none")
    return loss.mean(), loss[packed.answers[said]].mean()


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


def pretrain_llm(corpus: Path, out: Path, seed: int = 0, steps: int = 4000, batch: int = 24) -> dict[str, object]:
    """Trains and writes `out` (weights, config, tokenizer) with its card; returns the card's figures."""
    rng = pretrain.begin(seed)
    folder = pretrain.shapes_split(corpus, "train")
    captions = pretrain.texts_by_image(folder / "captions.json")
    asked: dict[int, list[tuple[str, str]]] = {}
    for row in json.loads((folder / "qa.json").read_text(encoding="utf-8")):
        asked.setdefault(row["image_id"], []).append((row["question"], row["answer"]))
    ids = np.array(sorted(set(captions) & set(asked)))
    spoken = {int(i): [clean(text, MAX_WORDS) for text in captions[i]] for i in ids}
    tokenizer = byte_tokenizer(
        [text for i in ids[:5000] for text in [*spoken[i], *(f"{PROMPT.format(q)} {a}\n" for q, a in asked[i])]]
    )
    encode = partial(tokenizer.encode, add_special_tokens=False)
    seen: dict[str, list[int]] = {}  # the same questions are asked about many pictures

    def once(text: str) -> list[int]:
        return seen[text] if text in seen else seen.setdefault(text, encode(text))

    known = {
        i: Known([encode(t) for t in texts], [(once(PROMPT.format(q)), once(f" {a}\n")) for q, a in asked[i]])
        for i, texts in spoken.items()
    }
    newline, generator = encode("\n")[0], torch.Generator().manual_seed(seed)
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
        init_std=WIDTH**-0.5,  # OPT's 0.02 is for wide models: here attention would start flat and learn no look-ups
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = pretrain.warm_cosine(optimizer, steps, 300)
    with progress("pretrain llm", steps, "steps") as bar:
        for _ in range(steps):
            samples = [write_sample(rng, known[i], newline) for i in rng.choice(ids, batch).tolist()]
            every, answers = text_losses(model, pack(samples), generator)
            loss = every + answers
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {every.item():.3f}, of answers {answers.item():.3f}")
    model.eval()
    figures = {"training loss of answers, last step": round(answers.item(), 4), "steps": steps, "batch": batch}
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
    given = [clean(captions[q["image_id"]][0], MAX_WORDS) for q in questions]
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
