"""The plan: workers, data, model and device, and what depends on the launch."""

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from consensus import POTENTIALS, Potential, Profile, Radial
from consensus.comm import Launch
from consensus.problem import DATASETS, LOSSES, MODELS, Dataset, Loss, Metric, partition
from consensus.run.checks import ConfigError
from consensus.run.compose import explain
from consensus.run.plan import choose_device, count_workers, load_data, make_plan
from consensus.run.problem import make_shards


@pytest.fixture
def plan_refusal(make_config):
    """`plan_refusal(launch, "workers=3", ...)`: likewise, for what only the plan can see."""

    def refuse(launch: Launch, *overrides: str) -> str:
        config = make_config("model=logistic", "device=cpu", *overrides)
        with pytest.raises(ConfigError) as caught:
            make_plan(config, launch)
        line = explain(caught.value)
        assert "\n" not in line
        return line

    return refuse


@pytest.mark.parametrize(
    ("workers", "size", "expected"),
    [("null", 1, 1), ("null", 4, 4), (1, 1, 1), (4, 1, 4), (4, 2, 4), (4, 4, 4), (12, 3, 12)],
)
def test_workers_and_processes(make_config, workers, size, expected):
    config = make_config(f"workers={workers}")
    assert count_workers(config, Launch(0, size, 0, size)) == expected


@pytest.mark.parametrize(("workers", "size"), [(1, 2), (3, 2), (2, 4), (6, 4)])
def test_workers_must_be_a_multiple_of_the_processes(make_config, workers, size):
    with pytest.raises(ConfigError) as caught:
        count_workers(make_config(f"workers={workers}"), Launch(0, size, 0, size))
    assert str(caught.value) == (
        f"`workers` is {workers}; allowed: a multiple of the {size} processes (WORLD_SIZE), "
        "or null for one each"
    )


def test_the_plan_assigns_the_workers(make_config):
    config = make_config("workers=4", "model=logistic", "data.partition=sharded", "device=cpu")
    for rank, block in [(0, [0, 1]), (1, [2, 3])]:
        plan = make_plan(config, Launch(rank, 2, rank, 2))
        assert plan.num_workers == 4
        assert list(plan.local_workers) == block
        assert [source.worker for source in plan.oracle.minibatches] == block
        assert plan.shard_sizes == (359,) * 4  # 1437 // 4
        assert plan.epochs(100) == pytest.approx(100 * 20 / 359)
        assert plan.backend == "gloo"


