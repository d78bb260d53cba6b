"""Reads a recipe from a file, a built-in name or flags, applies `--set`, and validates it as a whole."""

from __future__ import annotations

import copy
import os
import re
import types
import typing
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qcft.errors import InputError, nearest
from qcft.files import exists, oddity
from qcft.recipe.anchor import as_mapping
from qcft.recipe.schema import Recipe
from qcft.recipe.texts import check_texts
from qcft.recipe.yaml_file import UNREADABLE, one_line, read_yaml, read_yaml_file

SHOWN = 120  # characters of a wrong value in a message


def recipes_folder() -> Path:
    """The folder of the built-in recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def built_in_recipes() -> dict[str, Path]:
    """The names and files of the recipes that ship with qcft."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def load_recipe(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a built-in one by its name, apply `changes` (`{"phase2.train.lr": 1e-4}`).

    Relative data paths in a file are looked for beside the file first. Raises InputError.
    """
    return recipe_from(read_recipe(recipe)[0], changes)


def read_recipe(recipe: str | Path) -> tuple[dict[str, Any], Path]:
    """A recipe file, or a built-in one by its name, as plain data, and the folder it is in. Raises InputError."""
    path = _find(str(recipe))
    raw = read_yaml_file(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys, not {_kind(raw)}", "see `qcft recipes`")
    check_texts(raw)
    raw = _normalised(raw)
    _make_paths_absolute(raw, path.parent)
    return raw, path.parent


def changed(raw: dict[str, Any], changes: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """A recipe given as plain data with `changes` applied and shorthands expanded; relative paths in it are looked for
    in `folder` first, then in the current folder. Raises InputError."""
    raw = _normalised(raw)
    for key, value in changes.items():
        _apply(raw, key, value)
        raw = _normalised(raw)  # the new value may use shorthands too, and the next key may set something inside it
    for place in (folder, Path.cwd()):
        if place is not None:
            _make_paths_absolute(raw, place)
    return raw


def recipe_from(raw: dict[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """Validate a recipe given as plain data, after applying `changes`. Raises InputError."""
    check_texts(raw)
    check_texts(dict(changes or {}))
    raw = changed(raw, changes or {})
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _as_input_error(error, raw) from None


def parse_assignments(texts: list[str]) -> dict[str, Any]:
    """`["phase2.train.lr=1e-4"]` as a mapping; values are read as YAML. Raises InputError."""
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {_shown(text)} is not KEY=VALUE", "for example --set phase2.train.lr=1e-4")
        try:
            changes[key.strip()] = read_yaml(value)
        except UNREADABLE as error:
            raise InputError(
                f"--set {_shown(text)}: the value cannot be read: {one_line(error)}",
                "close all brackets and quotes, and quote it for the shell: --set 'KEY=[a, b]'",
            ) from None
    return changes


def _find(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if (odd := oddity(path)) is not None:
        raise InputError(f"{name!r} is {odd}, not a recipe", "give the path of a file")
    if exists(path) and not path.is_dir():
        return path.resolve()
    built_in = built_in_recipes()
    if name in built_in:
        return built_in[name]
    if exists(path):
        raise InputError(f"{name!r} is a folder, not a recipe", "give the recipe.yaml inside it")
    raise InputError(
        f"there is no recipe {name!r}: neither a file nor a built-in name",
        nearest(name, list(built_in)) + f"built in: {', '.join(built_in)}",
    )


def _normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """A copy with the shorthands expanded: a bare model name, phases as a mapping, a bare or single source."""
    raw = copy.deepcopy(raw)
    if isinstance(raw.get("model"), str):
        raw["model"] = {"name": raw["model"]}
    if isinstance(raw.get("phases"), dict):
        raw["phases"] = [
            {"name": name, **(body if isinstance(body, dict) else {"data": body})}
            for name, body in raw["phases"].items()
            if body is not None
        ]
    phases = raw.get("phases")
    holders = [raw, raw.get("heldout"), *(phases if isinstance(phases, list) else [])]
    for holder in holders:
        if isinstance(holder, dict) and type(holder.get("replay")) in {int, float}:
            holder["replay"] = {"ratio": holder["replay"]}
        if isinstance(holder, dict) and "anchor" in holder:
            holder["anchor"] = as_mapping(holder["anchor"])
    holders += [p["replay"] for p in holders if isinstance(p, dict) and isinstance(p.get("replay"), dict)]
    mixes = [h["mix"] for h in holders if isinstance(h, dict) and isinstance(h.get("mix"), list)]
    holders += [part for mix in mixes for part in mix]
    for holder in holders:
        for key in ("data", "probe"):
            if isinstance(holder, dict) and isinstance(holder.get(key), (str, dict, list)):
                sources = holder[key] if isinstance(holder[key], list) else [holder[key]]
                holder[key] = [{"path": s} if isinstance(s, str) else s for s in sources]
    return raw


def _make_paths_absolute(raw: dict[str, Any], folder: Path) -> None:
    """Make relative paths of models, data, adapters and local copies absolute if they exist in `folder`."""

    def lies_there(value: str, lang: Any) -> bool:
        langs = lang if isinstance(lang, list) else [lang]
        return any(exists(folder / value.replace("{lang}", str(one))) for one in langs)

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                visit(item)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key in {"path", "adapter"} and isinstance(value, str):
                    if value and lies_there(value, node.get("lang")):
                        node[key] = str((folder / value).absolute())
                elif key == "local" and isinstance(value, dict):
                    for task, path in value.items():
                        if isinstance(path, str) and path and lies_there(path, None):
                            value[task] = str((folder / path).absolute())
                else:
                    visit(value)

    visit(raw)
    model: Any = raw.get("model")
    for key in ("name", "base") if isinstance(model, dict) else ():
        if isinstance(model.get(key), str) and model[key] and exists(folder / model[key]):
            model[key] = str((folder / model[key]).resolve())


def _apply(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key. The first word is a recipe key or the name of a phase."""
    head, *rest = key.split(".")
    given = raw.get("phases")
    phases: list[Any] = given if isinstance(given, list) else []
    named = [p for p in phases if isinstance(p, dict) and p.get("name") == head]
    if named and not rest:
        if value is None:
            raw["phases"] = [p for p in phases if p is not named[0]]
        elif isinstance(value, dict):
            named[0].clear()
            named[0].update({"name": head, **value})
        else:
            raise InputError(f"--set {key}: a phase is a mapping or null, not {value!r}", f"use {head}.KEY=VALUE")
        return
    if named:
        _set_below(named[0], rest, value, key)
    elif head in Recipe.model_fields:
        _set_below(raw, [head, *rest], value, key)
    else:
        names = [str(p.get("name")) for p in phases if isinstance(p, dict)]
        known = [*names, *Recipe.model_fields]
        raise InputError(
            f"--set {key}: there is no phase or recipe key {head!r}",
            nearest(head, known) + f"phases: {', '.join(names) or 'none'}; keys: {', '.join(Recipe.model_fields)}",
        )


