"""Load Python files of the user that a job names: `method: {file: my_method.py}`, `{task: "file:my_task.py"}`.

In keys a file is represented by its SHA-256, so that renaming or moving it changes no key. Workers get the text of the file
with each request (`codes_in`, `receive`), so it need not be on their disks. Only this one file is sent: it can import installed
packages, but no other file of the user.
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
"""Prefix of a reference to code by its content, in keys and in requests to workers."""


class Code(NamedTuple):
    """A file as this or another process read it."""

    path: str
    """Absolute path at which it was read."""
    sha256: str
    text: str

    @property
    def reference(self) -> str:
        """The reference by content, as keys contain it."""
        return f"{BY_DIGEST}{self.sha256}"


_LONGEST_PATH = 4096
_codes: dict[str, Code] = {}
"""Code that this process has read or received: by reference, and the last version by path."""
_received: dict[str, Code] = {}
"""Code received from another process, by path. It is used instead of the file that is at this path now."""
_modules: dict[str, ModuleType] = {}
"""Modules by the SHA-256 of their file: each file is run once per process."""


def read(name: str) -> Code:
    """Return the code that a job names, by path or by reference.

    Raises:
        JobError: the file does not exist or is not a text, or this process has no code with the reference.
    """
    if name.startswith(BY_DIGEST):
        if name not in _codes:
            raise JobError(f"{name}: this names code by its content, which is not known here; give the path of the file")
        return _codes[name]
    path = absolute(name)
    # A worker may run on a node where another file is at this path, or no file.
    if path in _received:
        return _received[path]
    try:
        # The size is limited, because the path may be a pipe or a device.
        text = files.read_text(Path(path), python_files.LONGEST)
    except FileNotFoundError:
        raise JobError(f"{path}: the file does not exist") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not a regular file, too large, not UTF-8, or a path that cannot exist
        raise JobError(str(error)) from None
    # The text is stored, so that the same text is hashed, run and sent even if the file changes.
    code = Code(path, hashlib.sha256(text.encode()).hexdigest(), text)
    _codes[code.reference] = _codes[path] = code
    return code


def absolute(name: str) -> str:
    """Return the absolute path; a relative one starts from the current folder. Raises JobError if no path can be so named."""
    try:
        return str(Path(name).expanduser().absolute())
    except (RuntimeError, ValueError):
        raise JobError(f"{name!r:.200} is not a path") from None


def module(code: Code) -> ModuleType:
    """Return the module of a file, which is run once per process. Raises JobError with the failing lines of the file."""
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
    """Explain, for the message about a failed import, that a file next to this one is not sent to the workers; else ''."""
    beside = {other.stem for other in path.parent.glob("*.py")} if path.parent.is_dir() else set()
    # The message is compared, because the error itself was raised inside the user's file.
    missing = [name for name in beside if f"ModuleNotFoundError: No module named {name!r}" in message]
    return f"; {missing[0]}.py is beside it, but only this file is sent to the workers: merge the two files" if missing else ""


class _Portable(Generic[_P, _T]):
    """A function or class of a user's file that can be pickled: as the text of the file and the name of the function.

    pickle stores only the module's name, and the module of a user's file cannot be imported in another process.
    """

    def __init__(self, code: Code, name: str) -> None:
        self._code, self._name = code, name

    def __call__(self, *arguments: _P.args, **named: _P.kwargs) -> _T:
        return getattr(module(self._code), self._name)(*arguments, **named)


def portable(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that can be pickled for other processes; one from a user's file carries the file's text with it.

    Raises:
        JobError: the function comes from a user's file but is not defined at its top level, so no other process can find it.
    """
    # For a partial or a bound method, the function inside shows which file it is from.
    inner = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
    where = getattr(inner, "__module__", None)
    code = next((code for code in _codes.values() if _name(code) == where), None)
    if code is None:
        return function
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier() or getattr(module(code), name, None) is not function:
        raise JobError(
            f"{code.path}: a preparation is made by a function or a class at the top of the file, not by {function!r:.200}"
        )
    return _Portable(code, name)


def codes_in(tree: object) -> tuple[Code, ...]:
    """Return the code that a job or a stage's parameters name, by path or reference, so that a worker can `receive` it."""
    # Every text of the tree is looked up, because methods and tasks may have fields of any name that hold a file.
    codes = (_codes.get(text) or _codes.get(_path_in(text)) for text in _texts(tree))
    return tuple(dict.fromkeys(code for code in codes if code is not None))


def _path_in(text: str) -> str:
    """Return the absolute path in a text `PATH` or `file:PATH`; '' if the text cannot be a path."""
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
    """Use code that another process has read for its path, instead of the file that is at this path now."""

    for code in map(Code._make, codes):
        _codes[code.reference] = _codes[code.path] = _received[code.path] = code


@contextmanager
def held() -> Iterator[None]:
    """Use the files as they were read until the block ends, even if they are edited meanwhile.

    A sweep runs for hours: all of its trials have to use the same code.
    """
    # The previous state is restored afterwards, because the process may run other jobs later.
    before = dict(_received)
    _received.update({code.path: code for name, code in _codes.items() if name == code.path})
    try:
        yield
    finally:
        _received.clear()
        _received.update(before)
