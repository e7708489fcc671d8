"""Triton's interpreter without its repeated search of triton.language.

Each call of a device function lists all attributes of triton.language to replace its builtins,
which takes most of the time of a small kernel. Once in a launch is enough: the builtins are
restored at its end.
"""

from types import FunctionType
from typing import Any

import pytest
from triton.runtime import interpreter


def search_once_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    patch, run = interpreter._patch_lang, interpreter.InterpretedFunction.run
    patched: set[int] = set()  # the namespaces of this launch

    def patch_once(function: FunctionType) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
