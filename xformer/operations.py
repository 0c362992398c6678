"""How much arithmetic each phase costs: the models themselves, counted on the meta device, without weights or data.

One multiply-add is two operations, as everywhere in the project. The same passes, run on real tensors for a moment, give
the rate of a machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.masks import kept_count
from xformer.local import Phase, local_tokens, local_width, mask_ratio, rebuilds
from xformer.loop import make_optimizer
from xformer.model import build_xformer
from xformer.params import VOCABULARY, known_llm, llm_config, mae_config
from xformer.settings import Recipe, Settings
from xformer.text import TextTokenizer
from xformer.weights import is_here

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_FLOP = 5e11  # of one timed training pass: seconds on a laptop
PROBE_SECONDS = 5.0
MAX_PROBE_PARAMETERS = 400e6

Pass = Callable[[int, int], Tensor]  # images and text tokens -> something to differentiate


def count(run: Callable[[], Tensor], backward: bool) -> int:
    """Floating-point operations of `run`, with its backward pass where asked for."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if backward:
            run().backward()
        else:
            with torch.no_grad():
                run()
    return counter.get_total_flops()


def encoder_operations(settings: Settings, whole: bool = False) -> dict[str, Any]:
    """FLOP of one image: `clip` up to the deepest cached block, `mae` for one mask draw; and `clip_tokens` by block.

    Raises: WeightsError where the MAE's config is not here.
    """
    import timm
    from transformers import ViTMAEModel

    side, (clip, mae) = settings.image_size, (settings.clip, settings.mae)
    with torch.device("meta"):
        arguments: dict[str, Any] = dict(clip.kwargs)
        model: Any = timm.create_model(clip.architecture, pretrained=False, num_classes=0, **arguments).eval()
        picture = torch.empty(1, 3, side, side)
        layers = [layer - 1 for layer in sorted(set(clip.layers))]
        more: dict[str, Any] = {"return_prefix_tokens": True, "norm": False, "stop_early": True}
        more |= {"output_fmt": "NLC", "intermediates_only": True}
        found: dict[str, Any] = {
            "clip": count(lambda: model.forward_intermediates(picture, indices=layers, **more)[0][0], False)
        }
        found["clip_tokens"] = {
            layer: model.num_prefix_tokens + (0 if clip.only_global(layer) else model.patch_embed.num_patches)
            for layer in {*clip.layers, settings.local.layer}
        }
        config = mae_config(settings)
        config.mask_ratio = 0.0 if whole else mae.mask_ratio
        vit: Any = ViTMAEModel(config).eval()
        found["mae"] = count(lambda: vit(picture).last_hidden_state, False)
    return found


