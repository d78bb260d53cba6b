"""What is safe to print and to store: text without secrets, and without characters that control a terminal or a page.

The only place that knows both; errors, notes, the terminal and reports all use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

LEAST = 8  # characters; a shorter value cannot be a secret, and would redact words
# Environment variables that hold a secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD ...
NAMED = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|_KEY|KEY_ID)$", re.IGNORECASE)
# A URL's user and password, up to the last @ before a slash; or with slashes in a password that is not a port.
LOGIN = re.compile(r"""(?<=://)(?:[^/\s"<>]+|[^/\s"<>@:]*:(?!\d+/)[^\s"<>@]+)(?=@)""")
BARE = re.compile(r"^[^\s/:@]*:[^\s/]+(?=@)")  # of a proxy, which is often given without a scheme
FILED = re.compile(r"(?:\A\s*|=\s*|\bpassword\s+)(\S+)")  # in the hub's token files and in .netrc
SECRETS = re.compile(
    LOGIN.pattern
    + r"""|(?<=[Bb]earer\ )(?=\S*\d)[\w.~+/=-]{16,}
    |(?:hf|api_org)_[A-Za-z0-9]{30,} | hf_(?:oauth|jwt)_[\w.~+/=-]{8,} | api_org_[A-Za-z0-9]{16,}
    |wandb_v\d_\w{16,} | \bgh[pousr]_[A-Za-z0-9]{36,} | \bgithub_pat_\w{40,} | \bglpat-[\w-]{20,}
    |\bsk-(?:proj|ant|or)-[\w-]{20,} | \bsk-[A-Za-z0-9]{32,} | \bpypi-AgE[\w-]{20,} | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    |\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+""",
    re.VERBOSE,
)
QUERY = re.compile(  # of a signed URL: S3's, Google's, Azure's, CloudFront's (which the hub's files come from)
    r"""([?&](?:x-(?:amz|goog)-)?(?:(?:security-|access_|auth_)?token|signature|sig|credential|policy|secret|password"""
    r"""|key-pair-id|awsaccesskeyid|(?:api_?|access_)?key)=)[^&\s"'<>]+""",
    re.IGNORECASE,
)
STEERING = {c: f"\\x{c:02x}" for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"} | {
    c: f"\\u{c:04x}" for c in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x2070))
}
IN_JSON = {c: f"\\u{c:04x}" for c in STEERING if c > 31}  # JSON escapes the others itself


def shown(text: str) -> str:
    """A text that is safe to print: `plain` and `without_tokens`."""
    return plain(without_tokens(text))


def plain(text: str) -> str:
    """A text with escapes for what controls a terminal or a page: control characters (C0 and C1), text direction marks.

    Newlines and tabs are kept.
    """
    return text.translate(STEERING)


def json_shown(text: str) -> str:
    """A JSON document that is safe to print; control characters are escaped as in JSON, so it still parses the same."""
    return without_tokens(text).translate(IN_JSON)


def without_tokens(text: str) -> str:
    """A text with `***` in place of each secret.

    These are the access tokens of known forms, the user and password of a URL, the signature of a signed one, and
    the secrets in this process's environment and in the user's token files.
    """
    if len(text) < LEAST:
        return text
    for secret in _known(tuple(os.environ.items())):
        text = text.replace(secret, "***")
    return QUERY.sub(r"\1***", SECRETS.sub("***", text))


@lru_cache(4)
def _known(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """The secrets that the environment and the user's token files hold, the longest first."""
    found = {value for name, value in environment if NAMED.search(name)}
    for _, value in environment:
        if "@" in value:
            for match in (*LOGIN.finditer(value), *BARE.finditer(value)):
                password = match[0].partition(":")[2]
                found |= {match[0], password, unquote(password)}
    found |= {secret for path in _token_files() for secret in _secrets_in(path)}
    return sorted({one.strip() for one in found if len(one.strip()) >= LEAST}, key=len, reverse=True)


def _token_files() -> Iterator[str]:
    """Where huggingface_hub stores its tokens, and HTTP clients their passwords."""
    at = os.environ.get
    cache = at("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = at("HF_HOME") or os.path.join(cache, "huggingface")
    yield at("HF_TOKEN_PATH") or os.path.join(home, "token")
    yield at("HF_STORED_TOKENS_PATH") or os.path.join(home, "stored_tokens")
    yield at("NETRC") or "~/.netrc"


def _secrets_in(path: str) -> tuple[str, ...]:
    try:
        file = Path(os.path.expanduser(path))
        return tuple(FILED.findall(file.read_text(encoding="utf-8"))) if file.is_file() else ()
    except (OSError, ValueError):
        return ()
