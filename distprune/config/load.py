"""From a YAML file and `section.key=value` words to a `Config`, with every fault in one message."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distprune.config.faults import combination_faults
from distprune.config.schema import Config
from distprune.errors import ConfigError

INSTEAD_OF = {"steps": "epochs", "epochs": "steps"}


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and 2:4 a text (YAML 1.2, section 10.3.2), not a text and 124 as in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _first in "123456789":
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$")))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: a YAML file.
        overrides: `section.key=value` words, the value in YAML; later ones win.

    Raises:
        ConfigError: lists every unknown key, wrong value and impossible combination.
    """
    expected = "a configuration is a mapping of sections such as model, data, prune"
    values, lines, faults = read_mapping(Path(path), "the configuration", expected)
    faults += [fault for word in overrides if (fault := _override(values, lines, word))]
    _read_table(values)
    config, wrong = None, set[str]()
    while config is None:
        try:
            config = Config.model_validate(values)
        except ValidationError as error:
            problems = [p for p in error.errors() if p["type"] != "missing" or _key(p["loc"]) not in wrong]
            faults += [_describe(problem, lines, str(path)) for problem in problems]
            wrong |= {_key(problem["loc"]) for problem in problems}
            # Take out what is at fault and look again, so that combinations of the rest are checked too.
            if not problems or sum(_remove(values, problem) for problem in problems) < len(problems):
                break
    for fault in combination_faults(config) if config is not None else []:
        key, _, _ = fault.partition(":")
        if not any(name == key or name.startswith(f"{key}.") for name in wrong):
            faults.append(f"{_where(key, lines, str(path))}{fault}")
    if faults or config is None:
        raise ConfigError(*dict.fromkeys(faults), source=str(path))
    if config.run.dir is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": f"runs/{Path(path).stem}"})})
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, width=120)


def json_schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def read_mapping(path: Path, what: str, expected: str) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Read a YAML file.

    Args:
        path: the file.
        what: what it is, for the message where it cannot be read.
        expected: what to say where it holds no mapping.

    Returns:
        Its values, the line of each dotted key, and faults: keys that are given twice.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read {what} {path}: {reason}{hint}") from None
    try:
        tree = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = [getattr(error, name, None) for name in ("context", "problem")] if mark else [str(error)]
        what = " ".join(" ".join(part for part in told if part).split())
        raise ConfigError(f"not valid YAML, {where}{what}", source=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError(expected, source=str(path))
    lines: dict[str, int] = {}
    twice, again = [], set[str]()
    for key, line in _key_lines(tree):
        if key in lines and key.rpartition(".")[0] not in again:
            again.add(key)
            twice.append(f"{path}:{line}, {key}: is given twice, before in line {lines[key]}; leave one out")
        lines.setdefault(key, line)
    return values, lines, twice


def _read_table(values: dict[str, Any]) -> None:
    """Put the table that prune.allocation names in its place, so that a run keeps to it though the file changes."""
    prune = values.get("prune")
    name = prune.get("allocation") if isinstance(prune, dict) else None
    if isinstance(name, str) and name.endswith((".yaml", ".yml")):
        expected = "a table is a mapping of layers to sparsities, such as {'*': 0.9}"
        table, _, faults = read_mapping(Path(name), "the table of prune.allocation", expected)
        if faults:
            raise ConfigError(*faults, source=name)
        prune["allocation"] = table  # type: ignore[index]


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _override(values: dict[str, Any], lines: dict[str, int], word: str) -> str | None:
    """Put one `section.key=value` into `values`, or return what is wrong with it. Steps replace epochs."""
    key, equals, text = word.partition("=")
    if not equals or not key or word.startswith("-"):
        return f"{word!r} on the command line: expected section.key=value, such as run.seed=1"
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        return f"{key} on the command line: {text!r} is not valid YAML"
    *sections, last = key.split(".")
    place = values
    for depth, section in enumerate(sections, 1):
        if place.get(section) is None:
            place[section] = {}
            lines[".".join(sections[:depth])] = 0
        place = place[section]
        if not isinstance(place, dict):
            return f"{key} on the command line: {section} is a single value, not a section"
    place[last] = value
    lines.update({name: 0 for name in lines if name.startswith(f"{key}.")})
    lines.update(dict.fromkeys(_dotted(value, key), 0))
    place.pop(INSTEAD_OF.get(last, ""), None)
    return None


def _dotted(value: Any, key: str) -> Iterator[str]:
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _dotted(inner, f"{key}.{name}")


def _describe(problem: Any, lines: dict[str, int], source: str) -> str:
    location = tuple(problem["loc"])
    key = _key(location)
    if problem["type"] == "extra_forbidden":
        known, others = _fields(location[:-1]), _owners(location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        instead = f"did you mean {near[0]!r}?" if near and not others else f"known here: {', '.join(known)}"
        text = f"unknown key; {f'it is one of {others}; ' if others else ''}{instead}"
    elif problem["type"] == "missing":
        text = "is missing; it has no default"
    elif problem["type"] == "union_tag_invalid":
        text = f"{problem['ctx']['tag']!r} is not one of {problem['ctx']['expected_tags']}"
    else:
        text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
    return f"{_where(key, lines, source)}{key}: {text}"


def _where(key: str, lines: dict[str, int], source: str) -> str:
    line = lines.get(key)
    if line == 0:
        return "command line, "
    return f"{source}:{line}, " if line else ""


def _key(location: Sequence[str | int]) -> str:
    """The dotted key of an error location, without the names pydantic gives to the arms of a union."""
    parts: list[str] = []
    models: list[type[BaseModel]] = [Config]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = _models(fields[0].annotation)
        elif isinstance(part, str) and (part in _tags(models) or part.startswith(("(", "[key]", "str", "dict["))):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _fields(location: Sequence[str | int]) -> list[str]:
    """The keys known at `location`."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = _models(fields[0].annotation) if fields else [m for m in models if part in _tags([m])] or models
    return [name for model in models for name in model.model_fields]


def _owners(location: Sequence[str | int]) -> str:
    """Which other arms of a union at that place know the last key, by the values that tell arms apart."""
    models: list[type[BaseModel]] = [Config]
    for part in location[:-1]:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = _models(fields[0].annotation) if fields else models
    return ", ".join(
        sorted(_tags([m for m in models if location[-1] in m.model_fields]) - {m.__name__ for m in models})
    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for arm in get_args(annotation) for model in _models(arm)))


def _tags(models: Sequence[type[BaseModel]]) -> set[str]:
    """What pydantic may call arms of a union: class names, and values of the keys that tell the arms apart."""
    fields = [m.model_fields[key] for m in models for key in ("name", "task") if key in m.model_fields]
    literals = [field.annotation for field in fields if get_origin(field.annotation) is Literal]
    return {model.__name__ for model in models} | {value for literal in literals for value in get_args(literal)}


def _remove(values: dict[str, Any], problem: Any) -> bool:
    """Take the value at fault out of `values`; False where there is none to take."""
    place: Any = values
    *parents, last = _key(tuple(problem["loc"])).split(".")
    for part in parents:
        if isinstance(place, list):
            return False
        place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict) and last in place:
        del place[last]
        return True
    return False
