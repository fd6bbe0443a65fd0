"""A Python file of the user's own that a job names: `method: {file: my_method.py}`, `{task: "file:my_task.py"}`.

In a key such a file is its SHA-256, so that its name and its place change nothing. To the workers its text travels with the
request (`codes_in`, `receive`): nothing has to lie on their disks. One file is shipped, so it imports installed packages alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Generic, NamedTuple, ParamSpec, TypeVar

from steerlab.guards import files, python_files
from steerlab.job.typed import JobError

_P = ParamSpec("_P")
_T = TypeVar("_T")

BY_DIGEST = "sha256:"
"""How a reference begins that names code by its content: in keys, and in what workers are asked for."""


class Code(NamedTuple):
    """A file as it was read once."""

    path: str
    """Where it lay, absolute, for messages."""
    sha256: str
    text: str

    @property
    def reference(self) -> str:
        """What stands for it in keys."""
        return f"{BY_DIGEST}{self.sha256}"


_LONGEST_PATH = 4096
_known: dict[str, Code] = {}
"""What this process has read or received, by reference, and what it last read, by path."""
_received: dict[str, Code] = {}
"""What another process has read, by path: that is meant here too, whatever lies at the path now."""
_modules: dict[str, ModuleType] = {}


def read(name: str) -> Code:
    """Return the code that a job names by a path, or by a reference.

    Raises:
        JobError: there is no such file, or it is no text; or this process knows no code of that reference.
    """
    if name.startswith(BY_DIGEST):
        if name not in _known:
            raise JobError(f"{name}: this names code by its content, which the job does not hold; give the path of the file")
        return _known[name]
    path = absolute(name)
    if path in _received:
        return _received[path]
    try:
        text = files.read_text(Path(path), python_files.LONGEST)
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # no file, too large, no text, no path
        raise JobError(str(error)) from None
    code = Code(path, hashlib.sha256(text.encode()).hexdigest(), text)
    _known[code.reference] = _known[path] = code
    return code


def absolute(name: str) -> str:
    """Return an absolute path; a relative one starts from the folder in which the command runs. Raises JobError."""
    try:
        return str(Path(name).expanduser().absolute())
    except (RuntimeError, ValueError):
        raise JobError(f"{name!r:.200} is no path") from None


def module(code: Code) -> ModuleType:
    """Return the module of a file, run once a process. Raises JobError with the file's own lines where it fails."""
    if code.sha256 not in _modules:
        path = Path(code.path)
        try:
            _modules[code.sha256] = python_files.run(code.text.encode(), path, _name(code), lambda file: file == path)
        except python_files.PythonFileError as error:
            raise JobError(f"{error}{_hint(str(error), path)}") from None
    return _modules[code.sha256]


def _name(code: Code) -> str:
    return f"steerlab_own_{code.sha256[:32]}"


def _hint(message: str, path: Path) -> str:
    """Say why a file beside this one cannot be imported."""
    beside = {other.stem for other in path.parent.glob("*.py")} if path.parent.is_dir() else set()
    missing = [name for name in beside if f"ModuleNotFoundError: No module named {name!r}" in message]
    return f"; {missing[0]}.py lies beside it, but this file alone goes to the workers: make both one" if missing else ""


class _Portable(Generic[_P, _T]):
    """A function or a class of a file, which is pickled as the text of the file and its name there."""

    def __init__(self, code: Code, name: str) -> None:
        self._code, self._name = code, name

    def __call__(self, *arguments: _P.args, **named: _P.kwargs) -> _T:
        return getattr(module(self._code), self._name)(*arguments, **named)


def portable(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that other processes can be sent: one of the user's own file takes the file along.

    Raises:
        JobError: it is of such a file, and no function or class at the top of it, which alone can be found again elsewhere.
    """
    inner = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
    where = getattr(inner, "__module__", None)
    of = next((code for code in _known.values() if _name(code) == where), None)
    if of is None:
        return function
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier() or getattr(module(of), name, None) is not function:
        raise JobError(
            f"{of.path}: a preparation is made by a function or a class at the top of the file, not by {function!r:.200}"
        )
    return _Portable(of, name)


def codes_in(tree: object) -> tuple[Code, ...]:
    """Return the code that a job or a stage's parameters name, by path or reference, for another process to `receive`."""
    found = (_known.get(text) or _known.get(_path_in(text)) for text in _texts(tree))
    return tuple(dict.fromkeys(code for code in found if code is not None))


def _path_in(text: str) -> str:
    """Return the absolute path that a text is, or names as `file:PATH`; nothing is a path that cannot be one."""
    try:
        return absolute(text.removeprefix("file:")) if len(text) < _LONGEST_PATH else ""
    except JobError:
        return ""


def _texts(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def receive(codes: Iterable[Code]) -> None:
    """Take code that another process has read: it is what a job's path means here, whatever lies there now."""
    for code in map(Code._make, codes):
        _known[code.reference] = _known[code.path] = _received[code.path] = code


@contextmanager
def held() -> Iterator[None]:
    """Let the files that were read mean what they held until the block ends, whoever edits them meanwhile."""
    before = dict(_received)
    _received.update({code.path: code for name, code in _known.items() if name == code.path})
    try:
        yield
    finally:
        _received.clear()
        _received.update(before)
