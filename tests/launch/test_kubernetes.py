"""The manifests of launch/kubernetes: against the published schemas, and what they start."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib

import kubernetes_validate
import pytest
import yaml

from consensus.run.elastic.log import MEMBERSHIP, read_changes
from tests.test_elastic import RUN
from tests.testing import ROOT

FOLDER = ROOT / "launch" / "kubernetes"


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job():
    (found,) = [d for d in documents("job.yaml") if d["kind"] == "Job"]
    return found


def pod_spec():
    return job()["spec"]["template"]["spec"]


def container():
    (found,) = pod_spec()["containers"]
    return found


def environment():
    return {entry["name"]: entry["value"] for entry in container()["env"]}


@pytest.mark.parametrize("document", documents("job.yaml"), ids=lambda d: d["kind"])
def test_the_job_and_its_service_are_what_kubernetes_knows(document):
    kubernetes_validate.validate(document, "1.31", strict=True)
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_would_be_found():
    wrong = job()
    wrong["spec"]["backOffLimit"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_numbers_that_stand_in_several_places_agree():
    spec, own = job()["spec"], environment()
    assert spec["completions"] == spec["parallelism"] == int(own["NNODES"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == int(own["NPROC"])
    cores = int(container()["resources"]["requests"]["cpu"])
    assert cores == int(own["NPROC"]) * int(own["OMP_NUM_THREADS"])
    workers = int(dict(a.split("=") for a in container()["args"])["workers"])
    assert workers % (int(own["NNODES"]) * int(own["NPROC"])) == 0


def test_the_pods_meet_at_a_name_that_the_service_gives():
    (service,) = [d for d in documents("job.yaml") if d["kind"] == "Service"]
    (port,) = service["spec"]["ports"]
    name, subdomain = job()["metadata"]["name"], pod_spec()["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert environment()["RENDEZVOUS"] == f"{name}-0.{subdomain}:{port['port']}"


def test_the_variables_are_those_of_node_sh():
    head = (ROOT / "launch" / "node.sh").read_text().split("set -euo")[0]
    known = set(re.findall(r"^#   ([A-Z_]+)  ", head, re.MULTILINE))
    assert set(environment()) <= known
    assert container()["command"] == ["/opt/consensus/launch/node.sh"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "WORKDIR /opt/consensus" in dockerfile
    assert "COPY launch launch" in dockerfile
    assert f"--uid {pod_spec()['securityContext']['runAsUser']}" in dockerfile


def test_the_run_can_be_composed_and_is_the_same_in_all_manifests(make_config):
    args = container()["args"]
    config = make_config(*args[:2])
    assert config.workers == 8
    assert "resume=auto" in args
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert any(f"output.run_dir={mount}/" in " ".join(args) for mount in mounts)
    (train_job,) = documents("trainjob.yaml")
    (torch_job,) = documents("pytorchjob.yaml")
    replicas = torch_job["spec"]["pytorchReplicaSpecs"]
    pods = [replica["template"]["spec"]["containers"][0] for replica in replicas.values()]
    for other in (train_job["spec"]["trainer"], *pods):
        assert other["args"] == args
        assert other["image"] == container()["image"]
        assert other["command"] == ["torchrun", "-m", "consensus.train"]
    nodes = int(environment()["NNODES"])
    assert train_job["spec"]["trainer"]["numNodes"] == nodes
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes
    assert json.loads(torch_job["spec"]["nprocPerNode"]) == int(environment()["NPROC"])
    assert train_job["spec"]["trainer"]["numProcPerNode"] == int(environment()["NPROC"])


def test_the_image_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container()["image"] == f"consensus:{version}"


# ---- elastic.yaml


def elastic(kind, name):
    (found,) = [
        document
        for document in documents("elastic.yaml")
        if document["kind"] == kind and document["metadata"]["name"] == name
    ]
    return found


def elastic_container(name):
    (found,) = elastic("Job", name)["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize(
    "document", documents("elastic.yaml"), ids=lambda d: f"{d['kind']} {d['metadata']['name']}"
)
def test_the_elastic_jobs_and_their_service_are_what_kubernetes_knows(document):
    kubernetes_validate.validate(document, "1.31", strict=True)
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_members_meet_at_the_store(make_config):
    service, store = elastic("Service", "consensus-store"), elastic("Job", "consensus-store")
    assert service["spec"]["selector"].items() <= (
        store["spec"]["template"]["metadata"]["labels"].items()
    )
    (port,) = service["spec"]["ports"]
    member = elastic_container("consensus-elastic")
    own = {entry["name"]: entry["value"] for entry in member["env"]}
    assert own["RENDEZVOUS"] == f"{service['metadata']['name']}:{port['port']}"
    assert f"--store=0.0.0.0:{port['port']}" in elastic_container("consensus-store")["args"]
    head = (ROOT / "launch" / "node.sh").read_text().split("set -euo")[0]
    assert set(own) <= set(re.findall(r"^#   ([A-Z_]+)  ", head, re.MULTILINE))
    spec = elastic("Job", "consensus-elastic")["spec"]
    assert int(own["NNODES"]) == spec["parallelism"]
    assert "completions" not in spec, "one pod that ends with 0 completes the job"
    assert member["resources"]["limits"]["nvidia.com/gpu"] == int(own["NPROC"])
    assert member["image"] == elastic_container("consensus-store")["image"] == container()["image"]
    assert make_config("group.elastic=true", *member["args"]).workers is None


@pytest.mark.slow
def test_an_evicted_pod_leaves_and_the_other_completes_the_job(tmp_path):
    """The commands of the manifest, as processes of this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    go = tmp_path / "go"
    environment = os.environ | {
        "CONSENSUS_VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "CONSENSUS_GO": str(go),
    }

    def start(name):
        own = elastic_container(name)
        command = [word.replace("/opt/consensus", str(ROOT)) for word in own["command"]]
        command[0] = sys.executable if command[0] == "python3" else command[0]
        args = [word.replace("29400", str(port)) for word in own.get("args", [])]
        variables = {entry["name"]: entry["value"] for entry in own.get("env", [])}
        if variables:
            args = [*args[1:], *RUN, "plugins=[tests.testing.patient]", "output.eval_every=125"]
            args += [f"output.run_dir={tmp_path / 'run'}", "algorithm.iterations=500"]
            variables |= {"NNODES": "2", "RENDEZVOUS": f"localhost:{port}", "SERVE": "false"}
        with (tmp_path / f"{len(pods)}.log").open("w") as log:
            pod = subprocess.Popen(
                command + args, cwd=tmp_path, env=environment | variables,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        pods.append(pod)
        return pod

    def workers(count):
        deadline = time.monotonic() + 90.0
        run = tmp_path / "run"
        while not (run / MEMBERSHIP).exists() or len(read_changes(run)[-1].workers) != count:
            said = [path.read_text() for path in sorted(tmp_path.glob("*.log"))]
            assert time.monotonic() < deadline, said
            time.sleep(0.02)

    pods = []
    try:
        store, first, _ = (start(name) for name in ("consensus-store", *2 * ("consensus-elastic",)))
        workers(2)
        first.terminate()
        assert first.wait(60) == 75
        workers(1)
        go.touch()
        assert pods[2].wait(90) == 0
        assert store.wait(60) == 0
    finally:
        for pod in pods:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGKILL)
            pod.wait()
    changes = read_changes(tmp_path / "run")
    assert [len(change.workers) for change in changes] == [2, 1]
    assert list(changes[1].gone.values()) == ["has left"]
    assert all(change.digest for change in changes)  # that all members have compared
