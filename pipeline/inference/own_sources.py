"""From one of our modules to copies of it and of all of ours that it imports, as one flat folder.

The text of the sources stays; only `from pipeline.a.b import` becomes `from .tandem_a_b import`.
"""

import ast
import re
from pathlib import Path

from pipeline.errors import PipelineError

PACKAGE = "pipeline"
ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(rf"^(\s*)from {PACKAGE}\.([\w.]+) import", re.MULTILINE)


def flat_sources(module: str) -> dict[str, str]:
    """Give the files that a module needs, itself first.

    Args:
        module: Dotted name below the package, such as `inference.modeling_tandem`.

    Returns:
        Text by file name: the module under its own last name, others as `tandem_A_B.py`.

    Raises:
        PipelineError: A source imports ours in a way that cannot be rewritten.
    """
    sources = {f"{module.rpartition('.')[2]}.py": _rewrite(module)}
    waiting = _imports(module)
    while waiting:
        name = waiting.pop()
        if _file_name(name) not in sources:
            sources[_file_name(name)] = _rewrite(name)
            waiting += _imports(name)
    return sources


def _read(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


def _imports(module: str) -> list[str]:
    """List our modules that one imports, at any depth of its syntax tree."""
    found = []
    for node in ast.walk(ast.parse(_read(module))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE:
                if not rest or isinstance(node, ast.Import) or not _is_file(rest):
                    raise PipelineError(
                        f"{module} imports {name} as a package; write `from {PACKAGE}.a.b import "
                        "Name`, or it cannot be exported"
                    )
                found.append(rest)
    return found


def _is_file(module: str) -> bool:
    return (ROOT / (module.replace(".", "/") + ".py")).is_file()


def _file_name(module: str) -> str:
    return f"tandem_{module.replace('.', '_')}.py"


def _rewrite(module: str) -> str:
    def to_sibling(match: re.Match[str]) -> str:
        return f"{match[1]}from .{_file_name(match[2]).removesuffix('.py')} import"

    return IMPORT.sub(to_sibling, _read(module))