def stage1_pass(settings: Settings, model: str, clip_tokens: dict[int, int], vocabulary: int) -> tuple[nn.Module, Pass]:
    """The trained modules of stage 1 on the current default device, and the passes of one step (Stage1.forward without
    the choice of negatives, whose shapes depend on the data).

    Raises: WeightsError where the MAE's config is not here.
    """
    from transformers import ViTMAEForPreTraining

    bridge = build_xformer(settings, model, vocabulary)
    decoder: Any = None
    if rebuilds(settings, model, "stage1"):
        config = mae_config(settings)
        config.num_hidden_layers = 0
        decoder = ViTMAEForPreTraining(config).decoder.eval().requires_grad_(False)
    patches = (settings.image_size // settings.mae.patch) ** 2

    def run(images: int, text: int) -> Tensor:
        clip, local = _tokens(settings, model, "stage1", images, clip_tokens)
        ids, mask = torch.zeros(images, text, dtype=torch.long), torch.ones(images, text, dtype=torch.bool)
        words = bridge.qformer.words(ids)
        image = bridge.image_keys_values(clip, local)
        queries, own = bridge.qformer.queries(image)
        enhanced, rebuilt = bridge.enhance(queries, local)
        three = [None if kv is None else (torch.cat([kv[0]] * 3), torch.cat([kv[1]] * 3)) for kv in image]
        matched = bridge.qformer.joint(three, torch.cat([words] * 3), torch.cat([mask] * 3))
        matched, _ = bridge.enhance(matched, None if local is None else torch.cat([local] * 3))
        total = bridge.qformer.text(words, mask).sum() + matched.sum()
        enhances = settings.dual.itg == "enhanced" and model == "xformer"
        prefix = bridge.qformer.enhanced_prefix(enhanced) if enhances else own
        total = total + bridge.qformer.write(prefix, words, mask).sum()
        if decoder is not None:
            order = torch.arange(patches).repeat(images, 1)
            total = total + decoder(rebuilt, order).logits.sum()
        return total

    return nn.ModuleList([bridge] if decoder is None else [bridge, decoder]), run


def stage2_pass(settings: Settings, model: str, clip_tokens: dict[int, int], vocabulary: int) -> tuple[nn.Module, Pass]:
    """As `stage1_pass`: the bridge without text, the linear layer and the frozen OPT."""
    from transformers import OPTForCausalLM

    bridge = build_xformer(settings, model, 0)
    config = llm_config(known_llm(settings.llm.weights), "llm.weights")
    llm: Any = OPTForCausalLM(config).eval().requires_grad_(False)
    project = nn.Linear(settings.qformer.width, config.word_embed_proj_dim)

    def run(images: int, text: int) -> Tensor:
        soft = project(bridge(*_tokens(settings, model, "stage2", images, clip_tokens))[0])
        words = llm.get_input_embeddings()(torch.zeros(images, text, dtype=torch.long))
        return llm(inputs_embeds=torch.cat([soft, words], 1)).logits.sum()

    return nn.ModuleList([bridge, project, llm]), run


def _tokens(
    settings: Settings, model: str, phase: Phase, images: int, count: dict[int, int]
) -> tuple[Tensor, Tensor | None]:
    """C and M of a batch, of any values."""
    side, mae = settings.image_size, settings.mae
    clip = torch.zeros(images, count[settings.clip.layers[0]], settings.clip.width)
    if (kind := local_tokens(settings, model)) is None:
        return clip, None
    if kind == "clip":
        return clip, torch.zeros(images, count[settings.local.layer], settings.clip.width)
    seen = kept_count((side // mae.patch) ** 2, mask_ratio(settings, model, phase))
    return clip, torch.zeros(images, 1 + seen, local_width(settings))


PASSES = {"stage 1": stage1_pass, "stage 2": stage2_pass}


def training_costs(
    settings: Settings, model: str, clip_tokens: dict[int, int], captions: list[str], device: str
) -> dict[str, dict[str, Any]]:
    """What one image-text pair costs in each stage, forward and backward.

    Args:
        captions: a sample; their padded length decides the text's share. Empty, or without the tokenizer: the longest.
        device: where a few passes with random weights are timed; stages too large for that have no rate of their own.

    Returns: by stage `flop` of one pair, `text` tokens, `flop_per_second` of this machine, and `measured`.
    """
    found: dict[str, dict[str, Any]] = {}
    text_settings, tokenizer = settings.qformer, None
    if is_here(text_settings.text, ("tokenizer.json|vocab.txt",)):
        tokenizer = TextTokenizer(text_settings.text, text_settings.max_text, text_settings.max_words)
    vocabulary = VOCABULARY if tokenizer is None else tokenizer.vocabulary
    for stage, build in PASSES.items():
        recipe = settings.stage1 if stage == "stage 1" else settings.stage2
        longest = text_settings.max_text if stage == "stage 1" else settings.stage2.max_text
        text = _text_tokens(tokenizer, longest, recipe.batch, captions)
        with torch.device("meta"):
            module, run = build(settings, model, clip_tokens, vocabulary)
            flop = count(lambda run=run, text=text: run(2, text), True) / 2
        parameters = sum(p.numel() for p in module.parameters())
        batch = int(min(recipe.batch, max(2, PROBE_FLOP // flop)))
        found[stage] = {"flop": flop, "text": text, "measured": False}
        if parameters <= MAX_PROBE_PARAMETERS:
            with torch.device(device):
                seconds = _timed(*build(settings, model, clip_tokens, vocabulary), recipe, batch, text, device)
            found[stage] |= {"flop_per_second": flop * batch / seconds, "measured": True}
    known = [cost["flop_per_second"] for cost in found.values() if cost["measured"]]
    for cost in found.values():
        cost.setdefault("flop_per_second", known[0] if known else encoder_rate(settings, device))
    return found


def _text_tokens(tokenizer: TextTokenizer | None, longest: int, batch: int, captions: list[str]) -> int:
    """Mean padded length of a batch's texts; the longest allowed where there is nothing to measure."""
    size = min(batch, len(captions))
    if tokenizer is None or not size:
        return longest
    lengths = [tokenizer(captions[i : i + size])[0].shape[1] for i in range(0, len(captions) - size + 1, size)]
    return min(longest, round(statistics.mean(lengths)))


def _timed(module: nn.Module, run: Pass, recipe: Recipe, batch: int, text: int, device: str) -> float:
    """Seconds of one training step of `batch` pairs: the median, after one that warms up."""
    dtype, optimizer, times = DTYPES[recipe.precision], make_optimizer(module, recipe), []
    while len(times) < 2 or sum(times) < PROBE_SECONDS:
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            total = run(batch, text)
        total.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def encoder_rate(settings: Settings, device: str) -> float:
    """FLOP per second of this machine in one transformer block of CLIP's width, forward, in the encoder's own dtype."""
    width, dtype = settings.clip.width, DTYPES[settings.clip.autocast]
    heads = width // 64 if width % 64 == 0 else 1
    with torch.device(device):  # in training mode: the fast path of inference is not counted
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        tokens = torch.zeros(4, 257, width)
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        flop, times = count(lambda: block(tokens), False), []
        while len(times) < 4 or sum(times) < 2:
            began = time.perf_counter()
            block(tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return flop / statistics.median(times[1:])
