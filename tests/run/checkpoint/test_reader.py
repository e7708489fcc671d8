"""Reading checkpoints: on any number of processes, and nothing is used before it is validated."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from consensus.comm import GroupError, Solo
from consensus.run.checkpoint.manifest import DamagedError, Manifest, Place
from consensus.run.checkpoint.reader import (
    by_worker,
    candidates,
    choose,
    inspect,
    list_checkpoints,
    load,
    read_tensor,
    verify_files,
)
from consensus.run.checks import ConfigError
from consensus.server import digest
from tests.testing.checkpoints import (
    DAMAGES,
    FILES,
    SIZES,
    M,
    N,
    at,
    bits,
    block,
    damaged,
    empty,
    forge,
    grow,
    halve,
    make_state,
    restore,
    save,
    sign,
    tamper,
    truncate,
    written,
)


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_every_layout_reads_the_checkpoints_of_every_layout(ranks, config, tmp_path, dtype):
    for size in SIZES:
        assert written(size, ranks(size, save, tmp_path / str(size), config, [500], dtype))
    checkpoints = [at(tmp_path / str(size), 500) for size in SIZES]
    for size in SIZES:
        answers = ranks(size, restore, checkpoints, dtype)
        for rank, (states, digests) in enumerate(answers):
            each = M // size
            workers = range(rank * each, (rank + 1) * each)
            assert states == [bits(make_state(workers, 500, dtype))] * len(SIZES)
            assert digests == [[answers[0][1][0][0]] * size] * len(SIZES)


def test_a_file_of_torchs_own_writer_is_read(tmp_path):
    """torch.distributed.checkpoint wrote the tensors of earlier versions."""
    import torch.distributed.checkpoint as dcp

    tensors = {"a": torch.arange(6.0), "b": torch.tensor(7, dtype=torch.int64)}
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    places = dcp.FileSystemReader(tmp_path).read_metadata().storage_data
    assert len(places) == 2
    for index, where in places.items():
        tensor = tensors[index.fqn]
        place = where.relative_path, where.offset, where.length
        own = Place(str(tensor.dtype), tuple(tensor.shape), *place)
        found = read_tensor(tmp_path / where.relative_path, own)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        other = Place("torch.int8", tuple(tensor.shape), *place)
        with pytest.raises(DamagedError, match="instead of"):
            read_tensor(tmp_path / where.relative_path, other)


# ---- damage


@pytest.mark.parametrize(
    ("name", "damage"),
    # Not manifest.json and grow: whitespace after JSON has no meaning.
    [*((name, damage) for name in FILES for damage in DAMAGES), *((f, grow) for f in FILES[1:])],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_checkpoint_is_reported_and_skipped(config, tmp_path, name, damage):
    assert save(Solo(), tmp_path, config, [5, 10])[0] is None
    older, newer = at(tmp_path, 5), at(tmp_path, 10)
    damage(newer / name)
    said = []
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) == older
    assert len(said) == 1
    assert str(newer) in said[0]
    assert name in said[0].replace(str(newer), "")
    if damage in (truncate, halve, empty, grow) and name != "manifest.json":
        assert "bytes instead of" in said[0]
    with pytest.raises(DamagedError, match=re.escape(name)):
        verify_files(newer, Solo())
    if name != "__0_0.distcp":  # `inspect` skips the tensors
        with pytest.raises(DamagedError, match=re.escape(name)):
            inspect(newer)
    else:
        assert inspect(newer)[0].iteration == 10
    damage(older / name)
    said.clear()
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) is None
    assert [str(newer) in said[0], str(older) in said[1]] == [True, True]
    assert len(said) == 2


def choose_each(group, run_dirs):
    """Of each run: the checkpoint chosen, the lines printed, and all digests of u in it."""
    answers = []
    for run_dir in run_dirs:
        said = []
        paths = list_checkpoints(run_dir) if group.rank == 0 else [Path("not of this rank")]
        path = choose(paths, group, said.append)
        assert path is not None, said
        state = load(path, make_state(block(group), 0), block(group))
        answers.append((path, said, group.gather(digest(state["server/u"])).tolist()))
    return answers


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_choose_alike(ranks, config, tmp_path, size):
    cases = [(name, damage) for name in (*FILES, "__1_0.distcp") for damage in DAMAGES]
    pattern = tmp_path / "whole"
    assert written(2, ranks(2, save, pattern, config, [5, 10]), count=2)
    run_dirs = []
    for k, (name, damage) in enumerate(cases):
        run_dirs.append(tmp_path / str(k))
        shutil.copytree(pattern, run_dirs[-1])
        damage(at(run_dirs[-1], 10) / name)
    answers = ranks(size, choose_each, run_dirs)
    assert answers == [answers[0]] * size
    for (name, _), run_dir, (path, said, digests) in zip(cases, run_dirs, answers[0], strict=True):
        assert path == at(run_dir, 5)
        assert len(said) == 1
        newer = re.escape(str(at(run_dir, 10)))
        assert re.search(rf"{newer} is damaged .*rank \d: .*{re.escape(name)}", said[0])
        assert digests == [int(digest(make_state(range(M), 5)["server/u"]))] * size


def test_a_file_in_the_place_of_a_checkpoint_is_damaged(config, tmp_path):
    assert save(Solo(), tmp_path, config, [5])[0] is None
    at(tmp_path, 10).write_text("a file")
    at(tmp_path, 15).mkdir()
    said = []
    assert choose(list_checkpoints(tmp_path), Solo(), said.append) == at(tmp_path, 5)
    assert len(said) == 2


# ---- listing


def test_list_checkpoints_ignores_other_names(tmp_path):
    assert list_checkpoints(tmp_path) == []
    folder = tmp_path / "checkpoints"
    ours = ["00000005", "00000040", "99999999", "100000000"]
    strangers = [".00000050.tmp", ".00000005.gone", "00000060.damaged", "0000070", "latest"]
    strangers += ["-0000080", "00000090 ", "0x0000005", "00000100\n"]
    for name in ours + strangers:
        (folder / name).mkdir(parents=True)
    assert list_checkpoints(tmp_path) == [folder / name for name in reversed(ours)]


def test_candidates(tmp_path):
    for t in (5, 10):
        at(tmp_path, t).mkdir(parents=True)
        (at(tmp_path, t) / "manifest.json").touch()
    assert candidates(tmp_path) == [at(tmp_path, 10), at(tmp_path, 5)]
    assert candidates(at(tmp_path, 5)) == [at(tmp_path, 5)]
    assert candidates(tmp_path / "checkpoints") == []
    assert candidates(tmp_path / "nowhere") == []


def test_by_worker_gives_views():
    state = make_state([2, 3], 5)
    rows = by_worker(state, range(2, 4))
    mine = ("z", "v", "cuts", "oracle/position")
    server = ("server/u", "server/step", "server/cuts")
    assert set(rows) == {f"worker/{j}/{name}" for j in (2, 3) for name in mine} | set(server)
    assert rows["worker/3/z"].shape == (N,)
    assert rows["worker/2/cuts"].shape == ()
    assert all(rows[key] is state[key] for key in server)
    for k, j in enumerate((2, 3)):
        for name in mine:
            rows[f"worker/{j}/{name}"].fill_(100 + j)
            assert (state[f"worker/{name}"][k] == 100 + j).all()


# ---- a state that does not fit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"worker/z": torch.zeros(M, 7)}, "worker/0/z is (6,) {f} instead of (7,) {f}"),
        ({"server/u": torch.zeros(1, N)}, "server/u is (6,) {f} instead of (1, 6) {f}"),
        ({"server/step": torch.zeros(1)}, "server/step is () {f} instead of (1,) {f}"),
        ({"server/u": torch.zeros(N).double()}, "server/u is (6,) {f} instead of (6,) {d}"),
        ({"worker/cuts": torch.zeros(M).int()}, "worker/0/cuts is () {l} instead of () {i}"),
        ({"worker/momentum": torch.zeros(M, N)}, "lacks worker/0/momentum"),
        ({"server/v": torch.zeros(N)}, "lacks server/v"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(good, change, text):
    dtypes = {"f": "torch.float32", "d": "torch.float64", "l": "torch.int64", "i": "torch.int32"}
    with pytest.raises(GroupError) as caught:
        load(good, make_state(range(M), 0) | change, range(M))
    assert f"checkpoint {good}" in str(caught.value)
    assert str(caught.value).endswith(text.format_map(dtypes))


def test_workers_that_a_checkpoint_lacks_are_refused(good):
    with pytest.raises(GroupError, match=re.escape(f"checkpoint {good} lacks worker/4/z")):
        load(good, make_state(range(1, M + 1), 0), range(1, M + 1))


# ---- a forged checkpoint: every hash is right


def test_an_unchanged_forgery_is_accepted(good):
    """A forgery without a change is read, so the tests below show that the change is refused."""
    sign(good, json.loads((good / "manifest.json").read_bytes()))
    forge(good, "config.yaml", b"seed: ${oc.env:HOME}\n")
    tamper(good, lambda tensors: None)
    manifest, config = inspect(good)
    assert manifest.iteration == 5
    assert config == {"seed": "${oc.env:HOME}"}, "interpolations stay unresolved"
    assert restore(Solo(), [good])[0] == [bits(make_state(range(M), 5))]


class Touch:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, how, path):
        self.how, self.path = how, path

    def __reduce__(self):
        path = str(self.path)
        return {
            "os.system": (os.system, (f"touch '{path}'",)),
            "eval": (eval, (f"open({path!r}, 'w').close()",)),
            "exec": (exec, (f"open({path!r}, 'w').close()",)),
            "our own class": (Canary, (path,)),
            "state": (object.__new__, (Canary,), {"path": path}),
        }[self.how]


class Canary:
    def __init__(self, path):
        Path(path).touch()

    def __setstate__(self, state):
        Path(state["path"]).touch()


HOWS = ("os.system", "eval", "exec", "our own class", "state")


@pytest.fixture
def canary(tmp_path):
    """A path at which no file may appear."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something was executed"


