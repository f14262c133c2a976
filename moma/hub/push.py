"""Upload an exported folder to the Hugging Face Hub, as one commit."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from moma.errors import UserError, quote, shorten
from moma.runtime.weights import first_line

# Files of an earlier upload that would be read beside the new ones.
_REPLACED = ("model*.safetensors", "model.safetensors.index.json", "codec/*")
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

    What the Hub has already, for example of an upload that was interrupted, is not sent again.
    Readers see all files of the commit or none.

    Args:
        folder: what `moma export` wrote.
        repo: NAME or USER/NAME; it is created unless it exists.
        public: who may read a new repository: everybody, or its owners.

    Raises:
        UserError: the Hub cannot be reached or refuses it.
    """
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
    files = {name: file for name, file in files.items() if file.is_file()}
    api = HfApi(library_name="moma")
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        surplus = [
            name
            for name in api.list_repo_files(address.repo_id)
            if name not in files and any(fnmatch(name, pattern) for pattern in _REPLACED)
        ]
        removed = [CommitOperationDelete(name) for name in surplus]
        added = [CommitOperationAdd(name, file) for name, file in files.items()]
        message = f"Upload {folder.name} with moma"
        api.create_commit(address.repo_id, [*removed, *added], commit_message=message)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # The library wraps the failures of its threads.
        inner = error.__cause__ if isinstance(error, RuntimeError) else None
        cause = inner if isinstance(inner, Exception) else error
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        reason = getattr(cause, "server_message", None) or first_line(cause)
        raise UserError(
            f"--push {repo}: {shorten(reason, 300)}; {_HINTS.get(status, 'check the connection')}, "
            f"then run the same command again: {folder} is complete"
        ) from error
    return str(address)
