"""Upload an exported folder to the Hugging Face Hub, as one commit."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from moma.errors import UserError, quote, shorten
from moma.runtime.weights import first_line

# Files of an earlier upload that would be read beside the new ones.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "codec/*"]
_HINTS = {
    401: "log in again with `hf auth login`, or set HF_TOKEN",
    403: "choose a repository that your token may write to",
}


def require_repository(repo: str) -> None:
    """Check what can be checked without the network.

    Raises:
        UserError: the Hub has no repositories of this name, or there is no token for it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push {quote(repo)}: is not a name of the Hub ({first_line(error)}); give NAME or "
            "USER/NAME"
        ) from error
    if get_token() is None:
        raise UserError(
            "--push: there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repo: str, public: bool) -> str:
    """Upload a folder and return the address of the repository.

    Readers see all files of the commit or none.

    Args:
        folder: what `moma export` wrote.
        repo: NAME or USER/NAME; it is created unless it exists.
        public: who may read a new repository: everybody, or its owners.

    Raises:
        UserError: the Hub cannot be reached or refuses it; the message has a command to go on.
    """
    api = HfApi(library_name="moma")
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message=f"Upload {folder.name} with moma",
            delete_patterns=_REPLACED,
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # The library wraps the failures of its threads.
        inner = error.__cause__ if isinstance(error, RuntimeError) else None
        cause = inner if isinstance(inner, Exception) else error
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        reason = getattr(cause, "server_message", None) or first_line(cause)
        raise UserError(
            f"--push {repo}: {shorten(reason, 300)}; {_HINTS.get(status, 'check the connection')}, "
            f"then go on with: {_upload_command(folder, repo, public)}"
        ) from error
    return str(address)


def _upload_command(folder: Path, repo: str, public: bool) -> str:
    """The command of `huggingface_hub` that uploads a folder, or goes on with it."""
    deleted = [part for pattern in _REPLACED for part in ("--delete", pattern)]
    visible = "--no-private" if public else "--private"
    return shlex.join(["hf", "upload", repo, str(folder), ".", visible, *deleted])