def armed(content, canary, read=pickle.loads):
    """The content, after a check that an unsafe reader executes it."""
    read(content)
    assert canary.exists()
    canary.unlink()
    return content


@pytest.mark.parametrize("how", HOWS)
def test_the_pickled_index_of_torch_is_never_read(good, canary, how):
    """A `.metadata` file is ignored, and a manifest that lists it is refused."""
    content = armed(pickle.dumps(Touch(how, canary)), canary)
    (good / ".metadata").write_bytes(content)
    assert inspect(good)[0].iteration == 5
    assert restore(Solo(), [good])[0] == [bits(make_state(range(M), 5))]
    forge(good, ".metadata", content)
    damaged(good, "impossible files")


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1, 100), (7, 0), (0, 1)])
def test_a_place_of_something_else_is_refused(good, offset, length):
    tamper(good, lambda tensors: tensors["worker/1/z"].update(offset=offset, length=length))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_a_tensor_without_a_place_is_refused(good):
    tamper(good, dict.clear)
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"- 1\n",
        b"\xff\xfe\x00",
        b"a: ${unclosed\n",
        b"!!python/object/apply:os.system ['touch canary']\n",
    ],
)
def test_a_file_that_is_no_config_is_refused(good, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    forge(good, "config.yaml", content)
    try:
        with pytest.raises((ConfigError, DamagedError), match=re.escape("config.yaml")):
            inspect(good)
    finally:
        assert not (tmp_path / "canary").exists()


# ---- objects that are no tensors


def implant(checkpoint, key, content):
    """Put other content in the place of a tensor."""
    tensors = (checkpoint / "__0_0.distcp").read_bytes()
    forge(checkpoint, "__0_0.distcp", tensors + content)

    where = {"offset": len(tensors), "length": len(content)}
    tamper(checkpoint, lambda places: places[key].update(where))


def saved(value, path, **options):
    """The output of torch.save."""
    torch.save(value, path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["archive", "old archive", "pickle"])
def test_tensors_are_not_executed(good, canary, tmp_path, how, kind):
    evil = Touch(how, canary)
    if kind == "pickle":
        content = armed(pickle.dumps(evil), canary)
    else:
        content = saved(evil, tmp_path / "evil", _use_new_zipfile_serialization=kind == "archive")
        armed(tmp_path / "evil", canary, read=lambda path: torch.load(path, weights_only=False))
    implant(good, "worker/1/z", content)
    assert choose([good], Solo(), pytest.fail) == good
    assert inspect(good)[0].iteration == 5, "only the tensor is wrong"
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_an_implanted_tensor_that_fits_is_read(good, tmp_path):
    """The tests beside this one implant at a place that is read."""
    implant(good, "worker/1/z", saved(torch.arange(N).float(), tmp_path / "tensor"))
    assert load(good, make_state(range(M), 0), range(M))["worker/z"][1].tolist() == [*range(N)]


@pytest.mark.parametrize(
    "value", [torch.zeros(N - 1), torch.zeros(()), [0.0] * N, "text", None, {"z": torch.zeros(N)}],
    ids=["short", "scalar", "list", "text", "none", "dictionary"],
)  # fmt: skip
def test_another_object_instead_of_a_tensor_is_refused(good, tmp_path, value):
    implant(good, "worker/1/z", saved(value, tmp_path / "value"))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_noise_instead_of_a_tensor_is_refused(good):
    implant(good, "worker/1/z", b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(GroupError, match=re.escape(str(good))):
        load(good, make_state(range(M), 0), range(M))


def test_any_value_in_an_archive_directory_is_read_or_refused(good, tmp_path):
    """zipfile has errors of several types: its versions, flags, names, offsets, 64-bit fields."""
    content = saved(torch.zeros(N), tmp_path / "tensor")
    implant(good, "worker/1/z", content)
    before = (good / "__0_0.distcp").read_bytes()[: -len(content)]
    end = content.rindex(b"PK\x05\x06")
    first = content.index(b"PK\x01\x02")
    places = [*range(first, first + 60), *range(end, len(content))]
    refused = set()
    for at_byte in places:
        for value in (0, 90, 255):
            changed = content[:at_byte] + bytes([value]) + content[at_byte + 1 :]
            forge(good, "__0_0.distcp", before + changed)
            try:
                load(good, make_state(range(M), 0), range(M))
            except GroupError as error:
                refused.add(type(error.__cause__))
    assert {NotImplementedError, zipfile.BadZipFile} <= refused


# ---- random changes


def read_anyhow(checkpoint):
    """Call every reader; only the documented errors may be raised."""
    for read, allowed in (
        (Manifest.read, (DamagedError, ConfigError)),
        (inspect, (DamagedError, ConfigError)),
        (lambda path: verify_files(path, Solo()), DamagedError),
        (lambda path: load(path, make_state(range(M), 0), range(M)), GroupError),
    ):
        said = "nothing"
        try:
            read(checkpoint)
        except allowed as error:
            said = str(error)
        assert said.strip()
        assert "\n" not in said


@st.composite
def mutations(draw, content):
    """The content with some bytes replaced, removed, inserted, or a piece of it moved."""
    mutated = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at_byte = draw(st.integers(0, len(mutated)))
        length = draw(st.sampled_from([0, 1, 1, 1, 2, 9, 100, len(mutated)]))
        origin = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=4) | st.just(content[origin : origin + length]))
        mutated[at_byte : at_byte + length] = piece
    return bytes(mutated)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def searched(count):
    """Settings of a search that is the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """A checkpoint to damage repeatedly, with its original files."""
    run_dir = tmp_path_factory.mktemp("spoiled")
    assert save(Solo(), run_dir, config, [5])[0] is None
    return at(run_dir, 5), {path.name: path.read_bytes() for path in at(run_dir, 5).iterdir()}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty working directory, in which `touch canary` would show."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def renew(place):
    checkpoint, files = place
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
    return checkpoint


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("name", FILES)
def test_any_unsigned_change_is_damage(place, name):
    _, files = place

    @searched(60)
    @given(mutations(files[name]) | st.binary(max_size=99))
    def search(content):
        assume(content != files[name])
        checkpoint = renew(place)
        (checkpoint / name).write_bytes(content)
        read_anyhow(checkpoint)
        if name != "manifest.json":  # whitespace between its words has no meaning
            said = []
            assert choose([checkpoint], Solo(), said.append) is None
            assert name in said[0]

    search()


@pytest.mark.usefixtures("empty_folder")
def test_any_signed_manifest_is_read_or_refused(place):
    fields = list(json.loads(place[1]["manifest.json"]))

    @searched(200)
    @given(st.dictionaries(st.sampled_from(fields) | st.text(max_size=9), JSON, max_size=3))
    def search(changes):
        checkpoint = renew(place)
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        sign(checkpoint, manifest | changes)
        read_anyhow(checkpoint)

    search()


@pytest.mark.usefixtures("empty_folder")
def test_any_signed_place_is_read_or_refused(place):
    fields = ["dtype", "shape", "file", "offset", "length"]
    keys = list(json.loads(place[1]["manifest.json"])["tensors"])
    near = st.integers(-2, 9000) | st.lists(st.integers(0, 9)) | st.sampled_from(FILES) | JSON

    @searched(200)
    @given(
        st.sampled_from(keys),
        st.dictionaries(st.sampled_from(fields) | st.text(max_size=9), near, max_size=3),
    )
    def search(key, changes):
        checkpoint = renew(place)
        tamper(checkpoint, lambda tensors: tensors[key].update(changes))
        read_anyhow(checkpoint)

    search()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # it would hide the failure
@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("name", ["config.yaml", "__0_0.distcp"])
def test_any_signed_content_is_read_or_refused(place, name):
    @searched(200)
    @given(mutations(place[1][name]) | st.binary(max_size=99))
    def search(content):
        checkpoint = renew(place)
        forge(checkpoint, name, content)
        read_anyhow(checkpoint)

    search()


# ---- content without bounds


def test_an_archive_that_would_inflate_is_refused(good, tmp_path):
    small = tmp_path / "small"
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(N), tmp_path / "tensor"))) as stored,
        zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            content = stored.read(name)
            packed.writestr(name, bytes(2**20) if "/data/" in name else content)
    assert small.stat().st_size < 2**15
    implant(good, "worker/1/z", small.read_bytes())
    with pytest.raises(GroupError, match="worker/1/z: compressed, as no checkpoint is written"):
        load(good, make_state(range(M), 0), range(M))


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "__0_0.distcp"])
def test_a_pipe_is_damage_and_nobody_waits_for_it(good, name):
    (good / name).unlink()
    os.mkfifo(good / name)
    said = []
    assert choose([good], Solo(), said.append) is None
    assert "no regular file" in said[0]


@pytest.mark.parametrize("change", [{"wall_s": 10**400}, {"iteration": 10**30}])
def test_numbers_out_of_range_are_damage(good, change):
    sign(good, json.loads((good / "manifest.json").read_bytes()) | change)
    (key,) = change
    with pytest.raises(DamagedError, match=f"impossible {key}"):
        Manifest.read(good)
