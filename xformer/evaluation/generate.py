"""Zero-shot answers: soft prompt from cached features, the paper's text prompt, beam search (section 4.2)."""

import numpy as np
import torch

from xformer.console import progress
from xformer.data import Cache
from xformer.errors import EvaluationError
from xformer.settings import Eval, Settings
from xformer.stage2 import FrozenLlm, Stage2


@torch.inference_mode()
def complete(
    llm: FrozenLlm, soft: torch.Tensor | None, prompts: list[str], settings: Eval, begin: bool = True
) -> list[str]:
    """Continues prompts after an optional soft prompt [B, Q, W]; text up to the first line break, stripped."""
    device = llm.model.device
    ids, mask = (t.to(device) for t in llm.encode(prompts, None, newline=False, left=True, begin=begin))
    embedded, seen = llm.embed(ids), mask
    if soft is not None:
        embedded = torch.cat([soft.to(embedded.dtype), embedded], 1)
        seen = torch.cat([mask.new_ones(len(mask), soft.shape[1]), mask], 1)
    needed = seen.shape[1] + settings.max_new_tokens
    if needed > llm.context:
        raise EvaluationError(
            f"the prompt has {ids.shape[1]} tokens and needs {needed} with image tokens and {settings.max_new_tokens} new "
            f"ones; the language model's context (max_position_embeddings) is {llm.context}: ask a shorter question."
        )
    tokens = llm.model.generate(
        inputs_embeds=embedded,
        attention_mask=seen.long(),
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=llm.newline,
        pad_token_id=llm.pad,
    )
    texts = llm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.partition("\n")[0].strip() for text in texts]


def answer(
    stage2: Stage2, cache: Cache, rows: np.ndarray, questions: list[str], settings: Settings, title: str
) -> list[str]:
    """Answers `questions[i]` about the image in `rows[i]`. Questions are asked in order of length, answered in order."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    found = [""] * len(questions)
    device = next(stage2.parameters()).device
    draw = settings.eval.draw % max(1, cache.draws)
    with progress(title, len(questions), "questions") as bar:
        for start in range(0, len(order), settings.eval.batch):
            part = order[start : start + settings.eval.batch]
            features = cache.read(rows[part], draw)
            local = None if features.mae is None else torch.from_numpy(features.mae).to(device)
            with torch.inference_mode():
                soft, _ = stage2.prefix(torch.from_numpy(features.clip).to(device), local)
            prompts = [settings.eval.prompt.format(questions[i]) for i in part]
            for i, text in zip(part, complete(stage2.llm, soft, prompts, settings.eval), strict=True):
                found[i] = text
            bar.advance(len(part))
    return found


def answer_from_captions(llm: FrozenLlm, captions: list[str], questions: list[str], settings: Settings) -> list[str]:
    """The same language model given a true caption instead of an image: the ceiling of anything that it can be told."""
    prompts = [f"{c}</s>{settings.eval.prompt.format(q)}" for c, q in zip(captions, questions, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    with progress("LLM given a caption", len(prompts), "questions") as bar:
        for start in range(0, len(order), settings.eval.batch):
            part = order[start : start + settings.eval.batch]
            texts = complete(llm, None, [prompts[i] for i in part], settings.eval, begin=False)
            for i, text in zip(part, texts, strict=True):
                found[i] = text
            bar.advance(len(part))
    return found


def answer_blind(llm: FrozenLlm, questions: list[str], settings: Settings) -> list[str]:
    """The same language model and prompt without any image; every distinct question is asked once."""
    distinct = sorted(set(questions), key=lambda q: (len(q), q))
    known: dict[str, str] = {}
    with progress("blind LLM", len(distinct), "distinct questions") as bar:
        for start in range(0, len(distinct), settings.eval.batch):
            part = distinct[start : start + settings.eval.batch]
            texts = complete(llm, None, [settings.eval.prompt.format(q) for q in part], settings.eval)
            known |= dict(zip(part, texts, strict=True))
            bar.advance(len(part))
    return [known[q] for q in questions]
