"""Plugin of the trainer: a sink that writes some columns of every evaluation to metrics.csv.

python -m consensus.train workers=4 'plugins=[own_sink]' experiment=smoke

The file is in the run directory. A tracker on the web is the same class with other calls.
"""

import csv

from consensus.run.sinks import SINKS, RunInfo, Sink

COLUMNS = ("iteration", "epoch", "train_loss", "test_loss", "wall_s")


@SINKS.register("csv")
class CsvSink(Sink):
    def __init__(self, info: RunInfo) -> None:
        self._file = (info.run_dir / "metrics.csv").open("w", newline="", encoding="utf-8")
        self._table = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore")
        self._table.writeheader()
        for row in info.rows:  # evaluations before the checkpoint from which a run continues
            self.evaluation(row)

    def evaluation(self, row) -> None:
        self._table.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()
