"""Weights of LAVIS, transformers and MAE come in key by key, give the references' numbers, and leave again unchanged."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xformer import checkpoint
from xformer.errors import UserError, WeightsError
from xformer.importing import import_weights
from xformer.settings import load_settings
from xformer.text import TextTokenizer

SETTINGS = load_settings()


def lavis_file(file: Path, stage: int, **changes: Tensor | None) -> dict[str, Tensor]:
    """Random weights in the layout that LAVIS writes: blip2_qformer.py (stage 1) and blip2_opt.py (stage 2)."""
    torch.manual_seed(stage)
    q, model = SETTINGS.qformer, {}
    w, n = q.width, q.layers

    def add(name: str, *shape: int) -> None:
        model[name] = torch.randn(*shape) * 0.1 if shape else torch.tensor(0.05)

    def linear(name: str, out: int, inside: int) -> None:
        add(f"{name}.weight", out, inside)
        add(f"{name}.bias", out)

    def norm(name: str, width: int = w) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("query_tokens", 1, q.queries, w)
    norm("ln_vision", SETTINGS.clip.width)
    norm("Qformer.bert.embeddings.LayerNorm")
    for i in range(n):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for block, source in (("attention", w), ("crossattention", SETTINGS.clip.width)):
            if block == "crossattention" and i % q.cross_every:
                continue
            for part in ("query", "key", "value"):
                linear(f"{layer}.{block}.self.{part}", w, w if part == "query" else source)
            linear(f"{layer}.{block}.output.dense", w, w)
            norm(f"{layer}.{block}.output.LayerNorm")
        for tail in ("", "_query") if stage == 1 else ("_query",):
            linear(f"{layer}.intermediate{tail}.dense", q.intermediate, w)
            linear(f"{layer}.output{tail}.dense", w, q.intermediate)
            norm(f"{layer}.output{tail}.LayerNorm")
    if stage == 1:
        words = TextTokenizer(q.text, 40, 50).vocabulary
        add("Qformer.bert.embeddings.word_embeddings.weight", words, w)
        add("Qformer.bert.embeddings.position_embeddings.weight", 512, w)
        model["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
        linear("Qformer.cls.predictions.transform.dense", w, w)
        norm("Qformer.cls.predictions.transform.LayerNorm")
        add("Qformer.cls.predictions.bias", words)
        model["Qformer.cls.predictions.decoder.weight"] = model["Qformer.bert.embeddings.word_embeddings.weight"]
        model["Qformer.cls.predictions.decoder.bias"] = model["Qformer.cls.predictions.bias"]
        linear("vision_proj", q.projection, w)
        linear("text_proj", q.projection, w)
        linear("itm_head", 2, w)
        add("temp")
    else:
        linear("opt_proj", 128, w)
        add("opt_model.lm_head.weight", 90, 128)  # LAVIS drops frozen parameters by name, and a tied one has none
    for key, value in changes.items():
        name = key.replace("__", ".")
        model.pop(name, None) if value is None else model.update({name: value})
    torch.save({"model": model, "optimizer": {"state": {}}, "config": {"run": {}}, "scaler": None, "epoch": 9}, file)
    return model


def test_lavis_import_save_load_gives_the_same_logits_to_the_last_bit(tmp_path: Path) -> None:
    from xformer.evaluation.load import load_stage2
    from xformer.pretrained import XFormerForConditionalGeneration

    lavis_file(tmp_path / "blip2.pth", 2)
    report = import_weights(tmp_path / "blip2.pth", tmp_path / "run", SETTINGS, None)
    assert (
        report["what"] == "BLIP-2 stage 2"
        and [*report["ignored"]] == ["opt_model.lm_head.weight"]
        and not report["new"]
    )
    first = XFormerForConditionalGeneration.from_pretrained(tmp_path / "run")
    first.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"config.json", "model.safetensors"}
    assert (tmp_path / "saved/model.safetensors").stat().st_size < 4 * 540_000  # no language model in it
    again = XFormerForConditionalGeneration.from_pretrained(tmp_path / "saved")
    stage2, state, _ = load_stage2(tmp_path / "run", [])
    assert state["model"] == "qformer"
    clip = torch.randn(2, 17, 96)
    ids, mask = first.llm.encode(["a red circle", "two"], None, newline=False, left=True)
    with torch.no_grad():
        logits = [m(clip, None, ids, mask).logits for m in (first, again)]
        soft, _ = stage2.cpu().prefix(clip, None)
        assert torch.equal(logits[0], logits[1]) and torch.equal(soft, again.prefix(clip, None))
    assert first.generate(clip) == again.generate(clip) and len(again.ask(clip, None, ["What?", "How many?"])) == 2


def test_an_imported_blip2_is_scored_beside_a_trained_x_former(
    features: Path, corpus: Path, stage2: Path, tmp_path: Path
) -> None:
    from cli import main

    lavis_file(tmp_path / "blip2.pth", 2)
    main(["import", str(tmp_path / "blip2.pth"), "--out", str(tmp_path / "run")])
    line = ["eval", "oc", "--checkpoint", str(tmp_path / "run"), "--against", str(stage2), "--features", str(features)]
    line += ["--questions", str(corpus / "val/gvtbench_oc.json"), "--limit", "6", "--no-blind", "--no-shuffled"]
    main([*line, "--set", "eval.beams=1", "--out", str(tmp_path / "e")])
    report = json.loads((tmp_path / "e/scores.json").read_text())
    assert set(report["scores"]) == {"constant answer", "qformer", "xformer"}
    assert report["checkpoint"] == str(tmp_path / "run") and report["against"]["official"]["than"] == "xformer"


def test_a_stage_1_file_is_the_q_former_of_lavis_and_warm_starts_an_x_former(
    features: Path, small: list[str], tmp_path: Path
) -> None:
    from xformer.train import train_stage1, train_stage2

    theirs = lavis_file(tmp_path / "pretrained.pth", 1)
    report = import_weights(tmp_path / "pretrained.pth", tmp_path / "run", SETTINGS, None)
    assert len(report["imported"]) + len(report["ignored"]) == len(theirs)
    assert set(report["ignored"]) == {k for k in theirs if "position_ids" in k or "decoder." in k}
    assert json.loads((tmp_path / "run/import.json").read_text())["imported"] == report["imported"]
    ours = checkpoint.read_tensors(checkpoint.newest(tmp_path / "run"), "model.safetensors")
    assert all(torch.equal(ours[name], theirs[key]) for key, name in report["imported"].items())
    for model in ("qformer", "xformer", "early"):
        settings = load_settings(overrides=[*small, "train.max_steps=1", "local.mask_ratio=0.75", "stage1.lr=1e-9",
                                            "stage1.min_lr=0", "stage1.warmup_lr=0"])  # fmt: skip
        train_stage1([features], tmp_path / model, settings, model, resume=False, init=tmp_path / "run")
        trained = checkpoint.read_tensors(checkpoint.newest(tmp_path / model), "model.safetensors")
        assert torch.allclose(trained["xformer.qformer.query_tokens"], theirs["query_tokens"], atol=1e-6)
        assert any("dual" in k for k in trained) == (model == "xformer")
    train_stage2([features], tmp_path / "run", tmp_path / "s2", load_settings(overrides=small), None, resume=False)


def test_transformers_folders_become_the_same_runs(tmp_path: Path) -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

    from xformer.model import build_xformer

    q = SETTINGS.qformer
    bert = {"vocab_size": 60, "hidden_size": q.width, "num_hidden_layers": q.layers, "num_attention_heads": q.heads,
            "intermediate_size": q.intermediate, "encoder_hidden_size": 96, "cross_attention_frequency": 2}  # fmt: skip
    config = Blip2Config(
        vision_config={"hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 16},
        qformer_config=bert | {"use_qformer_text_input": True}, num_query_tokens=q.queries,
        image_text_hidden_size=q.projection,
        text_config={"model_type": "opt", "vocab_size": 90, "hidden_size": 128, "num_hidden_layers": 1, "ffn_dim": 8,
                     "num_attention_heads": 2, "word_embed_proj_dim": 128, "max_position_embeddings": 32},
    )  # fmt: skip
    Blip2ForImageTextRetrieval(config).save_pretrained(tmp_path / "itm")
    report = import_weights(tmp_path / "itm", tmp_path / "run1", SETTINGS, None)
    assert report["what"] == "BLIP-2 stage 1" and "temperature" in report["new"]
    assert set(report["ignored"].values()) == {"the frozen CLIP; `xformer extract` runs clip.weights"}

    config.qformer_config.use_qformer_text_input = False
    model = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    model.vision_model.post_layernorm.eps = 1e-5  # LAVIS's; transformers converts with 1e-6
    model.save_pretrained(tmp_path / "opt")
    import_weights(tmp_path / "opt", tmp_path / "run2", SETTINGS, None)
    bridge = build_xformer(SETTINGS, "qformer", 0).eval()
    checkpoint.load_model(checkpoint.newest(tmp_path / "run2"), bridge, prefix="xformer.")
    clip = torch.randn(2, 17, 96)
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(clip)
        want = model.qformer(query_embeds=model.query_tokens.expand(2, -1, -1), encoder_hidden_states=normed)
        torch.testing.assert_close(bridge(clip, None)[0], want.last_hidden_state, rtol=1e-5, atol=1e-5)
    saved = json.loads((tmp_path / "opt/config.json").read_text())
    for part, change, words in (
        ("text_config", {"model_type": "t5"}, "text_config.model_type is 't5'"),
        ("qformer_config", {"num_attention_heads": 2 * q.heads}, f"qformer.heads is {2 * q.heads} in the file"),
    ):
        (tmp_path / "opt/config.json").write_text(json.dumps(saved | {part: saved[part] | change}))
        with pytest.raises(WeightsError, match=words):
            import_weights(tmp_path / "opt", tmp_path / "run3", SETTINGS, None)
    (tmp_path / "opt/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WeightsError, match="'llama'"):
        import_weights(tmp_path / "opt", tmp_path / "run3", SETTINGS, None)


class OfficialMae(nn.Module):
    """models_mae.py in short: timm blocks, the mask by argsort of noise."""

    def __init__(self, decoder: bool) -> None:
        from timm.models.vision_transformer import Block, PatchEmbed

        super().__init__()
        self.patch_embed = PatchEmbed(32, 16, 3, 768)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 768)), nn.Parameter(torch.randn(1, 5, 768))
        eps = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList([Block(768, 12, 4, qkv_bias=True, norm_layer=eps)])
        self.norm = eps(768)
        if decoder:
            self.decoder_embed, self.mask_token = nn.Linear(768, 512), nn.Parameter(torch.randn(1, 1, 512))
            self.decoder_pos_embed = nn.Parameter(torch.randn(1, 5, 512))
            self.decoder_blocks = nn.ModuleList([Block(512, 16, 4, qkv_bias=True, norm_layer=eps)])
            self.decoder_norm, self.decoder_pred = eps(512), nn.Linear(512, 16 * 16 * 3)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        order = noise.argsort(1)
        x = x.gather(1, order[:, :1, None].expand(-1, -1, 768))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        latent = self.norm(self.blocks[0](x))
        y = self.decoder_embed(latent)
        whole = torch.cat([y[:, 1:], self.mask_token.expand(len(y), 3, -1)], 1)
        whole = whole.gather(1, order.argsort(1)[..., None].expand(-1, -1, 512))
        y = self.decoder_blocks[0](torch.cat([y[:, :1], whole], 1) + self.decoder_pos_embed)
        return latent, self.decoder_pred(self.decoder_norm(y))[:, 1:]


@pytest.mark.parametrize(("name", "norm_pix"), [("mae_pretrain_vit_full.pth", True), ("mae_visualize_vit.pth", False)])
@torch.no_grad()
def test_official_mae_files_give_the_same_tokens_and_pixels(name: str, norm_pix: bool, tmp_path: Path) -> None:
    from transformers import ViTMAEForPreTraining

    from xformer.reconstruction import FrozenDecoder

    torch.manual_seed(0)
    official = OfficialMae(True).eval()
    torch.save({"model": official.state_dict()}, tmp_path / name)
    report = import_weights(tmp_path / name, tmp_path / "mae", SETTINGS, None)
    assert report["norm_pix_loss"] is norm_pix
    assert FrozenDecoder(str(tmp_path / "mae")).norm_pix is norm_pix
    model = ViTMAEForPreTraining.from_pretrained(tmp_path / "mae").eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 4)
    latent, pixels = official(images, noise)
    torch.testing.assert_close(model.vit(images, noise=noise).last_hidden_state, latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images, noise=noise).logits, pixels, rtol=1e-4, atol=1e-4)
    with pytest.raises(WeightsError, match="norm_pix is"):
        import_weights(tmp_path / name, tmp_path / "other", SETTINGS, not norm_pix)


def test_an_encoder_without_a_decoder_is_told_and_an_unknown_name_asks(tmp_path: Path) -> None:
    from xformer.reconstruction import FrozenDecoder

    torch.save({"model": OfficialMae(False).state_dict()}, tmp_path / "encoder.pth")
    assert import_weights(tmp_path / "encoder.pth", tmp_path / "mae", SETTINGS, None)["what"] == "MAE encoder"
    with pytest.raises(WeightsError, match="no MAE decoder"):
        FrozenDecoder(str(tmp_path / "mae"))
    torch.save({"model": OfficialMae(True).state_dict()}, tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match="--norm-pix"):
        import_weights(tmp_path / "mine.pth", tmp_path / "other", SETTINGS, None)
    assert import_weights(tmp_path / "mine.pth", tmp_path / "other", SETTINGS, True)["norm_pix_loss"]


LAYER = "Qformer__bert__encoder__layer__"
BAD = {
    "missing": ({"opt_proj__bias": None}, "1 keys are missing .*llm_proj.bias"),
    "extra": ({"something__else": torch.zeros(1)}, "first: something.else"),
    "NaN": ({"ln_vision__bias": torch.full((96,), torch.nan)}, "ln_vision.bias .*NaN"),
    "queries": ({"query_tokens": torch.zeros(1, 32, 96)}, "qformer.queries is 32 in the file and 16 in the settings"),
    "width": ({"query_tokens": torch.zeros(1, 16, 768)}, "qformer.width is 768 in the file and 96"),
    "shape": ({"opt_proj__bias": torch.zeros(7)}, r"opt_proj.bias has shape \(7,\), not \(128,\)"),
    "frozen": ({"visual_encoder__cls_token": torch.zeros(1)}, "visual_encoder.cls_token .*frozen"),
    "T5": ({"t5_proj__bias": torch.zeros(1)}, "only BLIP-2 with OPT"),
    "queries 1-D": ({"query_tokens": torch.zeros(96)}, r"query_tokens has shape \(96,\), not \(1, 16, 96\)"),
    "queries 2-D": ({"query_tokens": torch.zeros(16, 96)}, r"query_tokens has shape \(16, 96\), not \(1, 16, 96\)"),
    "key 1-D": ({f"{LAYER}0__crossattention__self__key__weight": torch.zeros(96)},
                r"layer.0.crossattention.self.key.weight has shape \(96,\), not \(96, 96\)"),
    "FFN 0-D": ({f"{LAYER}0__intermediate_query__dense__weight": torch.tensor(1.0)},
                r"intermediate_query.dense.weight has shape \(\), not \(384, 96\)"),
    "projection 0-D": ({"opt_proj__weight": torch.tensor(1.0)}, r"opt_proj.weight has shape \(\), not \(LLM width, 96\)"),
    "words 0-D": ({"Qformer__bert__embeddings__word_embeddings__weight": torch.tensor(1.0)},
                  r"word_embeddings.weight has shape \(\), not \(vocabulary, 96\)"),
    "another LLM": ({"opt_proj__weight": torch.zeros(4096, 96), "opt_proj__bias": torch.zeros(4096)},
                    "language model has width 4096, llm.weights embedded:llm 128"),
    "no number": ({f"{LAYER}x__crossattention__foo": torch.zeros(1)}, "first: .*layer.x.crossattention.foo"),
    "complex": ({"ln_vision__bias": torch.zeros(96, dtype=torch.complex64)}, "ln_vision.bias is torch.complex64"),
    "integers": ({"ln_vision__bias": torch.zeros(96, dtype=torch.int64)}, "ln_vision.bias is torch.int64"),
    "sparse": ({"ln_vision__bias": torch.zeros(96).to_sparse()}, "ln_vision.bias is .*sparse"),
    "too large": ({"ln_vision__bias": torch.full((96,), 1e39, dtype=torch.float64)}, "float64. is NaN or infinite in .*32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_one_sentence_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    changes, words = BAD[name]
    lavis_file(tmp_path / "blip2.pth", 2, **changes)
    with pytest.raises(WeightsError, match=words) as caught:
        import_weights(tmp_path / "blip2.pth", tmp_path / "run", SETTINGS, None)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_names_that_are_none_and_an_out_below_a_file_are_refused(tmp_path: Path) -> None:
    for content in ({"model": {3: torch.zeros(1)}}, {"model": {"a": torch.zeros(1)}, 0: 1, "x": 1}):
        torch.save(content, tmp_path / "numbers.pth")
        with pytest.raises(WeightsError, match="the key [30] is of the type int"):
            import_weights(tmp_path / "numbers.pth", tmp_path / "run", SETTINGS, None)
    lavis_file(tmp_path / "blip2.pth", 2)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(WeightsError, match="name too long"):
        import_weights(tmp_path / "blip2.pth", tmp_path / ("x" * 300), SETTINGS, None)
    with pytest.raises(WeightsError, match="loop is a file"):
        import_weights(tmp_path / "blip2.pth", tmp_path / "loop/run", SETTINGS, None)
    for out in ("file", "file/run"):
        with pytest.raises(WeightsError, match="file is a file, not a folder"):
            import_weights(tmp_path / "blip2.pth", tmp_path / out, SETTINGS, None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text('{"model_type": "blip-2"}')
    for index in ("[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "folder/model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError):
            settings = load_settings(overrides=["qformer.heads=12"])
            import_weights(tmp_path / "folder", tmp_path / "run", settings, None)


def test_a_sparse_qkv_is_named_as_in_the_file(tmp_path: Path) -> None:
    sparse = {"blocks.0.attn.qkv.bias": torch.zeros(2304).to_sparse()}
    torch.save({"model": OfficialMae(True).state_dict() | sparse}, tmp_path / "full.pth")
    with pytest.raises(WeightsError, match="blocks.0.attn.qkv.bias is .*sparse"):
        import_weights(tmp_path / "full.pth", tmp_path / "mae", SETTINGS, None)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("pos_embed", (5,), r"pos_embed has shape \(5,\), not \(1, 1 \+ patches, 768\)"),
        ("pos_embed", (1, 0, 768), r"pos_embed has shape \(1, 0, 768\), not"),
        ("pos_embed", (1, 1, 768), r"pos_embed has shape \(1, 1, 768\).* square"),
        ("pos_embed", (1, 6, 768), r"pos_embed has shape \(1, 6, 768\).* square"),
        ("patch_embed.proj.weight", (768, 768), r"patch_embed.proj.weight has shape \(768, 768\), not \(width, 3, p"),
        ("blocks.0.attn.qkv.bias", (), r"blocks.0.attn.qkv.bias has shape \(\), not \(2304,\)"),
        ("decoder_blocks.0.attn.qkv.weight", (7, 512), r"qkv.weight has shape \(7, 512\), not \(1536, 512\)"),
        ("blocks.0.mlp.fc1.weight", (), r"fc1.weight has shape \(\), not \(hidden width, 768\)"),
        ("decoder_embed.weight", (), r"decoder_embed.weight has shape \(\), not \(decoder width, 768\)"),
        ("blocks.x.foo", (1,), "first: blocks.x.foo"),
        ("blocks.0.attn.qkv.foo", (), "first: blocks.0.attn.qkv.foo"),
    ],
)
def test_an_mae_of_other_shapes_is_one_sentence(key: str, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    torch.save({"model": OfficialMae(True).state_dict() | {key: torch.zeros(shape)}}, tmp_path / "full.pth")
    with pytest.raises(WeightsError, match=words):
        import_weights(tmp_path / "full.pth", tmp_path / "mae", SETTINGS, None)
    assert not (tmp_path / "mae").exists()


def test_untied_heads_and_hostile_files_are_refused(tmp_path: Path) -> None:
    lavis_file(tmp_path / "a.pth", 1, Qformer__cls__predictions__decoder__bias=torch.zeros(3))
    with pytest.raises(WeightsError, match="differs from"):
        import_weights(tmp_path / "a.pth", tmp_path / "run", SETTINGS, None)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"model": {"a": torch.zeros(1)}, "shell": 1}, tmp_path / "shell.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    for file in ("evil.pth", "text.pth", "shell.pth", "other.pth", "none.pth"):
        with pytest.raises(UserError) as caught:
            import_weights(tmp_path / file, tmp_path / "run", SETTINGS, None)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_that_does_not_fit_names_the_field(stage2: Path, stage1: Path, tmp_path: Path) -> None:
    from xformer.evaluation.load import load_stage2
    from xformer.pretrained import XFormerForConditionalGeneration

    for override, words in (
        ("qformer.queries=32", "qformer.queries is 32 here and 16"),
        ("qformer.width=192", "qformer.width is 192 here and 96"),
        ("local.tokens=clip", "local.tokens is 'clip' here and 'mae'"),
    ):
        with pytest.raises(UserError, match=words):
            load_stage2(stage2, [override])
    with pytest.raises(UserError, match="stage is 1"):
        XFormerForConditionalGeneration.from_pretrained(stage1)
    model = XFormerForConditionalGeneration.from_pretrained(stage2)
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["frozen"]["llm"]["sha256"] and config["architectures"] == ["XFormerForConditionalGeneration"]
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"variant": "qformer"}))
    with pytest.raises(UserError, match="xformer.dual"):
        XFormerForConditionalGeneration.from_pretrained(tmp_path / "m")
    config["frozen"]["llm"]["sha256"] = "0" * 64
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="language model's sha256"):
        XFormerForConditionalGeneration.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    state = checkpoint.trainable_state(model)
    state["llm_proj.bias"][0] = torch.nan
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="llm_proj.bias .*NaN"):
        XFormerForConditionalGeneration.from_pretrained(tmp_path / "m")
