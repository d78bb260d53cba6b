"""YAML as recipes are written in: every key once, merge keys, escaped pairs of UTF-16 as the character they mean.

1e-4 stays the text that PyYAML takes it for (YAML 1.2 has a number): it names an ablation's arm as it was written, and
is a number where the schema asks for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qcft.errors import InputError

# What reading YAML may raise: no YAML, no UTF-8 or no such date, nesting thousands deep.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
LARGEST = 10_000_000  # bytes of a file; its values are counted later
MERGED = 10_000  # keys of one mapping, those merged into it with them: merges of merges double


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but that it refuses a key written twice, of which PyYAML silently keeps the last."""

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
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: more than {MERGED:,} keys, with those merged")

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        return joined(value) if isinstance(value, str) else value


def joined(text: str) -> str:
    """A text whose pairs of half characters, as JSON escapes what is beyond 16 bits, are whole; lone halves stay."""
    if not any("\ud800" <= one <= "\udfff" for one in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def read_yaml(text: str) -> Any:
    """The value that a YAML text holds. Raises one of UNREADABLE."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def read_yaml_file(path: Path) -> Any:
    """The value that a YAML file holds. Raises InputError."""
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: no recipe has over {LARGEST:,} bytes", "see `qcft recipes` for examples")
        return read_yaml(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise InputError(
            f"{path}: not readable as YAML: {one_line(error)}", "see `qcft recipes` for examples"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", "check the path and its permissions") from None


def one_line(error: Exception) -> str:
    """What an error of YAML's says, on one line."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
