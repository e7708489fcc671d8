"""First steps of every command: what holds during imports, and standard streams.

It imports nothing that takes time.
"""

import gc
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""The signals that request a stop, unless they are ignored."""


def heeded() -> list[signal.Signals]:
    """The stop signals that this process does not ignore, as nohup and background jobs ask."""
    return [number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN]


def version() -> str:
    """The version of the package."""
    from importlib import metadata

    try:
        return metadata.version("consensus-training")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def is_program(module: str, command: str) -> bool:
    """Whether the module with this `__name__` is the program, and not imported by another one.

    That is `python -m consensus.train`, or the script consensus-train.
    """
    return module == "__main__" or Path(sys.argv[0]).name == command.replace(".", "-")


def begin_imports(module: str, command: str) -> None:
    """Answer stop signals with one line and an exit code, until others handle them.

    Python's garbage collector pauses until `end_imports`: an import leaves no garbage, and torch
    makes so many objects that to look at all of them again and again takes a tenth of its time.

    Call it before the imports, with the `__name__` of the module. It has no effect unless the
    module is the program.
    """
    if not is_program(module, command):
        return
    gc.disable()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            line = f"{command}: {name}: stopped outside of the training; nothing was to be saved\n"
            with suppress(OSError):
                os.write(2, line.encode())
        os._exit(128 + number)

    for number in heeded():
        signal.signal(number, stop)


def end_imports() -> None:
    """Let the garbage collector continue after the imports, without the objects that they made."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def announce(module: str, command: str) -> None:
    """Print one line to a terminal, which stays blank during the imports and the composition.

    It has no effect unless the module is the program, and on ranks above 0.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if terminal and is_program(module, command) and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(f"{command}: loading torch and the config ...", file=sys.stderr, flush=True)


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt at SIGINT, SIGTERM and SIGHUP, unless they are ignored."""
    for number in heeded():
        if number != signal.SIGUSR1:
            signal.signal(number, signal.default_int_handler)


def protect_streams(command: str) -> None:
    """Replace standard output and error by streams that never fail.

    A reader that goes away (`| head -1`), a full device or a closed descriptor costs the rest of
    the output and one line on standard error, which begins with the name of the command. Repeated
    calls have no effect.
    """
    for descriptor in (0, 1, 2):  # a closed one would be reused by the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may not be encodable
        if not isinstance(stream, _Protected):
            setattr(
                sys, name, _Protected(stream, f"{command}: no more output" * (name == "stdout"))
            )


class _Protected:
    """A text stream that drops what it cannot write. All else is passed on to the stream.

    `notice` begins the line on standard error after the first failure; "": no line.
    """

    def __init__(self, stream: TextIO, notice: str) -> None:
        self._stream, self._notice = stream, notice

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BlockingIOError:  # the reader is slow, and the descriptor does not wait
            pass
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send the rest to the null device: the buffer of the stream is written again at exit."""
        notice, self._notice = self._notice, ""
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if notice:
            print(f"{notice} ({error.strerror}); the work goes on", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:  # of the interface of a text stream
        return iter(self._stream)