def test_msgd_is_one_worker_in_one_process(make_config):
    config = make_config("algorithm=msgd", "workers=4")
    assert count_workers(config, Launch()) == 1
    with pytest.raises(ConfigError) as caught:
        count_workers(config, Launch(1, 2, 1, 2))
    assert str(caught.value) == (
        "`algorithm` is msgd; allowed: one process, since it is one worker, but there are 2: "
        "start it with `python -m consensus.train` or --nproc-per-node=1"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["algorithm.batch_size=1438"],
            "`algorithm.batch_size` is 1438; allowed: at most 1437, the samples in the shard of "
            "worker 0 (data.partition=full, 4 workers)",
        ),
        (
            ["algorithm.batch_size=360", "data.partition=sharded"],
            "`algorithm.batch_size` is 360; allowed: at most 359, the samples in the shard of "
            "worker 0 (data.partition=sharded, 4 workers)",
        ),
        (
            ["workers=1438", "data.partition=sharded"],
            "`data.partition` is 'sharded' with 1438 workers and 1437 samples; allowed: at most "
            "as many workers as samples",
        ),
        (
            ["data.partition=label_skew", "data.alpha=1e10"],
            "`data.alpha` is 10000000000.0; allowed: a number in (0, 1e9]",
        ),
        (
            ["model=mlp", "model.options.hidden=[8,0]"],
            "`model` is mlp {'num_classes': 10, 'hidden': [8, 0]}: `model.hidden` is [8, 0]; "
            "allowed: positive integers",
        ),
        (
            ["+model.options.depth=3"],
            "`model` is logistic {'num_classes': 10, 'depth': 3}: model `logistic` has no option "
            "`depth`; its options: num_classes",
        ),
        (
            ["potential=scaled_quad", "potential.options.weight=[1,2]"],
            "`potential.options` is {'weight': [1, 2]}: `weight` has 2 entries; allowed: 1, "
            "1 (one a layer) or 7850 (one a coordinate)",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_checks_of_the_plan_are_the_same_on_every_rank(plan_refusal, overrides, line, rank):
    assert plan_refusal(Launch(rank, 2, rank, 2), "workers=4", *overrides) == line


@pytest.mark.parametrize(("workers", "seed"), [(16, 0), (16, 1), (12, 5)])
def test_shards_that_are_too_small_name_alpha_and_a_remedy(
    plan_refusal, make_config, workers, seed
):
    """1437 images; few classes at a worker leave it without a minibatch of 20."""
    own = [f"workers={workers}", f"seed={seed}", "data.partition=label_skew", "model=logistic"]
    line = plan_refusal(Launch(), *own, "data.alpha=0.1", "device=cpu")
    beginning, _, rest = line.partition(f"; with seed = {seed} worker ")
    assert beginning == (
        f"`data.alpha` is 0.1; allowed: a value for which each of the {workers} workers has at "
        "least algorithm.batch_size = 20 samples"
    )
    worker, most, alpha = re.fullmatch(
        r"(\d+) has (\d+); data\.alpha=([\d.]+) works, or take fewer workers or another seed", rest
    ).groups()
    labels = load_data(make_config()).train.targets
    sizes = [len(shard) for shard in partition(labels, "label_skew", workers, seed, 0.1)]
    assert int(most) == sizes[int(worker)] == min(sizes) < 20
    assert make_plan(make_config(*own, f"data.alpha={alpha}", "device=cpu"), Launch())


def test_no_alpha_gives_more_images_than_there_are(plan_refusal):
    own = ["workers=100", "data.partition=label_skew", "model=logistic", "device=cpu"]
    assert plan_refusal(Launch(), *own).endswith("; take fewer workers or a smaller batch")


@pytest.mark.parametrize("kind", ["label_skew", "by_label"])
def test_partitions_by_class_need_classes(make_config, kind):
    samples = torch.rand(40, 3), torch.rand(40)
    dataset = Dataset(samples, samples)
    with pytest.raises(ConfigError) as caught:
        make_shards(make_config(f"data.partition={kind}"), dataset, 2)
    assert str(caught.value) == (
        f"`data.partition` is {kind} without classes; allowed: full, sharded for targets that are "
        "no classes (N,)"
    )
    assert len(make_shards(make_config("data.partition=sharded"), dataset, 2)) == 2


def test_missing_data_are_refused(plan_refusal, tmp_path):
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "data"  # cannot be made: nothing is asked of the network
    line = plan_refusal(Launch(), "data=mnist", f"data.root={root}")
    assert line.startswith(
        f"`data.root` is '{root}': MNIST is not in {root}/MNIST/raw (nothing is there) and"
    )
    assert line.endswith("or use data=digits, which needs no files")


def test_directories_that_hold_a_run_are_refused(plan_refusal, make_config, tmp_path):
    run_dir = tmp_path / "run"
    start = f"`output.run_dir` is {run_dir}; allowed: an empty or new directory; this one holds"
    run_dir.mkdir()
    config = make_config(f"output.run_dir={run_dir}", "model=logistic", "device=cpu")
    assert make_plan(config, Launch()).config is config  # an empty one is welcome
    (run_dir / "metrics.jsonl").touch()
    line = plan_refusal(Launch(), f"output.run_dir={run_dir}")
    assert line == f"{start} an unfinished run (metrics.jsonl); resume=auto continues it"
    (run_dir / "summary.json").touch()
    line = plan_refusal(Launch(), f"output.run_dir={run_dir}")
    assert line == f"{start} a finished run (summary.json); resume=auto continues it"
    file = run_dir / "summary.json"
    assert plan_refusal(Launch(), f"output.run_dir={file}") == (
        f"`output.run_dir` is {file}; allowed: a directory, or a path where none exists yet"
    )


def test_nccl_without_a_device_is_refused(make_config, cuda_devices):
    cuda_devices(0)
    with pytest.raises(ConfigError) as caught:
        make_plan(make_config("group=nccl"), Launch(0, 2, 0, 2))
    assert str(caught.value) == (
        "`group` is nccl; allowed: gloo or auto here: NCCL moves CUDA tensors only"
    )


def test_int8_on_a_device_is_refused(make_config, cuda_devices):
    config = make_config("group.compress=int8")
    cuda_devices(1)
    with pytest.raises(ConfigError) as caught:
        make_plan(config, Launch(0, 2, 0, 2))
    assert str(caught.value) == "`group.compress` is int8; allowed: null or bf16 on a GPU"


def test_devices(make_config, cuda_devices):
    cuda_devices(2)
    auto = make_config("device=auto")
    chosen = [choose_device(auto, Launch(r, 4, r, 4)) for r in range(4)]
    assert chosen == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    assert choose_device(make_config("device=cpu"), Launch()) == torch.device("cpu")
    cuda_devices(0)
    assert choose_device(auto, Launch()) == torch.device("cpu")
    with pytest.raises(ConfigError) as caught:
        choose_device(make_config("device=cuda"), Launch())
    assert str(caught.value) == "`device` is cuda; allowed: cpu or auto: no CUDA device"


@pytest.mark.parametrize(("training", "said"), [("self.training", 0), ("True", 1)])
def test_a_model_that_is_random_in_evaluation_mode_is_mentioned(
    make_config, tmp_path, monkeypatch, training, said
):
    name = f"dropping_{said}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "from consensus.problem import MODELS\n"
        "class Model(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        x = torch.nn.functional.dropout(x.flatten(1), 0.5, " + training + ")\n"
        "        return super().forward(x)\n"
        f"MODELS.register('{name}')(lambda num_classes=10: Model(784, num_classes))\n"
    )
    monkeypatch.setattr(MODELS, "_factories", dict(MODELS._factories))
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(f"plugins=[{name}]", f"model={name}", "device=cpu")
    remarks = [line for line in make_plan(config, Launch()).remarks() if "evaluation" in line]
    assert len(remarks) == said
    assert all(line.startswith(f"model {name} draws random numbers in ev") for line in remarks)


