"""`xformer eval` as a command: its options, and nothing else."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from xformer.errors import CorpusError


class Name(StrEnum):
    vqav2 = "vqav2"
    gqa = "gqa"
    okvqa = "okvqa"
    oc = "oc"
    mci = "mci"
    coco_caption = "coco-caption"
    nocaps = "nocaps"
    retrieval = "retrieval"
    diversity = "diversity"


def eval_command(
    prepare: Callable[..., Any], temporary: Callable[[Path, Path, set[str] | None, list[str]], Path]
) -> Callable:
    """The command's function.

    Args:
        prepare: reads the settings and sets how much is printed.
        temporary: (pictures, run, image ids, overrides) -> a store of their features.
    """

    def evaluate(
        benchmark: Annotated[Name, typer.Argument()],
        checkpoint: Annotated[
            Path | None,
            typer.Option(help="A run, a checkpoint of one, or a saved model; left out, the newest in runs/."),
        ] = None,
        features: Annotated[Path | None, typer.Option(help="Answer from this store; left out, store.zarr.")] = None,
        images: Annotated[Path | None, typer.Option(help="Answer from pictures, encoded on the fly.")] = None,
        questions: Annotated[Path | None, typer.Option(help="Left out: those of the shapes corpus.")] = None,
        annotations: Annotated[Path | None, typer.Option(help="VQA answers, or reference captions.")] = None,
        choices: Annotated[Path | None, typer.Option(help="GQA's choices, for validity and plausibility.")] = None,
        results: Annotated[Path | None, typer.Option(help="Score this results file; no model is needed.")] = None,
        against: Annotated[Path | None, typer.Option(help="Another run (or results file) for a paired test.")] = None,
        scorer: Annotated[str | None, typer.Option(help="Only this one; left out, all of them.")] = None,
        prompt: Annotated[str | None, typer.Option(help="{} stands for the question.")] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions or images.")] = None,
        allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Score what is answered.")] = False,
        blind: Annotated[bool, typer.Option("--blind/--no-blind", help="Also the LLM without an image.")] = True,
        shuffled: Annotated[
            bool, typer.Option("--shuffled/--no-shuffled", help="Also the model with wrong images.")
        ] = True,
        out: Annotated[Path | None, typer.Option(help="Folder; left out, eval/<benchmark>.")] = None,
        preset: Annotated[str, typer.Option(help="tiny or paper; a run brings its own settings.")] = "tiny",
        config: Annotated[Path | None, typer.Option(help="A YAML file laid out as stages.yaml.")] = None,
        set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")] = None,
        seed: Annotated[int | None, typer.Option(help="Replaces the settings' seed.")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", help="Only errors and results as JSON.")] = False,
    ) -> None:
        """Answer a benchmark zero-shot, or score a results file, beside answers that need no image."""
        prepare(preset, config, set_, seed, quiet)
        from xformer.evaluation.run import Request, evaluate
        from xformer.evaluation.suite import Files

        if images is not None and not images.is_dir():
            raise CorpusError(f"--images {images}: there is no such folder.")

        def open_store(run: Path, wanted: set[str] | None) -> Path:
            if images is None or features is not None:
                return features or Path("store.zarr")
            return temporary(images, run, wanted, list(set_ or []))

        evaluate(
            Request(
                benchmark=benchmark.value,
                out=out or Path("eval") / benchmark.value,
                files=Files(questions, annotations, choices),
                results=results,
                checkpoint=checkpoint,
                against=against,
                images=images,
                scorer=scorer,
                prompt=prompt,
                limit=limit,
                allow_partial=allow_partial,
                blind=blind,
                shuffled=shuffled,
                overrides=list(set_ or []),
            ),
            open_store,
        )

    return evaluate
