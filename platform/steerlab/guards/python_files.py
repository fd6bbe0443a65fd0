"""Run Python files of the user: a search space, a method or a task. An error in one is reported by the lines of that file."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

LONGEST = 2**20
"""Largest file that is run, in bytes."""


class PythonFileError(ValueError):
    """A file of the user raised an error; the message shows the lines of the file, and the error."""


def _printable(error: BaseException) -> str:
    return str(error)[:500].encode("utf-8", "backslashreplace").decode()


def run(content: bytes, path: Path, name: str, is_own: Callable[[Path], bool]) -> ModuleType:
    """Run the content of a file as a module.

    Args:
        content: Source code; the file may have changed on disk since it was read.
        path: Where it was read, for `__file__` and messages.
        name: Name under which the module can be imported from then on.
        is_own: Returns whether lines of a file are shown in messages: those of the user's files, not those of libraries.

    Raises:
        PythonFileError: the file has a syntax error, or raises an error or SystemExit.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before running it: dataclasses and pydantic look up the module of a class by its name
    try:
        # Without dont_inherit, this module's `from __future__ import annotations` would turn the file's annotations into texts.
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except SyntaxError as error:
        del sys.modules[name]
        where = f"{error.filename or path}:{error.lineno or 1}"
        raise PythonFileError(f"{where}: {(error.text or '').strip()[:200]}\n  SyntaxError: {error.msg}") from None
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if is_own(Path(frame.filename))]
        lines = "".join(f"{frame.filename}:{frame.lineno}: {frame.line or ''}\n" for frame in own) or f"{path}\n"
        raise PythonFileError(f"{lines}  {type(error).__name__}: {_printable(error)}") from None
    return module
