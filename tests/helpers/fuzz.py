"""What the tests on random input share: how many examples, and what may come out."""

import os
import signal
from contextlib import contextmanager
from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qcft import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
many = settings(max_examples=EXAMPLES, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
STEERING = [
    "\x1b[2J", "\x1b]52;c;aGk=\x07", "\x1b]0;t\x1b\\", "\x1b]8;;http://x\x1b\\", "\x9b2J", "\x9d0;t\x9c", "\x1b",
    "\x07", "\b", "\r", "\r\n", "\n", "\t", "\0", "\u202e", "\u2066", "\u2069", "\u200f", "\u061c", "\u2028", "\ud800",
    "\x7f", "[/]", "[red]", "[link=http://x]", "[/red]", "[@click=x]", ":warning:", "\\[", "{", "}", "%", "***", "שלום",
    "日本", "🦜",
]  # fmt: skip
steering = st.text(st.characters(), max_size=12) | st.lists(
    st.sampled_from(STEERING) | st.text(max_size=3), min_size=1, max_size=6
).map("".join)


@contextmanager
def refused_or_accepted():
    """Nothing but an InputError of one line with a hint may come out, and in time."""
    refused = None

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    except InputError as error:
        refused = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if refused is not None:
        assert "\n" not in refused.message
        assert len(refused.message) < 2000
        assert refused.hint
