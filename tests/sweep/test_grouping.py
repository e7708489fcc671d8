"""Grouping of runs into populations, and the names of their checkpoints."""

from consensus.sweep.grouping import Member, key_of, populations


def test_the_checkpoint_name_depends_on_the_configs(make_config):
    def key(*overrides):
        config = make_config("potential=quad", *overrides)
        return key_of([Member("a", None, config), Member("b", None, config)])

    assert key() == key("output.run_dir=elsewhere")
    others = [key("algorithm.weight_decay=0"), key("seed=1"), key("algorithm.batch_size=10")]
    assert len({key(), *others}) == 4


def test_populations_fit_into_memory(make_config):
    members = [
        Member(f"{potential} {seed}", None, make_config(f"potential={potential}", f"seed={seed}"))
        for potential in ("quad", "tan")
        for seed in range(5)
    ]
    each = 8 * 1 * 33_580 * 4  # vectors, worker, LeNet-5 in float32
    names = [[member.name for member in part] for part in populations(members, 3 * each)]
    assert names == [
        ["quad 0", "quad 1", "quad 2"],
        ["quad 3", "quad 4"],
        ["tan 0", "tan 1", "tan 2"],
        ["tan 3", "tan 4"],
    ]
    assert [len(part) for part in populations(members, 10**12)] == [5, 5]
    assert [len(part) for part in populations(members, 1)] == [1] * 10
