"""The SLURM jobs of a sweep, with stand-ins for squeue and scancel."""

from consensus.sweep.slurm_queue import cancel, jobs_in_queue


def test_jobs_of_this_sweep_are_found_and_cancelled(queue, tmp_path):
    assert jobs_in_queue(tmp_path / "many") == ["8", "9"]
    cancel(["9"])
    assert jobs_in_queue(tmp_path / "many") == ["8"]
    assert jobs_in_queue(tmp_path) == [], "a directory without jobs"
    cancel([])
    assert queue.read_text() == "7\n8\n8\n"


def test_without_slurm_there_are_no_jobs(tmp_path, monkeypatch):
    (tmp_path / ".submitit" / "8").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs_in_queue(tmp_path) == []
    cancel(["8"])
