import time

import pytest

from consensus.comm import Launch, LaunchError

SIZES = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}


def test_launch_reads_what_torchrun_sets(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Launch.from_environment() == Launch(rank=5, size=8, local_rank=1, local_size=4)
    for name, value, message in (
        ("RANK", "a", "`RANK` is a; allowed: a whole number"),
        ("RANK", "8", "`RANK` is 8; allowed: below WORLD_SIZE = 8"),
        ("LOCAL_RANK", "4", "`LOCAL_RANK` is 4; allowed: below LOCAL_WORLD_SIZE = 4"),
        ("TORCHELASTIC_RESTART_COUNT", "x", "`TORCHELASTIC_RESTART_COUNT` is x; allowed: a whole"),
        ("MASTER_PORT", None, "`MASTER_PORT` is not set"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(LaunchError, match=message):
                Launch.from_environment()
    for name in SIZES:
        monkeypatch.delenv(name)
    assert Launch.from_environment() == Launch()


TASKS = ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_another_launcher_without_ranks_are_refused(monkeypatch, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of the allocation; a single task may run in it
    monkeypatch.setenv(name, "1")
    assert Launch.from_environment() == Launch()
    monkeypatch.setenv(name, "2")
    with pytest.raises(LaunchError, match=f"`{name}` is 2 .* launch/slurm.sbatch .* WORLD_SIZE=1"):
        Launch.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Launch.from_environment() == Launch()


def test_the_name_of_a_launch_is_its_id_or_its_torchrun_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert Launch.from_environment() == Launch(name="mine", restart=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    first, second = Launch.from_environment(), Launch.from_environment()
    assert first == second
    assert first.name.count(":") == 2


@pytest.mark.parametrize(
    ("rank", "size", "block"), [(0, 1, [0, 1, 2, 3]), (1, 2, [2, 3]), (3, 4, [3])]
)
def test_workers_are_assigned_in_blocks(rank, size, block):
    assert list(Launch(rank, size).block(4)) == block


def test_the_start_of_the_parent():
    launch = Launch.from_environment()
    assert 0 < launch.started <= time.time() + 1