@pytest.mark.parametrize(
    ("overrides", "size", "said"),
    [((), 1, True), (("workers=1",), 1, False), ((), 2, False), (("algorithm=msgd",), 1, False)],
)
def test_one_worker_without_others_is_mentioned(make_config, overrides, size, said):
    config = make_config("model=logistic", "device=cpu", *overrides)
    remarks = make_plan(config, Launch(0, size, 0, size)).remarks()
    assert any(line.startswith("one worker is coupled to itself") for line in remarks) == said


def test_a_potential_with_a_wrong_derivative_is_refused(plan_refusal, monkeypatch):
    def wrong():
        profile = Profile(lambda s: s, lambda s: 1.5 * torch.ones_like(s), torch.zeros_like)
        return Potential(profile, Radial())

    monkeypatch.setitem(POTENTIALS._factories, "wrong", wrong)
    line = plan_refusal(Launch(), "potential.name=wrong")
    assert line.startswith("`potential` is wrong {}: psi' is 1.5 and not 1 at s = ")


def test_a_potential_whose_functions_return_no_tensors_is_refused(plan_refusal, monkeypatch):
    profile = Profile(lambda s: s, lambda s: 1.0, torch.zeros_like)
    monkeypatch.setitem(POTENTIALS._factories, "wrong", lambda: Potential(profile, Radial()))
    line = plan_refusal(Launch(), "potential.name=wrong")
    assert line.startswith("`potential` is wrong {}: psi' of a tensor s of shape (50,) is a float;")


# ---- factories of the user


PIXELS = torch.zeros(6, 1, 28, 28)
CLASSES = torch.arange(6) % 3


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (
            PIXELS[..., :27],
            CLASSES,
            "the model, which takes the training set, fails on the test set: ",
        ),
        (PIXELS, CLASSES + 1, ""),  # a class more than the model has
        (PIXELS, CLASSES.double(), ""),
    ],
)
def test_a_test_set_of_another_kind_is_refused(plan_refusal, monkeypatch, inputs, targets, said):
    """Before the run, which would fail at its first evaluation."""

    def blobs():
        return Dataset((PIXELS, CLASSES), (inputs, targets), num_classes=3)

    monkeypatch.setitem(DATASETS._factories, "blobs", blobs)
    line = plan_refusal(
        Launch(), "data.name=blobs", "model=logistic", "algorithm.batch_size=1", "device=cpu"
    )
    assert line.startswith("`data` is blobs {}: ")
    assert said in line


