"""Imported by the fork server: prepares the first configs, the first figure and the first data.

Hydra's parsers, matplotlib's fonts and its grammar of mathematics are prepared at their first use,
and the files of the configs that most tests use are merged (parsed_configs.py).
Nothing that a test looks at depends on it. The objects are frozen, so that no garbage collection in
a rank copies the pages of its server; and the operators of torch are not taken out of its table one
by one at the end of a rank, in 60 ms.
"""

import gc
import itertools
import tempfile
import weakref
from pathlib import Path

from hydra import compose, initialize_config_dir

from consensus.problem import DATASETS
from consensus.report.convergence import draw_run
from consensus.run.compose import config_dir, register_schema, to_config
from tests.testing import parsed_configs
from tests.testing.made_runs import row_at

parsed_configs.remember()
register_schema()
with initialize_config_dir(config_dir(), version_base="1.3"):
    for _potential, _model, _more in itertools.product(
        ("quad", "tan"), ("logistic", "lenet5"), ([], ["experiment=smoke"])
    ):
        _groups = [f"potential={_potential}", f"model={_model}", *_more]
        to_config(compose("train", overrides=[*_groups, "output.run_dir=run"]))
with tempfile.TemporaryDirectory() as _folder:
    draw_run([row_at(t) for t in (10, 20, 30)], Path(_folder) / "figure.png")
DATASETS.make("digits")
for _own in list(weakref.finalize._registry):
    _alive = _own.peek()
    if _alive is not None and _alive[1].__module__ == "torch.library":
        _own.atexit = False
gc.collect()
gc.freeze()
gc.enable()
