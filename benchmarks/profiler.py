"""Chrome traces of a call."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Call, synchronize


def save_trace(call: Call, device: torch.device, path: Path, calls: int = 5) -> None:
    """Write a chrome trace of some calls and print the largest contributions to the time."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    call()
    synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{path}: {calls} calls")
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60))
