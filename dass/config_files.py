"""Frozen dataclasses from TOML or YAML files and back to TOML; any dataclass, nothing about training.

A file may give any subset of the keys; what it leaves out keeps its value. A key that does not exist stops with the
nearest name that does. TOML has no null: an option that may be absent is written as "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")
ABSENT = "none"


class ConfigError(ValueError):
    """A configuration that cannot be used: the message names the key, what was given and what was expected."""


def read_config_file(path: Path | str) -> dict[str, Any]:
    """The keys and values of a `.toml`, `.yaml` or `.yml` file. Raises ConfigError when it cannot be read or parsed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    return parse_config_text(text, str(path), yaml=path.suffix.lower() in (".yaml", ".yml"))


def parse_config_text(text: str, source: str, yaml: bool = False) -> dict[str, Any]:
    """The keys and values of a TOML (or YAML) text; `source` names it in errors."""
    if yaml:
        try:
            import yaml as yaml_library
        except ImportError as error:
            raise ConfigError(f"{source} is YAML, which needs PyYAML: pip install pyyaml, or write TOML") from error
        try:
            values = yaml_library.safe_load(text) or {}
        except yaml_library.YAMLError as error:
            raise ConfigError(f"{source} is not valid YAML: {error}") from error
    else:
        import tomlkit
        from tomlkit.exceptions import TOMLKitError

        try:
            values = tomlkit.parse(text).unwrap()
        except TOMLKitError as error:
            raise ConfigError(f"{source} is not valid TOML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}; expected sections of keys and values")
    return values


def update_config(config: Config, values: Mapping[str, Any], source: str = "configuration", where: str = "") -> Config:
    """`config` with the nested `values` put in. Raises ConfigError on an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(type(config))
    names = [entry.name for entry in dataclasses.fields(config)]
    changes = {}
    for key, value in values.items():
        # Files may write keys the way the command line does, with hyphens.
        name = key.replace("-", "_") if isinstance(key, str) else str(key)
        label = f"{where}{name}"
        if name not in names:
            raise ConfigError(f"{source}: unknown key '{label}'" + suggestion(name, names, where))
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: '{label}' is {value!r}; expected a section with keys")
            changes[name] = update_config(current, value, source, f"{label}.")
        else:
            changes[name] = _convert(value, hints[name], label, source)
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def suggestion(name: str, known: Iterable[str], where: str = "") -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    if near:
        return f"; did you mean '{where}{near[0]}'?"
    return f"; known here: {', '.join(sorted(known))}"


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain values (str, int, float, bool, list, dict; None where absent) of a dataclass, in field order."""
    return {entry.name: _plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}


def config_to_toml(config: Any) -> str:
    """TOML text of a dataclass of dataclasses, one section each, every key above its documentation as a comment."""
    import tomlkit

    document = tomlkit.document()
    _fill_table(document, config)
    return tomlkit.dumps(document)


def field_documentation(config_type: type) -> dict[str, str]:
    """First sentence(s) documenting each field, from the string under it; "" holds that of the class."""
    import docstring_parser

    parsed = docstring_parser.parse_from_object(config_type)
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
    return {"": parsed.short_description or "", **texts}


def differing_keys(first: Any, second: Any, where: str = "") -> list[str]:
    """Dotted names of the keys whose values differ between two configurations of one type."""
    different = []
    for entry in dataclasses.fields(first):
        one, other = getattr(first, entry.name), getattr(second, entry.name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            different += differing_keys(one, other, f"{where}{entry.name}.")
        elif one != other:
            different.append(f"{where}{entry.name}")
    return different


def _fill_table(table: Any, config: Any) -> None:
    import tomlkit

    documentation = field_documentation(type(config))
    sections = []

    def comment(text: str) -> None:
        for line in textwrap.wrap(text, 100):
            table.add(tomlkit.comment(line))

    comment(documentation[""])
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            sections.append((entry.name, value))
            continue
        comment(documentation.get(entry.name, ""))
        plain = _plain(value)
        table.add(entry.name, ABSENT if plain is None else plain)
    for name, value in sections:
        section = tomlkit.table()
        _fill_table(section, value)
        table.add(name, section)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_mapping(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _convert(value: Any, hint: Any, label: str, source: str) -> Any:
    """`value` from a file as the annotated type; lists become tuples, integers floats, strings paths or enums."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)

    def wrong() -> ConfigError:
        return ConfigError(f"{source}: '{label}' is {value!r}; expected {_describe(hint)}")

    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value == ABSENT):
            return None
        for choice in arguments:
            try:
                return _convert(value, choice, label, source)
            except ConfigError:
                continue
        raise wrong()
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{source}: '{label}' is {value!r}; expected {_describe(hint)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong()
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(item, arguments[0], label, source) for item in value)
        if len(value) != len(arguments):
            raise wrong()
        return tuple(_convert(item, part, label, source) for item, part in zip(value, arguments, strict=True))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise wrong() from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    plainly = isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if hint is Any or plainly:
        return value
    raise wrong()


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(f'"{ABSENT}"' if part is type(None) else _describe(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a list of {_describe(arguments[0])}"
        return f"a list of {len(arguments)} values ({', '.join(_describe(part) for part in arguments)})"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(choice.value) for choice in hint)
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
