"""Where weights are: inside the package, in a local folder, or on the Hugging Face hub at a pinned revision."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from xformer.errors import WeightsError

OTHERS = (RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, ArithmeticError, AssertionError)
EMBEDDED = Path(__file__).resolve().parent / "tiny"


def resolve(spec: str, needed: tuple[str, ...], option: str = "--weights") -> Path:
    """The local folder of `spec`, with all `needed` files in it.

    Args:
        spec: `embedded:NAME`, `hub:OWNER/NAME@REVISION`, or a local folder.
        needed: file names; a tuple entry "a|b" is satisfied by either.
        option: how the user gave it, for the sentence.

    Raises: WeightsError, which says which file is missing and how to get it.
    """
    _silence_transformers()
    kind, _, rest = spec.partition(":")
    if kind == "embedded":
        folder = EMBEDDED / rest
        help_text = "install the package again"
    elif kind == "hub":
        return _from_hub(rest, needed)
    else:
        folder = Path(spec)
        help_text = f"give {option} a folder that holds it, or hub:OWNER/NAME@REVISION"
    for names in needed:
        if not any((folder / name).is_file() for name in names.split("|")):
            raise WeightsError(f"weights {spec}: {folder / names.split('|')[0]} is missing; {help_text}.")
    return folder


def is_here(spec: str, needed: tuple[str, ...]) -> bool:
    """Whether `resolve` would find everything without a network."""
    kind, _, rest = spec.partition(":")
    if kind != "hub":
        try:
            resolve(spec, needed)
        except WeightsError:
            return False
        return True
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = rest.partition("@")
    return all(
        any(isinstance(try_to_load_from_cache(repository, n, revision=revision or None), str) for n in names.split("|"))
        for names in needed
    )


@contextmanager
def readable(spec: str) -> Iterator[None]:
    """Damaged or hostile weights are one sentence; nothing in them is ever executed, whatever loads them."""
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError, StrictDataclassError, *OTHERS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"weights {spec} cannot be read: {reason[:300]}") from None


def _silence_transformers() -> None:
    """Its own progress bars say nothing that a person waits for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _from_hub(spec: str, needed: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = spec.partition("@")
    folder = None
    for names in needed:
        for name in names.split("|"):
            try:
                folder = Path(hf_hub_download(repository, name, revision=revision or None)).parent
                break
            except LocalEntryNotFoundError:
                pass  # no network and not in the cache
            except EntryNotFoundError:
                pass
            except (HfHubHTTPError, OSError):
                pass
            except HFValidationError as error:
                raise WeightsError(f"weights hub:{spec}: {error}; write hub:OWNER/NAME@REVISION.") from None
        else:
            raise WeightsError(
                f"weights hub:{spec}: {names.split('|')[0]} is neither in the local cache nor reachable; on a machine "
                f"with a network run: hf download {repository}" + (f" --revision {revision}" if revision else "") + ", "
                "copy the folder here, and give its path instead."
            )
    assert folder is not None
    return folder


def sha256_of_folder(folder: Path) -> str:
    """The sha256 of a folder's weights: of its one file, else of the list of all of its files' sha256."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            each = [sha256_of(file) for file in files]
            return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
    raise WeightsError(f"{folder} holds no weights.")


@cache
def sha256_of(file: Path) -> str:
    """The sha256 of a weights file, read once per process."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
