"""YAML files, in which each key of an object may appear once. JSON is YAML, so a file of either kind can be read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.json_file import read_json
from fm9g.io.regular_file import check_regular

YAML_SUFFIXES = (".yaml", ".yml")
_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_FLOAT_PATTERN = re.compile(
    r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_MAX_BYTES = 1 << 20  # a configuration that a person wrote; anchors could make more of it


def read_config(path: Path) -> Any:
    """The content of a configuration file: YAML if its name ends in .yaml or .yml, else JSON.

    Raises UserError with file, line and column for a mistake, and for a repeated key.
    """
    return read_yaml(path) if path.suffix.lower() in YAML_SUFFIXES else read_json(path)


def read_config_object(path: Path) -> dict[str, Any]:
    """The same for a file that contains one object. An empty YAML file is an empty object."""
    content = read_config(path)
    if content is None and path.suffix.lower() in YAML_SUFFIXES:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected keys and values, such as lr: 1e-4")
    return {str(key): value for key, value in content.items()}  # YAML takes the words on and off for truth values


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises UserError as `read_config` does."""
    import yaml  # here, since most commands need none

    register_input(path)
    check_regular(path, _MAX_BYTES)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = yaml.compose(text, Loader=_loader())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: is not UTF-8 text; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}, line {line}: contains the character U+{error.character:04X}; remove it") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: its values are nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    _check(tree, path)
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from None
    except (ValueError, LookupError, AttributeError):  # PyYAML's constructors expect what the tag says
        raise UserError(
            f"{path}: cannot be read: a number is too long, or a tag such as !!int does not fit its value; remove it"
        ) from None


@cache
def _loader() -> Any:
    """The safe loader, with the plain numbers of YAML 1.2: in 1.1, 010 is 8 and 1:30 is 90. Dates stay text, too."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.items()
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, known in resolvers
    }
    loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"])
    loader.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, [*"-+.0123456789"])
    return loader


def _syntax_error(path: Path, error: Any) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    tab = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
    return UserError(f"{path}{where}: not YAML: {error.problem or error.context}{tab}")


def _check(node: Any, path: Path) -> None:
    """Raises UserError for a repeated key, and for an alias: a small file of them can stand for a huge one."""
    import yaml

    seen_nodes: set[int] = set()

    def visit(node: Any) -> None:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.CollectionNode) and id(node) in seen_nodes:
            raise UserError(f"{path}, line {line}: anchors and aliases of YAML are not supported; write the value out")
        seen_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{path}, line {key.start_mark.line + 1}: a key must be a word")
                if key.value in keys:
                    raise UserError(
                        f"{path}, line {key.start_mark.line + 1}: key {key.value!r} is given twice; keep one of them"
                    )
                keys.add(key.value)
                visit(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item)

    if node is not None:
        visit(node)
