"""Execution of the Dockerfile without a container engine: in an empty root, by chroot.

    image = build(ROOT, folder)
    image.run("experiment=smoke", volumes={runs: "/srv/consensus/runs"})

It supports the instructions of our Dockerfile and refuses others. Settings of the machine that RUN
needs to reach registries are present during RUN only. It needs root, debootstrap, namespaces and
overlay file systems. A container has its own processes, mounts, /dev/shm and writable layer, which
disappear when its first process ends.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHM = "64m"  # the size of /dev/shm that engines give
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The replacement of the image that FROM names.
RELEASE = "bookworm"
BASE = ("python3", "python3-pip", "ca-certificates")
LIKE_THE_BASE = """
ln -s python3 /usr/bin/python
rm -f /usr/lib/python3.11/EXTERNALLY-MANAGED
cd /tmp
apt-get download -q libpython3.11-dev
dpkg-deb -x libpython3.11-dev_*.deb /
rm libpython3.11-dev_*.deb
"""
DIFFERS = (
    f"base: debootstrap's {RELEASE}, minbase, with Debian's python3.11 and pip (both install to "
    "/usr/local) and the headers of Python, instead of the image that FROM names"
)

# The mounts of one container, in a namespace of its own, then its first process. $1: the root; $2:
# a folder for the layer that it writes to, which is gone with it, or nothing, to write to the root;
# $3: UID:GID; then `OPTIONS WHAT WHERE` for each volume up to `--`, then the command.
ENTER = f"""
root=$1 layer=$2 user=$3; shift 3
if [ -n "$layer" ]; then
    mount -t tmpfs tmpfs "$layer"
    mkdir "$layer/upper" "$layer/work" "$layer/root"
    layers=lowerdir=$root,upperdir=$layer/upper,workdir=$layer/work
    mount -t overlay -o "$layers" overlay "$layer/root"
    root=$layer/root
fi
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
for link in fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    ln -s "/proc/self/${{link#*:}}" "$root/dev/${{link%:*}}"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size={SHM} tmpfs "$root/dev/shm"
while [ "$1" != -- ]; do
    mount -o "$1" "$2" "$root/$3"
    shift 3
