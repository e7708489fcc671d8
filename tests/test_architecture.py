"""The table of imports: they go downhill, and few modules import torch.distributed."""

import ast
from pathlib import Path

import pytest

import consensus

PACKAGE = Path(consensus.__file__).parent
MATHEMATICS = {"registry", "tree_sum", "core", "theory"}
FILES = {"atomic_files", "records", "report", "stored_config"}
ALGORITHM = {"delayed", "comm", "server", "gathered", "repeatable", "worker", "algorithm", "replay"}

# Module -> what it may import of ours. A folder speaks for its modules unless one has a line of its
# own; each may import within itself. A new module at the top needs a line here.
MAY_IMPORT = {
    "consensus": {"comm", "core", "coupling", "problem", "records"}
    | {"run.api", "run.checks", "run.config", "run.signals", "run.sinks", "startup"},
    "consensus.registry": set(),
    "consensus.private_api": set(),
    "consensus.startup": set(),
    "consensus.help": {"run.yaml_files", "startup"},
    "consensus.atomic_files": set(),
    "consensus.records": set(),
    "consensus.stored_config": {"private_api"},
    "consensus.tree_sum": set(),
    "consensus.core": {"private_api", "registry", "tree_sum"},
    "consensus.theory": {"core"},
    "consensus.comm": {"tree_sum"},
    "consensus.problem": {"core.flat", "private_api", "registry", "tree_sum"},
    "consensus.server": {"comm", "core"},
    "consensus.gathered": {"comm", "core", "server"},
    "consensus.worker": {"core"},
    "consensus.repeatable": {"comm", "core", "server", "worker"},
    "consensus.elastic": {"comm.rendezvous", "help", "startup"},
    "consensus.algorithm": {"comm", "core", "server", "tree_sum", "worker"},
    "consensus.delayed": {"algorithm", "comm", "core", "server", "worker"},
    "consensus.coupling": {"comm", "core", "repeatable", "server"},
    "consensus.replay": {"algorithm", "delayed", "problem"},
    "consensus.population": {"algorithm", "core", "replay", "worker"},
    "consensus.report": {"records", "stored_config", "atomic_files", "help", "startup"},
    "consensus.run": MATHEMATICS | FILES | ALGORITHM | {"problem", "private_api", "startup"},
    "consensus.run.config_algorithm": {"algorithm", "worker", "core", "run.checks"},
    "consensus.run.config": {"core", "problem", "run.checks", "run.config_algorithm"},
    "consensus.run.checks": {"registry"},
    "consensus.run.overrides": set(),
    "consensus.run.yaml_files": set(),
    "consensus.run.plugins": {"core", "problem", "registry", "run.checks", "run.yaml_files"},
    "consensus.run.compose": {"run.checks", "run.config", "run.overrides", "run.plugins"}
    | {"run.yaml_files", "private_api"},
    "consensus.train": {"comm", "core.scalar_equation", "problem", "run", "private_api"}
    | {"help", "startup"},
    "consensus.sweep": MATHEMATICS
    | FILES
    | ALGORITHM
    | {"problem", "population", "run", "private_api", "help", "startup"},
    "consensus.doctor": {"comm", "run", "core", "problem", "server", "algorithm", "theory"}
    | {"help", "startup"},
}

# Processes communicate in comm/ alone. The doctor checks the network through a key-value store,
# before a process group can be opened.
MAY_IMPORT_DISTRIBUTED = {
    "consensus.comm.rendezvous": "torch.distributed",
    "consensus.comm.process_group": "torch.distributed",
    "consensus.comm.exchanged_sum": "torch.distributed",
    "consensus.comm.members": "torch.distributed",
    "consensus.comm.view_group": "torch.distributed",
    "consensus.comm.user_group": "torch.distributed",
    "consensus.doctor.exchange": "torch.distributed",
}


