"""Ablations: planned and refused before anything runs, extracted once, killed and resumed with the same numbers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from cli import main, run_command
from pipeline import shapes
from pipeline.store import committed
from xformer.console import duration
from xformer.errors import EvaluationError, SettingsError, StoreError, TrainingError, WeightsError
from xformer.lab import ablate as ablate_module
from xformer.lab import encoding, parallel, results, summary
from xformer.lab import features as lab_features
from xformer.lab.ablate import Request, ablate, make_plan
from xformer.lab.clock import Clock
from xformer.lab.parallel import devices
from xformer.lab.variants import load_ablations
from xformer.params import trained
from xformer.settings import load_settings

BENCHMARKS = {"gqa": None, "mci": None, "coco-caption": None}


def made(out: Path, corpus: Path, features: Path, small: list[str], **changes) -> Request:
    """An ablation of two variants whose store is there already; two benchmarks of twelve questions."""
    out.mkdir(parents=True)
    shutil.copytree(features, out / "store.zarr")
    overrides = [*small, "store.shard_rows=32", "mae.draws=2", "ablations.limit=12", "eval.beams=1"]
    overrides += ["eval.max_new_tokens=3", f"ablations.benchmarks={json.dumps(BENCHMARKS)}"]
    request = {"only": ["qformer", "xformer"], "seeds": [0], "corpus": corpus, "overrides": overrides} | changes
    return Request(out, run_command, **request)


def numbers(result: dict) -> dict:
    """A result without what depends on the clock."""
    return {key: value for key, value in result.items() if key not in ("cost", "versions")}


@pytest.fixture(scope="module")
def whole(corpus: Path, features: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Request:
    """An ablation that was never interrupted: two variants, one seed."""
    request = made(tmp_path_factory.mktemp("lab") / "whole", corpus, features, small)
    ablate(request)
    return request


def test_a_killed_ablation_goes_on_and_ends_with_the_same_numbers(
    whole: Request, corpus: Path, features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformer import checkpoint

    request = made(tmp_path / "cut", corpus, features, small)
    saves: list[str] = []
    save = checkpoint.save

    def killed(run: Path, *rest):
        saves.append(f"{run.name} {rest[2]['step']}")
        if saves[-1] == "xformer-seed0-stage2 4":
            raise KeyboardInterrupt
        return save(run, *rest)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        ablate(request)
    assert [f.name for f in (request.out / "results").iterdir()] == ["qformer-seed0.json"]
    first = (request.out / "results/qformer-seed0.json").read_bytes()
    assert len(saves) == 8 and not (request.out / "summary.json").exists()
    monkeypatch.setattr(checkpoint, "save", lambda run, *rest: (saves.append(run.name), save(run, *rest))[1])
    ablate(request)
    assert saves[8:] == ["xformer-seed0-stage2"]  # from step 2 to 4: no finished stage, no finished run again
    assert (request.out / "results/qformer-seed0.json").read_bytes() == first
    for name in ("qformer-seed0", "xformer-seed0"):
        ours, theirs = (json.loads((o / f"results/{name}.json").read_text()) for o in (request.out, whole.out))
        assert numbers(ours) == numbers(theirs)
    ablate(request)
    assert len(saves) == 9


def test_a_result_is_small_and_enough_without_its_run(whole: Request, tmp_path: Path) -> None:
    file = whole.out / "results/xformer-seed0.json"
    assert file.stat().st_size < 20_000
    result = results.read_result(file)
    assert result is not None and results.scores_of(result, "vqav2").shape == (12,)
    assert set(result["curves"]["stage1"]["train"]) == {"step", "itc", "itm", "itg", "reconstruction", "itm_accuracy"}
    assert result["cost"]["images"] == {"stage1": 64, "stage2": 64, "eval": result["cost"]["images"]["eval"]}
    only = tmp_path / "committed"
    shutil.copytree(whole.out / "results", only / "results")
    found = ablate(Request(only, run_command, **{k: v for k, v in vars(whole).items() if k not in ("out", "command")}))
    assert found["runs"] == 2 and not (only / "store.zarr").exists() and not (only / "runs").exists()
    claim = next(row for row in found["claims"] if row["benchmark"] == "vqav2")
    assert claim["n"] == 12 and claim["verdict"] == "undecided" and "1 of the 5 seeds" in claim["why"]


def test_the_summary_names_what_the_cache_saved(whole: Request) -> None:
    found = json.loads((whole.out / "summary.json").read_text())
    cost = found["cost"]
    seconds = encoding.encoder_seconds(whole.out / "store.zarr")
    per_image = {"qformer": seconds["clip"], "xformer": seconds["clip"] + seconds["draw"]}
    runs = {n: json.loads((whole.out / f"results/{n}-seed0.json").read_text()) for n in per_image}
    expected = sum(sum(run["cost"]["images"].values()) * per_image[name] for name, run in runs.items())
    assert cost["encoding_online_seconds"] == pytest.approx(expected, abs=0.06)
    told = found["scores"]["LLM given a true caption"]
    assert {"vqav2", "oc"} <= set(told) and found["scores"]["constant answer"]["vqav2"]["half"] is None


def test_other_settings_code_or_data_are_refused_before_anything_runs(
    whole: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.stat().st_mtime_ns for f in whole.out.rglob("*") if f.is_file()}
    fields = {k: v for k, v in vars(whole).items() if k not in ("overrides",)}
    with pytest.raises(SettingsError, match=r"qformer-seed0.json.*settings.stage1.lr is 0.001 there and 0.002 here"):
        ablate(Request(**fields, overrides=[*whole.overrides, "stage1.lr=2e-3"]))
    with pytest.raises(SettingsError, match="limit.questions is 12 there and 11 here"):
        ablate(Request(**fields, overrides=[*whole.overrides, "ablations.limit=11"]))
    with monkeypatch.context() as patched:
        patched.setattr("xformer.lab.ablate.code_sha256", lambda: "f" * 64)
        with pytest.raises(SettingsError, match=r"qformer-seed0.json.*code is \w{12} there and ffffffffffff here"):
            ablate(whole)
    begun = tmp_path / "begun"
    shutil.copytree(whole.out / "runs", begun / "runs")
    with pytest.raises(SettingsError, match=r"qformer-seed0-stage1 was made with other.*stage1.lr"):
        ablate(Request(**fields | {"out": begun}, overrides=[*whole.overrides, "stage1.lr=2e-3"]))
    assert before == {f: f.stat().st_mtime_ns for f in whole.out.rglob("*") if f.is_file()}


def test_other_features_or_another_corpus_are_refused_when_all_runs_are_done(whole: Request, tmp_path: Path) -> None:
    out, corpus = tmp_path / "lab", tmp_path / "shapes"
    shutil.copytree(whole.out / "results", out / "results")
    shutil.copytree(whole.out / "store.zarr", out / "store.zarr")
    result = results.read_result(out / "results/xformer-seed0.json")
    assert result is not None and set(result["made_with"]["features"]) == {
        "clip/5/tokens", "mae/draw-0/kept", "mae/draw-0/tokens", "mae/draw-1/kept", "mae/draw-1/tokens", "pixels/view-0"
    }  # fmt: skip
    plain = results.read_result(out / "results/qformer-seed0.json")
    assert plain is not None and set(plain["made_with"]["features"]) == {"clip/5/tokens"}
    fields = vars(whole) | {"out": out}
    shutil.copytree(whole.corpus or corpus, corpus)
    questions = json.loads((corpus / "val/vqa_questions.json").read_text())
    questions["questions"] = questions["questions"][::-1]
    (corpus / "val/vqa_questions.json").write_text(json.dumps(questions))
    with pytest.raises(SettingsError, match=r"qformer-seed0.json was made with other.*data.vqav2"):
        ablate(Request(**fields | {"corpus": corpus}))
    plain["made_with"]["features"]["clip/5/tokens"] = "f" * 64  # as if another encoder had made what the run read
    results.write_result(out / "results/qformer-seed0.json", plain)
    with pytest.raises(SettingsError, match=r"features.clip/5/tokens is ffffffffffff there and \w{12} here"):
        ablate(Request(**fields))


def test_another_benchmark_needs_no_training_and_a_damaged_run_is_one_sentence(whole: Request, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    shutil.copytree(whole.out, out, ignore=shutil.ignore_patterns("results"))
    before = {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")}
    fields = vars(whole) | {
        "out": out,
        "overrides": [*whole.overrides, "ablations.limit=6", "ablations.benchmarks.oc=null"],
    }
    found = ablate(Request(**fields))
    assert found["runs"] == 2 and set(found["scores"]["xformer"]) == {"vqav2", "diversity"}
    assert before == {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")}
    (out / "results/xformer-seed0.json").write_text(json.dumps({"format": results.FORMAT}))
    with pytest.raises(EvaluationError, match=r"xformer-seed0.json: not a run's JSON"):
        ablate(Request(**fields))
    (out / "results/xformer-seed0.json").unlink()
    (out / "runs/xformer-seed0-stage2/made.json").write_text('{"model": "xfor')
    with pytest.raises(EvaluationError, match=r"xformer-seed0-stage2/made.json: cut off or damaged"):
        ablate(Request(**fields))


def test_a_variants_own_weights_are_checked_and_part_of_its_run(whole: Request, tmp_path: Path) -> None:
    for change in ({"llm.weights": "/nonexistent"}, {"qformer.text": "/nonexistent"}, {"qformer.bert": True}):
        overrides = [f"ablations.variants={json.dumps({'mine': change})}"]
        with pytest.raises(WeightsError, match="missing"):
            ablate(Request(tmp_path / "out", run_command, overrides=overrides, only=["mine"], plan_only=True))
    result = results.read_result(whole.out / "results/qformer-seed0.json")
    assert result is not None and set(result["made_with"]["weights"]) == {"clip", "llm", "text"}  # whatever else is run


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"stage1.lrr": 1}, "variants.mine: unknown key 'stage1.lrr'"),
        ({"model": "former"}, "variants.mine.model: 'former' is none of"),
        ({"local.tokens": "clip", "local.layer": 99}, "variants.mine: CLIP block 99 cannot be cached"),
        ({"local.draws": 9}, "variants.mine: local.draws is 9; the cache holds 4 draws"),
        ({"eval.draw": 4}, "variants.mine: eval.draw is 4; it reads the draws 0 to 3"),
        ({"local.draws": 1, "eval.draw": 1}, "variants.mine: eval.draw is 1; it reads the draws 0 to 0"),
        ({"mae.mask_ratio": 0.999}, "variants.mine: a mask ratio of 0.999 leaves none"),
        ({"local.mask_ratio": 0.5, "stage2.mask_ratio": 0.25}, "variants.mine: reads masks at 0.25 and at 0.5"),
        ({"clip.weights": "elsewhere"}, "variants.mine: clip.weights is 'elsewhere'.*one cache"),
        ({"seed": 3}, "variants.mine.seed"),
        ({"dual.heads": 5}, "variants.mine.*heads"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_by_name(variant: dict, words: str, tmp_path: Path) -> None:
    overrides = [f"ablations.variants={json.dumps({'mine': variant})}"]
    with pytest.raises(SettingsError, match=words):
        ablate(Request(tmp_path / "out", run_command, overrides=overrides, only=["mine"], seeds=[0]))
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_command_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["ablate", "--out", str(tmp_path / "out"), *words])
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        return error[0]

    assert "there is no such variant; there are qformer, concat" in fails("--only", "nothing")
    assert "whole numbers" in fails("--seeds", "0,one")
    assert "ablations.benchmarks.vqa: unknown" in fails("--set", "ablations.benchmarks={vqa: {}}")
    assert "model.safetensors is missing" in fails("--set", "clip.weights=nowhere")
    assert "is no shapes corpus" in fails("--corpus", str(tmp_path))
    assert "quick.variants" in fails("--set", "ablations.quick.variants=[]")
    photographs = 'ablations.benchmarks={gqa: {questions: q.json, images: "a/images"}, vqav2: {images: "b/images"}}'
    assert "train on drawn shapes: give --corpus" in fails("--set", photographs)
    assert "need different names" in fails("--set", photographs, "--corpus", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_store_made_otherwise_is_refused(whole: Request, tmp_path: Path) -> None:
    out = tmp_path / "other"
    shutil.copytree(whole.out / "store.zarr", out / "store.zarr")
    fields = vars(whole) | {"out": out, "overrides": [*whole.overrides, "mae.mask_seed=9", "mae.draws=3"]}
    with pytest.raises(StoreError, match="mask_seed is 0 there and 9 here"):
        ablate(Request(**fields))
    assert not (out / "runs").exists()


def test_the_predefined_set_needs_one_store_and_shares_first_stages() -> None:
    for preset, layers in (("tiny", [5, 2, 3, 4]), ("paper", [39, 26, 28, 30])):
        _, base, variants = load_ablations(preset, None, [])
        (need,) = lab_features.needs(list(variants.values()), base).values()
        assert sorted(need.layers) == sorted(layers) and need.whole and need.draws == base.mae.draws
        assert variants["reconstruction-in-stage2"].stage1_of == variants["whole-in-stage2"].stage1_of == "xformer"
        assert variants["no-reconstruction"].stage1_of == "no-reconstruction"
        lines = lab_features.lines(need, Path("nowhere"), Path("c"))
        assert [line[line.index("--encoder") + 1] for line in lines] == ["clip", "mae", "mae"]
    _, base, variants = load_ablations("tiny", None, ["ablations.variants={half: {local.mask_ratio: 0.5}}"])
    assert set(lab_features.needs(list(variants.values()), base)) == {"store.zarr", "store-mask-0.5.zarr"}


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_the_control_has_as_many_parameters_as_xformer(preset: str) -> None:
    _, base, variants = load_ablations(preset, None, [])
    width = base.qformer.width
    with torch.device("meta"):
        ours, control = (
            sum(trained(variants[n].settings, variants[n].model, width).values()) for n in ("xformer", "wide-qformer")
        )
    assert control == pytest.approx(ours, rel=0.02)


def test_a_second_pass_of_the_clip_is_counted_as_one(whole: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_store = encoding.known(whole.out, whole.out / "results")
    assert whole_store["store.zarr"]["clip_passes"] == 1
    # Three blocks in one pass of 3 s a shard of 10 images, or the deepest first and the other two in a pass of their own.
    together, apart = {5: 1.0, 2: 1.0, 3: 1.0}, {5: 3.0, 2: 1.5, 3: 1.5}
    for seconds, passes in ((together, 1), (apart, 2)):

        def records(store: Path, name: str, seconds: dict = seconds) -> dict:
            block = int(name.split("/")[1])
            return {
                s: {"rows": [10 * s, 10 * s + 10], "seconds": seconds[block], "sha256": f"{s} {name}"} for s in (0, 1)
            }

        monkeypatch.setattr(encoding, "committed", records)
        monkeypatch.setattr("pipeline.store.FeatureStore.names", lambda store: [f"clip/{b}/tokens" for b in (2, 3, 5)])
        found = encoding.encoder_seconds(whole.out / "store.zarr")
        assert found["clip_passes"] == passes and found["clip"] == pytest.approx(0.3) and found["once"] == 6 * passes
    result = results.read_result(whole.out / "results/xformer-seed0.json")
    assert result is not None
    for passes, words in ((1.0, "The CLIP ran once;"), (2.0, "The CLIP ran 2 times over the images")):
        stores = {"store.zarr": whole_store["store.zarr"] | {"clip_passes": passes}}
        assert words in summary.saving(summary.cost([result], stores))


def test_another_mask_ratio_shares_the_clip_features_of_the_first_store(
    whole: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lab"
    shutil.copytree(whole.out, out)
    ran: list[list[str]] = []

    def command(words: list[str]) -> None:
        ran.append(words)
        run_command(words)

    overrides = [*whole.overrides, 'ablations.variants.half={"local.mask_ratio": 0.5}']
    fields = vars(whole) | {"out": out, "command": command, "overrides": overrides, "only": ["xformer", "half"]}
    monkeypatch.setattr("xformer.lab.ablate.work", lambda request, plan, done: None)
    ablate(Request(**fields))
    assert [line[line.index("--encoder") + 1] for line in ran] == ["mae"]  # xformer is done, and CLIP is there
    shared = out / "store-mask-0.5.zarr/clip/5/tokens/zarr.json"
    assert shared.stat().st_ino == (out / "store.zarr/clip/5/tokens/zarr.json").stat().st_ino
    stores = encoding.known(out, out / "results")
    assert stores["store-mask-0.5.zarr"]["ratio"] == 0.5 and stores["store-mask-0.5.zarr"]["clip"] > 0
    clip = sum(r["seconds"] for r in committed(out / "store.zarr", "clip/5/tokens").values())
    alone = encoding.encoder_seconds(out / "store-mask-0.5.zarr")["once"]
    assert stores["store-mask-0.5.zarr"]["once"] <= alone - clip + 1e-6  # a shared pass counts once


def test_what_needs_no_bridge_is_measured_again_where_it_was_lost(whole: Request, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    shutil.copytree(whole.out, out)
    file = out / "results/baselines.json"
    before = json.loads(file.read_text())["scores"]
    file.unlink()
    ablate(Request(**vars(whole) | {"out": out}))
    assert json.loads(file.read_text())["scores"] == before and "constant answer" in before


def test_pixels_that_are_gone_count_as_missing(features: Path, tmp_path: Path) -> None:
    _, base, variants = load_ablations("tiny", None, ["mae.draws=2"])
    (need,) = lab_features.needs([variants["xformer"]], base).values()
    assert lab_features.missing(need, features) == []
    store = tmp_path / "store.zarr"
    shutil.copytree(features, store, ignore=shutil.ignore_patterns("pixels"))
    assert lab_features.missing(need, store) == ["pixels/view-0"]
    assert [line[line.index("--encoder") + 1] for line in lab_features.lines(need, store, Path("c"))] == ["mae"]


def test_the_time_left_counts_phases_and_shared_first_stages(whole: Request, tmp_path: Path) -> None:
    cost = {"stage1_seconds": 200.0, "stage2_seconds": 90.0, "evaluation_seconds": 10.0}
    overrides = ["ablations.benchmarks={gqa: null, mci: null, coco-caption: null, vqav2: null, oc: null}"]
    names = ["xformer", "reconstruction-in-stage2", "qformer"]
    plan = make_plan(Request(tmp_path, run_command, overrides=overrides, only=names, seeds=[0, 1]))
    assert "not known" in Clock(plan.runs, [], 1).left()
    results.write_result(plan.runs[0].result, {"variant": "xformer", "cost": cost, "made_with": {}})
    done = [plan.runs[0].name]
    (plan.runs[0].stage1 / "summary.json").parent.mkdir(parents=True)
    (plan.runs[0].stage1 / "summary.json").write_text("{}")
    # left: 5 x (stage 2 and evaluation); stage 1 of qformer twice and of xformer's second seed once for two variants
    assert Clock(plan.runs, done, 1).left() == f"about {duration(5 * 100 + 3 * 200)} left"
    assert Clock(plan.runs, done, 2).left() == f"about {duration((5 * 100 + 3 * 200) / 2)} left"


def test_a_corpus_that_asks_other_questions_is_named(whole: Request, corpus: Path, tmp_path: Path) -> None:
    assert ablate_module.SHAPES_FORMAT == shapes.FORMAT
    shutil.copytree(corpus, tmp_path / "old")
    marker = tmp_path / "old/shapes.json"
    marker.write_text(marker.read_text().replace(f'"format": {shapes.FORMAT}', '"format": 1'))
    with pytest.raises(EvaluationError, match="format 1, not 2. and asks other questions; move it away"):
        ablate(Request(**vars(whole) | {"corpus": tmp_path / "old"}))


def test_workers_stay_on_the_devices_that_this_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("distributed.SpecCluster", lambda workers, **_: workers)

    def seen(workers: int) -> list[str]:
        specs: dict = parallel._cluster(workers, gpus=True)  # type: ignore[assignment]
        return [spec["options"]["env"]["CUDA_VISIBLE_DEVICES"] for spec in specs.values()]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert seen(3) == ["2", "5", "2"]


def test_several_workers_share_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(1) == [0, 1] and devices(5) == [0, 1, 0, 1, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TrainingError, match="no CUDA device"):
        devices(3)


def test_workers_keep_their_memory_and_are_silent(capfd: pytest.CaptureFixture) -> None:
    from distributed import Client

    workers = parallel._cluster(1, False)
    with Client(workers) as client:
        environment = client.run(lambda: dict(os.environ))
    workers.close(timeout=5)
    (of_worker,) = environment.values()
    assert "MALLOC_TRIM_THRESHOLD_" not in of_worker and of_worker["OMP_NUM_THREADS"] == str(os.cpu_count() or 1)
    assert capfd.readouterr() == ("", "")


def test_captions_are_measured_once_their_extra_is_there(
    whole: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lab"
    shutil.copytree(whole.out, out)
    benchmarks = {"gqa": None, "mci": None, "vqav2": None, "oc": None}
    overrides = [o for o in whole.overrides if not o.startswith("ablations.benchmarks")]
    fields = vars(whole) | {"out": out, "only": ["qformer"]}
    fields["overrides"] = [*overrides, f"ablations.benchmarks={json.dumps(benchmarks)}"]
    (out / "results/qformer-seed0.json").unlink()
    (out / "results/xformer-seed0.json").unlink()
    for module in ("run", "ablate", "baselines"):
        monkeypatch.setattr(f"xformer.lab.{module}.captions_missing", lambda: "no extra")
    ablate(Request(**fields))
    assert "missing" in json.loads((out / "results/qformer-seed0.json").read_text())["scores"]["coco-caption"]
    monkeypatch.undo()
    asked: list[str] = []

    def measured(run, name, questions):
        asked.append(name)
        return {"overall": 1.0, "n": 1, "images": 1, "parts": {}}

    monkeypatch.setattr("xformer.lab.run.measure", measured)
    for module in ("run", "ablate", "baselines"):
        monkeypatch.setattr(f"xformer.lab.{module}.captions_missing", lambda: "")
    monkeypatch.setattr("xformer.lab.baselines.measure", lambda *rest: None)
    ablate(Request(**fields))
    assert "coco-caption" in asked


def test_a_variant_may_read_fewer_draws(features: Path) -> None:
    from xformer.data import Cache

    assert Cache(features, load_settings(overrides=["local.draws=1"]), "xformer", pixels=False).draws == 1
    assert Cache(features, load_settings(), "xformer", pixels=False).draws == 2


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="llm features or answers cannot be made.*nowhere"):
        ablate(Request(tmp_path / "out", run_command, overrides=["llm.weights=nowhere"], only=["qformer"]))


def test_only_what_a_program_means_counts_as_its_code() -> None:
    plain = 'def f(x):\n    y = "a"\n    return x + y\n'
    commented = '"""Head."""\n\n\ndef f(x):  # why\n    """What."""\n\n    y = "a"\n    # more\n    return x + y\n'
    assert results.significant(plain) == results.significant(commented)
    for other in (plain.replace('"a"', '"b"'), plain.replace("return", "if x:\n        return")):
        assert results.significant(plain) != results.significant(other)


@pytest.mark.slow
def test_runs_side_by_side_give_the_same_results(
    whole: Request, corpus: Path, features: Path, small: list[str], tmp_path: Path
) -> None:
    request = made(tmp_path / "dask", corpus, features, small, workers=2)
    ablate(request)
    for name in ("qformer-seed0", "xformer-seed0"):
        ours, theirs = (json.loads((o / f"results/{name}.json").read_text()) for o in (request.out, whole.out))
        assert numbers(ours) == numbers(theirs)
