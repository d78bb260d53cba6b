"""What a failed call to the model hub means, in one line."""

from __future__ import annotations

from qcft.errors import InputError

OFFLINE = "offline, use a local folder, a .gguf file or the embedded smollm2-135m-instruct"


def unreachable(what: str, name: str, error: Exception, offline: str = OFFLINE) -> InputError:
    """The InputError for a hub call that failed: not there, not allowed, or no network."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return InputError(
                f"{what}: {name!r} is gated on the hub", "accept its terms there, then run `hf auth login`"
            )
        if isinstance(cause, RevisionNotFoundError):
            return InputError(f"{what}: {name!r} has no such revision on the hub", "check the revision")
        if isinstance(cause, RepositoryNotFoundError):
            return InputError(
                f"{what}: there is no {name!r} on the hub that you may read", "check the spelling, or `hf auth login`"
            )
    names = {type(cause).__name__ for cause in chain}
    networks = {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    if names & networks or any(isinstance(c, (ConnectionError, TimeoutError)) for c in chain):
        return InputError(f"{what}: {name!r} is not cached here and the hub can't be reached", offline)
    detail = " ".join(str(error).split())[:200]
    return InputError(f"{what}: {name!r} could not be loaded from the hub: {detail}", offline)