done
shift
exec chroot --userspec="$user" --groups= "$root" "$@"
"""


def available() -> bool:
    """Whether scripts/container_test runs these tests, which take minutes and gigabytes."""
    return "CONSENSUS_CONTAINER" in os.environ


# ---- parsing the Dockerfile


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str
    line: int


def parse(text: str) -> list[Instruction]:
    """The instructions, each on one line, without comments."""
    found: list[Instruction] = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not line.strip():
            continue  # also in the middle of an instruction
        start = start if parts else number
        parts.append(line.strip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            name, _, value = " ".join(parts).partition(" ")
            found.append(Instruction(name.upper(), value.strip(), start))
            parts = []
    if parts:
        raise ValueError(f"line {start}: the last instruction does not end")
    return found


def exec_form(value: str) -> list[str]:
    """The words of an ENTRYPOINT, CMD or HEALTHCHECK that starts no shell."""
    words = json.loads(value)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{value}: not a list of strings")
    return words


@dataclass
class Ignore:
    """A .dockerignore: the last pattern that fits a path, or a folder above it, decides."""

    patterns: list[tuple[re.Pattern[str], bool]]
    brought_back: list[re.Pattern[str]]  # the folders at the top in which a pattern with ! may fit

    @classmethod
    def read(cls, text: str) -> "Ignore":
        lines = [line.strip() for line in text.splitlines()]
        kept = [line for line in lines if line and not line.startswith("#")]
        again = [line.removeprefix("!").strip("/") for line in kept if line.startswith("!")]
        return cls(
            [(_glob(line.removeprefix("!")), line.startswith("!")) for line in kept],
            [_glob(pattern.partition("/")[0]) for pattern in again],
        )

    def enters(self, folder: str) -> bool:
        """Whether a file in a folder at the top may be kept: an environment has 50,000 files."""
        return not self.excludes(folder) or any(top.fullmatch(folder) for top in self.brought_back)

    def excludes(self, path: str) -> bool:
        parts = path.split("/")
        tails = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        out = False
        for pattern, again in self.patterns:
            if any(pattern.fullmatch(tail) for tail in tails):
                out = not again
        return out


def _glob(pattern: str) -> re.Pattern[str]:
    expression = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/")):
        ways = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        expression += ways.get(part, re.escape(part))
    return re.compile(expression)


def context(folder: Path) -> list[str]:
    """The files that reach the engine, relative to the folder."""
    ignore = Ignore.read((folder / ".dockerignore").read_text())
    files = []
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = filter(ignore.enters, folders)
        files += [str((Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(file for file in files if not ignore.excludes(file))


def copied(source: str, files: list[str]) -> dict[str, str]:
    """Files of `COPY source .`: paths in the context -> paths below the destination."""
    source = source.rstrip("/")
    if source in files:
        return {source: Path(source).name}
    found = {
        file: file.removeprefix(f"{source}/") for file in files if file.startswith(f"{source}/")
    }
    if not found:
        raise ValueError(f"COPY {source}: not in the context")
    return found


# ---- what it makes


@dataclass
class Image:
    """A root, and what the Dockerfile says of a process in it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def start(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        volumes: Mapping[Path, str] | None = None,
        network: str | None = None,
        building: bool = False,
        **options: Any,
    ) -> "Container":
        """A container with these words as its process.

        Args:
            words: The command; see `run`.
            env: What is added to the environment.
            user: A number, instead of the one of the image.
            volumes: Files and folders of the machine, and where they appear.
            network: A network namespace of `ip netns`, instead of the machine's.
            building: What it writes stays in the image, and the volumes are read only.
            options: Of subprocess.Popen.
        """
        uid = user or self.user
        # An id that /etc/passwd does not know has the group 0 and, without HOME, the home /.
        entry = next((e for e in self._passwd() if e[2] == uid), ["", "", uid, "0", "", "/", ""])
        variables = {"HOME": entry[5]} | self.env | dict(env or {})
        how = "bind,ro" if building else "bind"
        mounts = [(how, str(source), target) for source, target in (volumes or {}).items()]
        layer = self.root.with_name("layer")
        layer.mkdir(exist_ok=True)
        return Container(
            [
                *(("ip", "netns", "exec", network) if network else ()),
                *("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
                *("sh", "-ec", ENTER, "container", str(self.root), "" if building else str(layer)),
                *(f"{uid}:{entry[3]}", *sum(mounts, ()), "--"),
                *("/usr/bin/env", "--ignore-environment", f"--chdir={self.folder}"),
                *(f"{name}={value}" for name, value in variables.items()),
                *words,
            ],
            **options,
        )

    def run(self, *arguments: str, **options: Any) -> "Container":
        """As `docker run IMAGE ARGUMENTS`: the entrypoint, with CMD if there are no arguments."""
        return self.start(*self.entrypoint, *(arguments or self.command), **options)

    def _passwd(self) -> list[list[str]]:
        path = self.root / "etc/passwd"
        return [line.split(":") for line in path.read_text().splitlines()]


class Container:
    """A process in an image, the first one of its namespace, as an engine starts it."""

    def __init__(self, command: list[str], **options: Any):
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, **options)

    def signal(self, number: signal.Signals) -> None:
        """To the first process in the container."""
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), number)

    def finish(self, timeout: float = 300.0) -> tuple[int, str, str]:
        """The exit code and what it wrote; whatever happens, nothing of it is left."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()  # and with it, by --kill-child, the container
            self.process.wait()
        return self.process.returncode, out, err


class Builder:
    """Carries out one instruction after another."""

    def __init__(self, source: Path, image: Image):
        self.source, self.image = source, image
        self.files = context(source)

    def carry_out(self, instruction: Instruction) -> None:
        method = getattr(self, f"_{instruction.name.lower()}", None)
        if method is None:
            raise ValueError(f"line {instruction.line}: {instruction.name} is not known here")
        method(instruction.value)

    def _from(self, value: str) -> None:
        """The base is there already."""

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, equals, text = word.partition("=")
            if not equals or "$" in text:
                raise ValueError(f"ENV {word}: only NAME=VALUE, without variables, is known here")
            self.image.env[name] = text

    def _workdir(self, value: str) -> None:
        self.image.folder = os.path.join(self.image.folder, value)
        self._inside(self.image.folder).mkdir(parents=True, exist_ok=True)

    def _user(self, value: str) -> None:
        self.image.user = value

    def _entrypoint(self, value: str) -> None:
        self.image.entrypoint = exec_form(value)

    def _cmd(self, value: str) -> None:
        self.image.command = exec_form(value)

    def _healthcheck(self, value: str) -> None:
        _, _, command = value.partition("CMD ")
        self.image.health = exec_form(command)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        if any(source.startswith("--") for source in sources):
            raise ValueError(f"COPY {value}: options are not known here")
        folder = self._inside(os.path.join(self.image.folder, target))
        for source in sources:
            for file, name in copied(source, self.files).items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.source / file, path)  # with its mode; the owner is root

    def _run(self, value: str) -> None:
        borrowed, env = borrow()
        made = []
        for path in borrowed:
            inside = self._inside(path)
            if not inside.exists():
                made.append(inside)
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.mkdir() if Path(path).is_dir() else inside.touch()
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", self.image.root / "etc" / name)
        volumes = {Path(path): path for path in borrowed}
        container = self.image.start(
            "/bin/sh", "-c", value, env=env, volumes=volumes, building=True
        )
        code, _, _ = container.finish(timeout=3600)
        for path in made:
            path.rmdir() if path.is_dir() else path.unlink()
        if code:
            raise RuntimeError(f"RUN {value}: exit code {code}")

    def _inside(self, path: str) -> Path:
        return self.image.root / path.lstrip("/")


def borrow() -> tuple[list[str], dict[str, str]]:
    """By what this machine reaches registries: files and folders, and variables.

    pip's and uv's variables, those of proxies and certificates, pip's configuration, and what of
    this machine's files these name.
    """
    ours = re.compile(r"(PIP|UV|SSL_CERT)_\w+|(http|https|no|all)_proxy", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if ours.fullmatch(name)}
    config = Path("/etc/pip.conf")
    texts = [*env.values(), config.read_text() if config.exists() else ""]
    named = re.findall(r"(?:^|[\s=,]|file://)(/[^\s,]+)", "\n".join(texts))
    paths = {path for path in [str(config), *named] if Path(path).exists()}
    inner = {path for path in paths if any(path.startswith(f"{other}/") for other in paths)}
    return sorted(paths - inner), env


def build(source: Path, folder: Path) -> Image:
    """Make the base, then do what the Dockerfile says."""
    image = Image(folder / "root")
    say(DIFFERS)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(BASE)}", RELEASE]
    with (folder / "debootstrap.log").open("w+") as log:
        done = subprocess.run(
            ["unshare", "--mount", *command, str(image.root)], stdout=log, stderr=log, check=False
        )
        if done.returncode:
            log.seek(0)
            raise RuntimeError(f"{shlex.join(command)}:\n{log.read()[-2000:]}")
    builder = Builder(source, image)
    builder.carry_out(Instruction("RUN", LIKE_THE_BASE.strip().replace("\n", " && "), 0))
    before = megabytes(image.root)
    for instruction in parse((source / "Dockerfile").read_text()):
        started = time.monotonic()
        say(f"{instruction.name} {instruction.value}")
        builder.carry_out(instruction)
        took, size = time.monotonic() - started, megabytes(image.root)
        if size != before or took > 1:
            say(f"  {took:.0f} s, {size - before:+} MB")
        before = size
    return image


def megabytes(path: Path) -> int:
    done = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=MB", path],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout.split("MB")[0])


def say(line: str) -> None:
    print(f"== {line}", flush=True)
