"""Upload an exported folder to the Hugging Face hub, on the user's request."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check_name(name: str) -> None:
    """Raise ValueError unless a text is the name of a repository, OWNER/NAME."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"--push {name!r:.120}: a repository of the hub is called OWNER/NAME")


def push(directory: Path, name: str, *, private: bool = True) -> str:
    """Upload all files of a folder as one commit to a model repository, which is made if it does not exist.

    Args:
        directory: The folder.
        name: OWNER/NAME.
        private: Whether a new repository is private; an existing one is not changed.

    Returns:
        Address of the repository.

    Raises:
        ValueError: The hub refuses, or cannot be reached. The folder is not removed.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message="Exported by steerlab")
    except Exception as error:  # errors of the HTTP library below, which is another one in other versions of the client
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{directory} is written, but the hub at {constants.ENDPOINT} did not accept it: {reason}. A token with write "
            "access goes in HF_TOKEN; exporting again needs another folder"
        ) from None
    return str(made)
