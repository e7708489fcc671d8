"""The manifests of launch/kubernetes: against the published schemas, and what they start."""

import json
import re
import tomllib

import kubernetes_validate
import pytest
import yaml

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
