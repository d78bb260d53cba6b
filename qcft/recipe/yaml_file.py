"""Reads the YAML of recipes: no key twice, merge keys, escaped UTF-16 pairs as the character they encode.

1e-4 stays text, as PyYAML reads it (in YAML 1.2 it is a number): an ablation's arm is named by it as it was written,
and the schema converts it to a number where it needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qcft.errors import InputError

# What reading YAML may raise: invalid YAML, UTF-8 or dates, nesting thousands deep.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
LARGEST = 10_000_000  # bytes of a file; the number of values is checked later
MERGED = 10_000  # keys of one mapping, merged keys included: merges of merges grow exponentially


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses duplicate keys, of which PyYAML silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MERGED:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: more than {MERGED:,} keys, merged keys included")

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        return joined(value) if isinstance(value, str) else value


def joined(text: str) -> str:
    """A text with surrogate pairs (JSON's escapes of characters beyond 16 bits) joined; lone surrogates stay."""
    if not any("\ud800" <= one <= "\udfff" for one in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises one of UNREADABLE."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def read_yaml_file(path: Path) -> Any:
    """The value of a YAML file. Raises InputError."""
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: a recipe has at most {LARGEST:,} bytes", "see `qcft recipes` for examples")
        return read_yaml(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise InputError(
            f"{path}: not readable as YAML: {one_line(error)}", "see `qcft recipes` for examples"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from None


def one_line(error: Exception) -> str:
    """The message of a YAML error, on one line."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