def _set_below(node: Any, path: list[str], value: Any, key: str) -> None:
    for i, part in enumerate(path):
        last = i == len(path) - 1
        place: int | str = part
        if isinstance(node, list):
            if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(node):
                raise InputError(
                    f"--set {key}: {part!r} is not an entry of a list of {len(node)}",
                    f"use 0 to {len(node) - 1}" if node else "the list is empty: set it as a whole",
                )
            place = int(part)
        elif isinstance(node, dict):
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise InputError(
                f"--set {key}: nothing can be set below {'.'.join(path[:i])!r}, which is {node!r}",
                "set the key itself",
            )
        if last:
            node[place] = value
        else:
            node = node[place]


def _as_input_error(error: ValidationError, raw: dict[str, Any]) -> InputError:
    first = error.errors(include_url=False)[0]
    location, kind, given = first["loc"], first["type"], first.get("input")
    where = _readable(location, raw)
    if kind == "extra_forbidden":
        known = list(_fields_at(location[:-1]))
        return InputError(
            f"recipe: unknown key {where!r}", nearest(str(location[-1]), known) + f"known here: {', '.join(known)}"
        )
    if kind == "missing":
        return InputError(f"recipe: {where!r} is missing", "add it to the recipe, or give it with --set")
    text = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(" or instance of ")[0]
    if kind in {"too_short", "string_too_short"}:
        text = "should not be empty"
    if kind == "value_error":  # the schema's own: what is wrong | what to do
        message, _, hint = text.partition(" | ")
        return InputError(f"recipe: {where + ': ' if where else ''}{message}", hint)
    if where.endswith("replay.ratio") and kind in {"less_than_equal", "greater_than_equal", "finite_number"}:
        return InputError(
            f"recipe: {where}: {_shown(given)} is outside [0, 0.9]",
            "the ratio is replay's share of the final mix, e.g. 0.2",
        )
    wants_text = kind in {"string_type", "model_type"} or "'" in str(first.get("ctx", {}).get("expected"))
    if wants_text and (quoted := _unquoted(given)) is not None:
        return InputError(f"recipe: {where}: {_shown(given)} {text}", quoted)
    expected = next((word for start, word in EXPECTED.items() if kind.startswith(start)), None)
    default = _default_at(location)
    hint = f"give {expected}" if expected else f"omit it for the default, {default!r}" if default else f"it {text}"
    return InputError(f"recipe: {where}: {_shown(given)} {text}", hint)


def _unquoted(value: Any) -> str | None:
    """The hint where a text, or one in a list, was read as another type because it has no quotes."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool):
            return 'put it in quotes, such as "no": without them YAML reads no, off, yes and on as true or false'
        if isinstance(one, (int, float, date)):
            return f'put it in quotes: "{one}"; without them YAML reads a number or a date'
    return None


def _shown(value: Any) -> str:
    """A value as it was given, or its beginning."""
    text = str(value) if isinstance(value, date) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# What pydantic's kinds of errors ask for.
EXPECTED = {
    "float": "a number",
    "finite": "a finite number",
    "int": "a whole number",
    "bool": "true or false",
    "list": "a list",
    "string": "a text",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
    "too_short": "at least one",
}


def _readable(location: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """`('phases', 1, 'train', 'lr')` as `phase2.train.lr`, without the names of union members."""
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "phases" and isinstance(parts[1], int):
        phases = raw.get("phases")
        entry = phases[parts[1]] if isinstance(phases, list) and parts[1] < len(phases) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        parts = [str(name) if name else f"phases.{parts[1]}", *parts[2:]]
    return ".".join(str(p) for p in parts if not _is_union_member(str(p)))


def _is_union_member(part: str) -> bool:
    return part in {"bool", "str", "int", "float"} or "[" in part


def _fields_at(location: tuple[int | str, ...]) -> dict[str, FieldInfo]:
    """The keys the schema knows at a place."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return model.model_fields


def _default_at(location: tuple[int | str, ...]) -> Any:
    """A key's default in the schema, or None."""
    field = _fields_at(location[:-1]).get(str(location[-1])) if location else None
    default = field.default if field is not None else None
    return default if isinstance(default, (str, int, float)) else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in {list, typing.Union, types.UnionType, typing.Annotated}:
        for argument in typing.get_args(annotation):
            found = _model_in(argument)
            if found:
                return found
    return None


def _kind(value: Any) -> str:
    words = {"NoneType": "nothing", "str": "text", "int": "a number", "float": "a number"}
    return words.get(type(value).__name__, f"a {type(value).__name__}")
