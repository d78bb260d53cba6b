"""Uploads an exported folder to the hub: private by default, checked before any work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from qcft.errors import InputError, Interrupted, QcftError, short
from qcft.events import Watch
from qcft.hub import retried

REPO = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)  # as huggingface_hub has it
LONGEST = 96
OFFLINE = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or export without --push"


def check_repo(repo: str) -> None:
    """Raise InputError if this is not a valid name for a repository on the hub."""
    if not REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > LONGEST:
        raise InputError(f"--push: {repo!r} is not a repository name", "give USER/REPO, such as me/spanish")


def check_upload(repo: str, public: bool) -> None:
    """Raise InputError if nothing can be uploaded: no token, no hub, or a repository that others can read."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    check_repo(repo)
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it, or omit --push")
    if not get_token():
        raise InputError("--push: no access token for the hub was found", "run `hf auth login`, or set HF_TOKEN")
    try:
        found = HfApi().model_info(repo, timeout=10)
    except RepositoryNotFoundError:
        return
    except Exception as error:  # whatever the hub's HTTP client raises
        raise InputError(f"--push: the hub cannot be reached to look up {repo!r}: {short(error)}", OFFLINE) from None
    if found.private is public:
        raise InputError(
            f"--push: {repo!r} already exists on the hub and is {'private' if public else 'public'}",
            f"name another repository, or {'omit --public' if public else 'add --public'}",
        )


def upload(folder: Path, repo: str, public: bool, watch: Watch) -> str:
    """Upload a folder, to a new repository if needed, and return its address. Raises QcftError if that fails."""
    from huggingface_hub import HfApi, constants

    watch.note(f"uploading {folder} to {repo} ({'public' if public else 'private'})")

    def send() -> None:
        HfApi().create_repo(repo, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported with qcft")

    try:
        retried(send, "--push", repo, watch)
    except Interrupted:
        raise
    except QcftError as error:
        command = f"hf upload {shlex.quote(repo)} {shlex.quote(str(folder))}"
        why = short(error.__context__ or error)  # what the hub's client raised
        raise QcftError(
            f"--push: the upload to {repo!r} failed: {why}", f"{folder} is complete; to retry: {command}"
        ) from None
    return f"{constants.ENDPOINT}/{repo}"
