"""What a failed call to the model hub means, in one line, and how much may be downloaded from it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from qcft.errors import InputError, QcftError, short
from qcft.events import Watch
from qcft.files import is_disk_full

OFFLINE = "offline, use a local folder, a .gguf file or the embedded smollm2-135m-instruct"
TRIES = 4
WAIT = 2.0  # seconds before the second try; doubled before each further try
LIMIT = "QCFT_MAX_DOWNLOAD"  # in GB, of one model or data set
USUAL = 200.0
MUCH = 1e8  # bytes; a smaller download is not reported
BUSY = {408, 425, 429, 500, 502, 503, 504}
BROKEN = ConnectionError, TimeoutError

Result = TypeVar("Result")


def retried(call: Callable[[], Result], what: str, name: str, watch: Watch, offline: str = OFFLINE) -> Result:
    """The result of a call to the hub, retried where it fails midway; a partial download is resumed.

    Raises the error that `unreachable` gives for the last failure.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except QcftError:  # a request to stop
            raise
        except Exception as error:  # whatever the hub's HTTP client raises; `unreachable` distinguishes them
            if attempt == TRIES or not _may_pass(error):
                raise unreachable(what, name, error, offline) from None
            seconds = WAIT * 2 ** (attempt - 1)
            watch.note(f"{name}: the hub fails ({short(error, 200)}); trying again in {seconds:.0f} s", "warning")
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                watch.check_stop()
                time.sleep(0.1)
    raise AssertionError("unreachable")


def check_download(what: str, name: str, sizes: Iterable[int | None], watch: Watch | None = None) -> None:
    """Report the size of a large download. Raises InputError where it is above the limit."""
    text = os.environ.get(LIMIT, "").strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?) ?(?:GB)?", text, re.IGNORECASE)
    if text and not match:
        raise InputError(f"{LIMIT}={text!r} is not a size", f"give gigabytes, such as {LIMIT}=500")
    most, total = float(match[1]) if match else USUAL, sum(size or 0 for size in sizes)
    if total > most * 1e9:
        raise InputError(
            f"{what}: {name!r} is a download of {total / 1e9:,.1f} GB, more than the limit of {most:,g} GB",
            f"use a smaller one, or set {LIMIT} to a higher limit in GB",
        )
    if total > MUCH and watch is not None:
        watch.note(f"downloading {name} ({total / 1e9:,.1f} GB; the limit is {most:,g} GB)")


def _may_pass(error: Exception) -> bool:
    """Whether a failure is temporary: a busy server, a broken connection, an incomplete file."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in BUSY
    from huggingface_hub.errors import OfflineModeIsEnabled

    if _comes_of(error, OfflineModeIsEnabled):
        return False
    return _comes_of(error, _client().TransportError, *BROKEN) or "Consistency check" in str(error)


def _client() -> Any:
    """The HTTP client of huggingface_hub: httpx, or httpx2 from its version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__mro__[1].__module__]


def _comes_of(error: BaseException | None, *kinds: type[BaseException]) -> bool:
    """Whether an error, or one that caused it, is of these classes."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error is not None


def unreachable(what: str, name: str, error: Exception, offline: str = OFFLINE) -> QcftError:
    """The error for a hub call that failed: not found, not allowed, no network, or no space for the download."""
    from huggingface_hub import constants, errors

    if is_disk_full(error, Path(constants.HF_HUB_CACHE)):
        return QcftError(
            f"{what}: the disk is full, there is no space for {name!r}",
            "free some space, or set HF_HOME to another disk",
        )
    if _comes_of(error, errors.GatedRepoError):
        return InputError(f"{what}: {name!r} is gated on the hub", "accept its terms there, then run `hf auth login`")
    if _comes_of(error, errors.RevisionNotFoundError):
        return InputError(f"{what}: {name!r} has no such revision on the hub", "check the revision")
    if _comes_of(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{what}: there is no {name!r} on the hub that you may read", "check the spelling, or `hf auth login`"
        )
    if _comes_of(error, _client().ConnectError, _client().ConnectTimeout, errors.LocalEntryNotFoundError, *BROKEN):
        return InputError(
            f"{what}: {name!r} is not (completely) in the local cache, and {constants.ENDPOINT} cannot be reached",
            offline,
        )
    return InputError(f"{what}: {name!r} could not be loaded from the hub: {short(error, 200)}", offline)