def violations(package: Path) -> list[str]:
    """Imports of a package tree that the table forbids, one sentence each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = ["consensus", *path.relative_to(package).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if path.name == "utils.py":
            found.append(f"{module}: a helper lives with the idea it serves")
        line = line_of(module)
        if line is None:
            found.append(f"{module} has no line in the table")
            continue
        allowed = {f"consensus.{entry}" for entry in MAY_IMPORT[line]}
        if line != "consensus":
            allowed.add(line)
        for name in imports(path, module, package):
            allowed_there = MAY_IMPORT_DISTRIBUTED.get(module)
            if within(name, "torch.distributed") and not (
                allowed_there and within(name, allowed_there)
            ):
                found.append(f"{module} imports {name}")
            ours = within(name, "consensus")
            if ours and not any(within(name, entry) for entry in allowed):
                found.append(f"{module} imports {name}")
    return found


def line_of(module: str) -> str | None:
    """The most special line of the table for a module."""
    fitting = [line for line in MAY_IMPORT if within(module, line) and line != "consensus"]
    return max(fitting, key=len) if fitting else ("consensus" if module == "consensus" else None)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports(path: Path, module: str, package: Path) -> set[str]:
    """The modules that a file imports, wherever the statement stands; dotted names in full."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = {"torch": "torch"}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                folder = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = folder[: len(folder) - node.level + 1]
                source = ".".join([*base, source] if source else base)
            names |= {origin(source, alias.name, package) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # `torch.distributed.x` works after `import torch` alone
            name = f"{aliases.get(node.value.id)}.{node.attr}"
            names |= {name} & {"torch.distributed"}
    return names


def origin(source: str, name: str, package: Path) -> str:
    """`from source import name`: the module that it reads."""
    path = package.joinpath(*source.split(".")[1:], name)
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    if source == "torch" or (within(source, "consensus") and is_module):
        return f"{source}.{name}"
    return source


def test_imports_go_downhill():
    assert violations(PACKAGE) == []


def test_every_line_of_the_table_is_about_something():
    for line in MAY_IMPORT:
        path = PACKAGE.joinpath(*line.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), line


@pytest.fixture
def tree(tmp_path):
    """The shape of the package without its content."""
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "imported"),
    [
        ("core/flat.py", "import consensus.comm", "consensus.comm"),
        ("core/flat.py", "from consensus import comm", "consensus.comm"),
        ("core/flat.py", "from ..comm import Group", "consensus.comm"),
        ("core/flat.py", "def f():\n    import consensus.run", "consensus.run"),
        ("core/flat.py", "from consensus import POTENTIALS", "consensus"),
        ("core/flat.py", "import torch.distributed as d", "torch.distributed"),
        ("core/flat.py", "from torch import distributed", "torch.distributed"),
        ("core/flat.py", "import torch\ntorch.distributed.x", "torch.distributed"),
        ("core/flat.py", "import torch as t\nt.distributed.x", "torch.distributed"),
        ("run/metrics.py", "from torch.distributed import x", "torch.distributed"),
        ("doctor/speed.py", "import torch.distributed as dist", "torch.distributed"),
        ("theory/composite.py", "import consensus.comm", "consensus.comm"),
        ("registry.py", "from consensus.core import flat", "consensus.core.flat"),
        ("records.py", "import consensus.run.sinks", "consensus.run.sinks"),
        ("report/runs.py", "import consensus.run.sinks", "consensus.run.sinks"),
        ("comm/rendezvous.py", "from consensus.core.flat import x", "consensus.core.flat"),
        ("server.py", "import consensus.worker", "consensus.worker"),
        ("worker.py", "import consensus.comm", "consensus.comm"),
        ("algorithm.py", "import consensus.problem", "consensus.problem"),
        ("coupling/coupling.py", "import consensus.run.trainer", "consensus.run.trainer"),
        ("problem/risk.py", "import consensus.core.updates", "consensus.core.updates"),
        ("problem/risk.py", "import consensus.core", "consensus.core"),
        ("run/config.py", "import consensus.run.plan", "consensus.run.plan"),
        ("run/config.py", "import consensus.comm", "consensus.comm"),
        ("run/trainer.py", "import consensus.train", "consensus.train"),
        ("train.py", "from consensus import sweep", "consensus.sweep"),
    ],
)
def test_the_checker_sees_an_import(tree, file, text, imported):
    (tree / file).write_text(text)
    module = file.removesuffix(".py").replace("/", ".")
    assert violations(tree) == [f"consensus.{module} imports {imported}"]


def test_the_checker_sees_packages_and_files(tree):
    (tree / "__init__.py").write_text("from consensus.run.trainer import x")
    (tree / "core" / "__init__.py").write_text("from ..comm import x")
    (tree / "core" / "utils.py").touch()
    (tree / "misc.py").touch()
    assert violations(tree) == [
        "consensus imports consensus.run.trainer",
        "consensus.core imports consensus.comm",
        "consensus.core.utils: a helper lives with the idea it serves",
        "consensus.misc has no line in the table",
    ]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/layerwise.py", "from consensus.core.flat import x\nfrom . import potentials"),
        ("core/potentials.py", "from consensus.registry import Registry"),
        ("comm/process_group.py", "import torch.distributed as dist"),
        (
            "problem/risk.py",
            "from consensus.core.flat import x\nfrom consensus.problem import data",
        ),
        ("run/plan.py", "from consensus.run.config import x\nimport consensus.comm"),
        ("train.py", "from consensus.run.trainer import Trainer"),
    ],
)
def test_the_checker_allows(tree, file, text):
    (tree / file).write_text(text)
    assert violations(tree) == []


def test_public_names():
    # A name is added here when it is promised to users.
    assert set(consensus.__all__) == {
        "DATASETS",
        "LOSSES",
        "MODELS",
        "PARTITIONS",
        "POTENTIALS",
        "SCHEDULES",
        "SINKS",
        "Config",
        "ConfigError",
        "Coupling",
        "ElasticCoupling",
        "Dataset",
        "GroupError",
        "Layerwise",
        "Loss",
        "Metric",
        "Potential",
        "Profile",
        "Radial",
        "Result",
        "Row",
        "RunInfo",
        "RunStopped",
        "Samples",
        "Separable",
        "Sink",
        "compose",
        "load",
        "train",
        "__version__",
    }
    for name in consensus.__all__:
        assert getattr(consensus, name) is not None
