"""Checkpoints of the Hugging Face hub, downloaded once and kept in its own cache."""

import pathlib
import re

from continuous_lm.errors import InputError

__all__ = [
    "MODEL_NAME",
    "download",
]

MODEL_NAME = re.compile(
    r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII
)  # org/name, org/name@revision
_DOWNLOAD_PATTERNS = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
]
_IGNORE_PATTERNS = [
    "*/*",
    "consolidated*",
]  # other formats in sub-folders, and the same weights again


def download(name: str) -> pathlib.Path:
    """The folder with the files of "org/name" or "org/name@revision"; never a pickle.

    Raises:
      InputError: saying what to do, if the model cannot be had.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise InputError(
            f"{name!r} is neither a folder nor a bundled model; to load it from the Hugging Face"
            ' hub: pip install "continuous-lm[hub]"'
        ) from None
    name_match = MODEL_NAME.fullmatch(name)
    assert name_match is not None, name
    repo, revision = name_match.groups()
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_DOWNLOAD_PATTERNS,
            ignore_patterns=_IGNORE_PATTERNS,
        )
    except errors.GatedRepoError:  # before the next, whose special case it is
        raise InputError(
            f"{repo} is gated: accept its licence on its page of the Hugging Face hub, and log in"
            " with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repo!r} is neither a folder here nor a model of the Hugging Face hub; check the"
            " name, and if it is private, log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{repo} has no revision {revision!r} on the Hugging Face hub; check the part after @"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{name} is neither a folder nor complete in the Hugging Face cache, and the hub cannot"
            " be reached: go online once (without HF_HUB_OFFLINE), or check the name"
        ) from None
    except errors.HFValidationError:
        raise InputError(
            f"{repo!r} is neither a folder nor a name of the hub"
        ) from None
    except Exception as error:  # of the network or the disk, in many classes
        message = " ".join(str(error).split())
        raise InputError(
            f"{name} cannot be downloaded, try again: {message:.200}"
        ) from error
    path = pathlib.Path(folder)
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{repo} has no *.safetensors on the Hugging Face hub, and pickles (*.bin), which can"
            " run code, are never downloaded; convert the checkpoint to safetensors"
        )
    return path