@pytest.mark.parametrize("where", ["train", "test"])
@pytest.mark.parametrize("stored", [False, True])
def test_targets_for_which_the_loss_is_not_defined_are_refused(
    plan_refusal, monkeypatch, where, stored
):
    """With targets of -1 and 1 the binary cross-entropy has no minimum."""

    def pairs():
        wrong, right = (2.0 * CLASSES.eq(1) - 1).unsqueeze(1), CLASSES.eq(1).unsqueeze(1).float()
        splits = {name: (PIXELS, wrong if name == where else right) for name in ("train", "test")}
        return Dataset(**{k: TensorDataset(*v) if stored else v for k, v in splits.items()})

    def net():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))

    monkeypatch.setitem(DATASETS._factories, "pairs", pairs)
    monkeypatch.setitem(MODELS._factories, "net", net)
    own = ["data.name=pairs", "model.name=net", "loss=bce", "algorithm.batch_size=2", "device=cpu"]
    line = plan_refusal(Launch(), *own)
    found = f"`loss` is bce, and the targets of `{where}` go from -1 to 1; allowed: 0 to 1"
    assert line == found


def test_the_line_of_the_user_in_which_a_model_or_a_metric_fails_is_told(plan_refusal, monkeypatch):
    """A failure of a metric would otherwise look as if it were one of the model."""
    here = r" \(.*test_plan\.py, line \d+\)$"
    wrong = Loss(lambda x, y: x.sum(1), {"acc": Metric(lambda x, y: x.nothing)})
    monkeypatch.setitem(LOSSES._factories, "wrong", lambda: wrong)
    line = plan_refusal(Launch(), "loss.name=wrong")
    assert re.search(r"AttributeError: 'Tensor' object has no attribute 'nothing'" + here, line)
    monkeypatch.setitem(MODELS._factories, "fails", Fails)
    line = plan_refusal(Launch(), "model.name=fails")
    assert re.match(r"`model` is fails \{\}: shape '\[3\]' is invalid .*" + here, line)


class Fails(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, x):
        return x.view(3)


def test_a_data_set_without_root_and_a_model_without_num_classes(make_config, monkeypatch):
    def blobs(count: int = 6):
        return Dataset((PIXELS[:count], CLASSES[:count]), (PIXELS, CLASSES), num_classes=3)

    def net(width: int = 3):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, width))

    monkeypatch.setitem(DATASETS._factories, "blobs", blobs)
    monkeypatch.setitem(MODELS._factories, "net", net)
    own = ["data.name=blobs", "+data.options.count=4", "model.name=net", "algorithm.batch_size=1"]
    plan = make_plan(make_config(*own, "device=cpu"), Launch())
    assert (len(plan.dataset.train), plan.start.numel()) == (4, 785 * 3)


def test_what_a_factory_returns_wrongly_is_refused(make_config, monkeypatch):
    monkeypatch.setitem(DATASETS._factories, "pair", lambda root: (PIXELS, CLASSES))
    monkeypatch.setitem(MODELS._factories, "none", lambda num_classes: None)
    monkeypatch.setitem(MODELS._factories, "class", lambda: torch.nn.Linear)
    monkeypatch.setitem(POTENTIALS._factories, "psi", lambda: Profile)
    here = f"{__name__}.test_what_a_factory_returns_wrongly_is_refused.<locals>.<lambda>"
    for override, start, found in (
        (
            "data.name=pair",
            "`data` is pair {'root': ",
            f"the factory of data set `pair`, {here}, returned a value of type tuple; allowed: "
            "a Dataset",
        ),
        (
            "model.name=none",
            "`model` is none {'num_classes': 10}: ",
            f"the factory of model `none`, {here}, returned None; allowed: a torch.nn.Module",
        ),
        (
            "model.name=class",
            "`model` is class {}: ",
            f"the factory of model `class`, {here}, returned the class Linear; allowed: "
            "a torch.nn.Module",
        ),
        (
            "potential.name=psi",
            "`potential.options` is {}: ",
            f"the factory of potential `psi`, {here}, returned the class Profile; allowed: "
            "a Potential",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            make_plan(make_config(override, "device=cpu"), Launch())
        assert str(caught.value).startswith(start)
        assert str(caught.value).endswith(found)
