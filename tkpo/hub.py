"""Upload of a finished run to the model hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi

from tkpo.errors import TKPOError

logger = logging.getLogger(__name__)


def check_hub() -> None:
    """TKPOError if the hub cannot be reached or nobody is logged in: said before the training, not after it."""
    try:
        HfApi().whoami()
    except Exception as error:  # whatever the network layers raise, the way out is the same
        raise TKPOError(
            f"push_to_hub: cannot log in to the model hub ({type(error).__name__}). Check the network and `hf auth "
            "login`, or train without push_to_hub and upload the run's folder model/ later: hf upload USER/NAME FOLDER"
        ) from error


def push(folder: Path, repository: str | None, name: str) -> str | None:
    """Upload `folder` and return its address; a failure is a warning, since the run itself is finished.

    repository: USER/NAME; None is the logged-in user's own, called `name`.
    """
    try:
        api = HfApi()
        repository = api.create_repo(repository or name, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by tkpo"))
    except Exception as error:
        logger.warning(
            "push_to_hub failed (%s: %s); the run is complete. Later: hf upload %s %s",
            *(type(error).__name__, " ".join(str(error).split())[:300], repository or "USER/NAME", folder),
        )
        return None
