"""Zero-shot answers: soft prompt from cached features, the paper's text prompt, beam search (section 4.2)."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from xformer.console import progress
from xformer.data import Cache
from xformer.errors import EvaluationError
from xformer.evaluation.journal import Journal
from xformer.gather import rank_and_world
from xformer.settings import Eval
from xformer.stage2 import FrozenLlm, Stage2


def refuse_long_prompts(
    llm: FrozenLlm, prompts: Sequence[str], image_tokens: int, settings: Eval, begin: bool = True
) -> None:
    """Raises EvaluationError, with the prompt's beginning, where one leaves no room in the language model's context."""
    room = llm.context - image_tokens - settings.max_new_tokens
    for prompt in prompts:
        if len(prompt.encode()) < room:  # OPT's tokens are of bytes: there are no more of them, and </s>
            continue
        length = llm.encode([prompt], None, newline=False, left=True, begin=begin)[0].shape[1]
        if length > room:
            needed = length + image_tokens + settings.max_new_tokens
            raise EvaluationError(
                f"the prompt {prompt[:60]!r}... has {length} tokens and needs {needed} with {image_tokens} image tokens and "
                f"{settings.max_new_tokens} new ones (eval.max_new_tokens); the language model's context "
                f"(max_position_embeddings) is {llm.context}: ask a shorter question."
            )


@torch.inference_mode()
def complete(
    llm: FrozenLlm, soft: torch.Tensor | None, prompts: list[str], settings: Eval, begin: bool = True
) -> list[str]:
    """Continues prompts after an optional soft prompt [B, Q, W]; text up to the first line break, stripped.

    Raises: EvaluationError where one is too long for the language model.
    """
    refuse_long_prompts(llm, prompts, 0 if soft is None else soft.shape[1], settings, begin)
    device = llm.model.device
    ids, mask = (t.to(device) for t in llm.encode(prompts, None, newline=False, left=True, begin=begin))
    embedded, seen = llm.embed(ids), mask
    if soft is not None:
        embedded = torch.cat([soft.to(embedded.dtype), embedded], 1)
        seen = torch.cat([mask.new_ones(len(mask), soft.shape[1]), mask], 1)
    tokens = llm.model.generate(
        inputs_embeds=embedded,
        attention_mask=seen.long(),
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        min_new_tokens=settings.min_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=llm.newline,
        pad_token_id=llm.pad,
    )
    texts = llm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.partition("\n")[0].strip() for text in texts]


def in_batches(
    title: str, prompts: list[str], size: int, answer: Callable[[list[int]], list[str]], journal: Journal
) -> list[str]:
    """Answers every prompt, those of like length together, and writes each batch down as it comes.

    Batches are the same however often the work is interrupted: one that is not complete is done again as a whole, so
    that an interrupted evaluation ends with the answers of an uninterrupted one. Of several processes each takes every
    so-manieth batch.

    Args:
        answer: prompt numbers -> their answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rank, world = rank_and_world()
    known = journal.read()
    with progress(title, len(prompts), "answers") as bar:
        for number, batch in enumerate(batches):
            if number % world == rank and not all(i in known for i in batch):
                texts = answer(batch)
                journal.append(batch, texts)
                known |= dict(zip(batch, texts, strict=True))
            bar.advance(len(batch))
    if world > 1:
        torch.distributed.barrier()
        known = journal.read()
    return [known[i] for i in range(len(prompts))]


class Answerer:
    """A frozen LLM with or without what a bridge tells it about images; every system of a benchmark is one call."""

    def __init__(self, stage2: Stage2, cache: Cache, settings: Eval, journal: Callable[[Any], Journal]) -> None:
        self.stage2, self.cache, self.settings, self.journal = stage2, cache, settings, journal
        self.device = next(stage2.parameters()).device
        self.seconds = {"queries": 0.0, "generation": 0.0}

    def seeing(self, title: str, rows: np.ndarray, prompts: list[str], what: Any) -> list[str]:
        """Continues `prompts[i]` about the image in `rows[i]`. The journal knows pictures by their bytes' sha256."""
        draw = self.settings.draw % max(1, self.cache.draws)

        def answer(batch: list[int]) -> list[str]:
            began = time.perf_counter()
            features = self.cache.read(rows[batch], draw)
            local = None if features.mae is None else torch.from_numpy(features.mae).to(self.device)
            with torch.inference_mode():
                soft, _ = self.stage2.prefix(torch.from_numpy(features.clip).to(self.device), local)
            middle = time.perf_counter()
            texts = complete(self.stage2.llm, soft, [prompts[i] for i in batch], self.settings)
            self.seconds["queries"] += middle - began
            self.seconds["generation"] += time.perf_counter() - middle
            return texts

        hashes = self.cache.store.index.column("sha256")["sha256"]
        pictures = [hashes[int(row)].as_py().hex() for row in rows]
        return in_batches(title, prompts, self.settings.batch, answer, self.journal([what, pictures, prompts]))

    def blind(self, prompts: list[str], what: Any) -> list[str]:
        """The same language model and prompt without any image; every distinct prompt is continued once."""
        distinct = sorted(set(prompts))

        def answer(batch: list[int]) -> list[str]:
            return complete(self.stage2.llm, None, [distinct[i] for i in batch], self.settings)

        texts = in_batches("blind LLM", distinct, self.settings.batch, answer, self.journal([what, distinct]))
        known = dict(zip(distinct, texts, strict=True))
        return [known[prompt] for prompt in prompts]

    def told(self, captions: list[str], prompts: list[str], what: Any) -> list[str]:
        """The same language model given a true caption instead of an image: the ceiling of anything it can be told."""
        texts = [f"{c}</s>{p}" for c, p in zip(captions, prompts, strict=True)]
        refuse_long_prompts(self.stage2.llm, texts, 0, self.settings, begin=False)

        def answer(batch: list[int]) -> list[str]:
            return complete(self.stage2.llm, None, [texts[i] for i in batch], self.settings, begin=False)

        return in_batches("LLM given a caption", texts, self.settings.batch, answer, self.journal([what, texts]))
