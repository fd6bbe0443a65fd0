"""Figures of the sources: python tests/figures.py

Files, lines, functions and how long they are, comments, `Any`, modules beside the folders, names of modules that occur twice.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "platform" / "steerlab"
LONG = 300
"""Lines beyond which a file is named."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def comments(text: str) -> int:
    """Count the comments that are for people."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    told = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not comment.startswith(("# type:", "# noqa", "# fmt:")) for comment in told)


def main() -> None:
    """Print the figures."""
    texts = {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: text.count("\n") for path, text in texts.items()}
    lengths = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items()
        for node in functions(tree)
        if node.end_lineno is not None
    }
    told = sum(map(comments, texts.values()))
    methods = {path: text for path, text in texts.items() if path.parts[0] == "methods"}
    in_methods = sum(map(comments, methods.values()))
    lines_of_methods = sum(lines[path] for path in methods)
    anys = sum(isinstance(node, ast.Name) and node.id == "Any" for tree in trees.values() for node in ast.walk(tree))
    loose = [path.name for path in texts if len(path.parts) == 1 and not path.name.startswith("__")]
    names = Counter(path.stem for path in texts if path.stem != "__init__")
    twice = sorted(name for name, number in names.items() if number > 1)
    long = sorted((path for path in lines if lines[path] > LONG), key=lambda path: -lines[path])
    longest = sorted(lengths, key=lambda name: -lengths[name])[:5]
    total = sum(lines.values())
    print(f"{len(texts)} files, {total} lines, {len(lengths)} functions")
    print(f"functions: mean {sum(lengths.values()) / len(lengths):.1f} lines, the longest:")
    print("".join(f"  {name} {lengths[name]}\n" for name in longest), end="")
    print(f"comments: {told}, {100 * told / total:.1f} for 100 lines; in methods {100 * in_methods / lines_of_methods:.1f}")
    print(f"Any: {anys}")
    print(f"modules beside the folders: {len(loose)} {' '.join(loose)}")
    print(f"names of modules that occur twice: {len(twice)} {' '.join(twice)}")
    print(f"files of more than {LONG} lines: {len(long)}")
    print("".join(f"  {path} {lines[path]}\n" for path in long), end="")


if __name__ == "__main__":
    main()
