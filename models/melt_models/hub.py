"""Where a checkpoint lies: a folder here, or a model of the Hugging Face hub, fetched once into its cache."""

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from melt_models.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS, _TEXTS = "*.safetensors", ("*.json", "*.jsonl", "*.jinja")


def checkpoint_folder(name: str, with_weights: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
        name: a folder, or a name of the hub such as ``ByteDance/Ouro-1.4B``. With ``HF_HUB_OFFLINE=1``, and where the
            hub cannot be reached, only what lies in its cache is used.
        with_weights: whether to fetch the weights too, gigabytes; a tokenizer needs none.

    Raises:
        CheckpointError: neither a folder nor a model that can be fetched.
    """
    folder = Path(name)
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=[*_TEXTS, *([_WEIGHTS] if with_weights else [])]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} is not a folder here, and could not be fetched from {constants.ENDPOINT}: {reason} "
            f"(downloaded models are looked for in {constants.HF_HUB_CACHE})"
        ) from error
