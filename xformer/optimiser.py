"""AdamW as BLIP-2 sets it up, and the learning rate of every step."""

import math

import torch
from torch import nn

from xformer.settings import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up from warmup_lr to lr, then a cosine to min_lr, per step (LAVIS moves it once per epoch)."""
    warmup = min(recipe.warmup, max(1, steps // 2)) if recipe.warmup else 0
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no weight decay on 0-D and 1-D parameters and on the queries."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name.endswith("query_tokens") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
