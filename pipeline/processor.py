"""Pictures -> the tokens that a model reads: what transformers calls a processor."""

from pathlib import Path
from typing import Any

import torch

from pipeline.store import FeatureStore, first_misfit
from pipeline.temporary import picture_store
from xformer import publish
from xformer.errors import CorpusError, StoreError
from xformer.local import local_tokens, mask_ratio
from xformer.saved import model_folder, read_config
from xformer.settings import settings_from


class XFormerProcessor:
    """Runs the frozen encoders of a checkpoint over pictures, as its features were made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(model_folder(folder))
        self.settings = settings_from(self.config["settings"], str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "XFormerProcessor":
        return cls(Path(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, which is all that a processor needs; a saved model has the same."""
        publish.write_json(Path(folder) / "config.json", self.config)

    def __call__(self, pictures: list[str | Path]) -> dict[str, Any]:
        """Returns `clip` float32 [B, N, Wc] and `local` [B, 1 + visible, Wm] or None.

        Raises: CorpusError for a file that is no picture, StoreError where an encoder is not the checkpoint's.
        """
        if isinstance(pictures, str | Path):
            raise CorpusError(f"pictures is {str(pictures)!r}; give a list of files.")
        store = FeatureStore(picture_store([Path(p) for p in pictures], self.folder))
        settings, model = self.settings, self.config["variant"]
        names = {"clip": f"clip/{settings.clip.layers[0]}/tokens"}
        kind = local_tokens(settings, model)
        if kind == "clip":
            names["local clip"] = f"clip/{settings.local.layer}/tokens"
        elif kind == "mae":
            whole = mask_ratio(settings, model, "eval") == 0
            names["mae"] = "mae/full/tokens" if whole else f"mae/draw-{settings.eval.draw}/tokens"
        found = {}
        for name, place in names.items():
            array, trained = store.complete(place), self.config["identities"].get(name, {})
            if difference := first_misfit(trained, array.attributes["identity"]):
                raise StoreError(f"{self.folder}: {name} {difference}; use the encoder that it was trained with.")
            if dead := {d["row"]: d["reason"] for d in store.index.dead()} | array.dead:
                raise CorpusError(f"{pictures[min(dead)]}: {dead[min(dead)]}.")
            found[name] = torch.from_numpy(array.read(list(range(len(pictures))))).float()
        clip = found.pop("clip")
        return {"clip": clip, "local": next(iter(found.values()), None)}
