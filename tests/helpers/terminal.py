"""What would steer a terminal that a text is printed on."""

import re

# What Rich writes of its own: colours, the cursor's moves and hiding, clearing of a line.
OURS = re.compile(r"\x1b\[[\d;]*m|\x1b\[\d*[AKG]|\x1b\[\d*[12]K|\x1b\[\?25[lh]|\r")
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def steers(text, moves=False):
    """The first control or turn of direction with the text around it; `moves`: but for Rich's own."""
    text = OURS.sub("", text) if moves else text
    found = STEERS.search(text)
    return text[max(0, found.start() - 60) : found.end() + 60] if found else ""
