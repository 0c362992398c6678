"""A tiny OPT on the training split's text only: captions, questions, and caption + question + answer.

A frozen OPT knows the language and the question format before it ever meets an image; so does this one. After stage 2
the projected queries stand where the first caption stands here: in front of the leading </s>.
"""

import json
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


def write_sample(
    rng: np.random.Generator, captions: list[list[int]], asked: list[tuple[list[int], list[int]]], newline: int
) -> tuple[list[int], int, list[int]]:
    """One training text about one picture, from its tokenised captions, questions and answers.

    Returns: token ids, how many of them are the caption in front (0: none), and the places of answer tokens.
    """
    first, second = (captions[i] for i in rng.permutation(len(captions))[:2])
    form = rng.random()
    ids, front, answers, questions = list(first), len(first), [], [asked[i] for i in rng.permutation(len(asked))]
    if form < 0.25:
        return [*first, END, *second, newline], front, []
    if form < 0.30:
        return [END, *first, newline], 0, []
    if form < 0.40:  # blind: what the language alone can know
        ids, front, questions = [], 0, questions[:1]
    for question, answer in questions[:3]:  # comprehension: the caption in front holds the answer
        ids += [END, *question]
        answers += range(len(ids), len(ids) + len(answer))
        ids += answer
    return ids, front, answers


def sample_loss(model: Any, samples: list[tuple[list[int], int, list[int]]], generator: torch.Generator) -> Tensor:
    """Mean over all tokens plus mean over answer tokens, which are few.

    The caption in front gets Gaussian noise of up to the embeddings' own standard deviation: soft prompts, which take
    its place in stage 2, are never exactly words, and an OPT of billions of weights bears that unasked.
    """
    longest = max(len(ids) for ids, _, _ in samples)
    inputs = torch.full((len(samples), longest), PAD)
    weight = torch.zeros(len(samples), longest)
    for i, (ids, _, answers) in enumerate(samples):
        inputs[i, : len(ids)] = torch.tensor(ids)
        weight[i, answers] = 1.0
    seen = inputs != PAD
    embedded = model.get_input_embeddings()(inputs)
    spread = embedded.detach().std() * torch.rand(len(samples), 1, 1, generator=generator)
    noise = torch.randn(embedded.shape, generator=generator) * spread
    front = torch.arange(longest) < torch.tensor([front for _, front, _ in samples])[:, None]
    logits = model(inputs_embeds=embedded + noise * front[..., None], attention_mask=seen.long()).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
    every, answered = seen[:, 1:].flatten().float(), weight[:, 1:].flatten()
    return (loss * every).sum() / every.sum() + (loss * answered).sum() / answered.sum().clamp(min=1)


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


def pretrain_llm(corpus: Path, out: Path, seed: int = 0, steps: int = 10000, batch: int = 32) -> dict[str, object]:
    """Trains and writes `out` (weights, config, tokenizer) with its card; returns the card's figures."""
    rng = pretrain.begin(seed)
    folder = pretrain.shapes_split(corpus, "train")
    captions = pretrain.texts_by_image(folder / "captions.json")
    asked: dict[int, list[tuple[str, str]]] = {}
    for row in json.loads((folder / "qa.json").read_text(encoding="utf-8")):
        asked.setdefault(row["image_id"], []).append((row["question"], row["answer"]))
    ids = np.array(sorted(set(captions) & set(asked)))
    spoken = {int(i): [clean(text, 50) for text in captions[i]] for i in ids}
    tokenizer = byte_tokenizer(
        [text for i in ids[:5000] for text in [*spoken[i], *(f"{PROMPT.format(q)} {a}\n" for q, a in asked[i])]]
    )
    encode = partial(tokenizer.encode, add_special_tokens=False)
    told = {i: [encode(text) for text in texts] for i, texts in spoken.items()}
    known = {int(i): [(encode(PROMPT.format(q)), encode(f" {a}\n")) for q, a in asked[i]] for i in ids}
    newline = encode("\n")[0]
    generator = torch.Generator().manual_seed(seed)
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
            samples = [write_sample(rng, told[i], known[i], newline) for i in rng.choice(ids, batch).tolist()]
            loss = sample_loss(model, samples, generator)
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
    given = [clean(captions[q["image_id"]][0], 50) for q in questions]
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
