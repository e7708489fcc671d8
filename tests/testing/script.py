"""A script of a user that trains from Python several times, on every rank of a launch."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import consensus


def main() -> None:
    """Train with the overrides of the command line; each rank writes its results to a file."""
    found = {
        "first": described("output.run_dir=first"),
        "second": described("output.run_dir=second"),
        "refused": error_of("potential=cubik"),
        "failed": error_of("potential=quad", "algorithm.sigma=1e30", "output.run_dir=failed"),
    }
    if "MASTER_ADDR" in os.environ and os.environ["WORLD_SIZE"] != "1":
        dist.init_process_group("gloo")
        found["within"] = described("output.run_dir=within")
        total = torch.ones(1)
        dist.all_reduce(total)
        found["total"] = total.item()
        dist.destroy_process_group()
    found["last"] = described("output.run_dir=last")
    Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def described(*own: str) -> dict:
    result = consensus.train(*sys.argv[1:], *own)
    content = b"".join(value.numpy().tobytes() for value in result.model.state_dict().values())
    return {
        "digest": hashlib.sha256(content).hexdigest(),
        "of_u": result.rows[-1]["digest"],
        "rows": len(result.rows),
        "objective": result.rows[-1]["objective"],
        "summary": result.summary["environment"]["processes"],
        "best": result.best,
        "initialized": dist.is_initialized(),
    }


def error_of(*own: str) -> str:
    try:
        consensus.train(*sys.argv[1:], *own)
    except (consensus.ConfigError, consensus.GroupError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
