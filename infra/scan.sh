#!/usr/bin/env bash
# Security scan of Terraform, Dockerfile and Kubernetes pods by checkov, which is kept out of .venv for its size (300 MB, a minute to
# install):        infra/scan.sh [FOLDER for its environment]
# Findings that are accepted have their reason beside them: in the files, for pods in the list below.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-build/checkov}
if [ ! -x "$environment/bin/checkov" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check checkov==3.3.30
fi
pods=$(mktemp -d)
trap 'rm -r "$pods"' EXIT
# checkov knows no RayCluster, so it is shown the pods in it.
"$environment/bin/python" - "$pods" <<'PYTHON'
import pathlib, sys, yaml
spec = yaml.safe_load(pathlib.Path("cluster/kuberay/ray/cluster.yaml").read_text())["spec"]
for name, group in [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "iir-dist"}, **group["template"]}
    pathlib.Path(sys.argv[1], f"{name}.yaml").write_text(yaml.safe_dump(pod))
PYTHON
accepted=(
  CKV_K8S_14 CKV_K8S_43 # tag or digest of the image are set by ray/kustomization.yaml
  CKV_K8S_15            # IfNotPresent: tags are not moved, and 64 nodes that start need not ask for 8 GB again
  CKV_K8S_35            # AWS clients read keys from the environment; where there are roles, the Secret does not exist
  CKV_K8S_38            # the head's autoscaler talks to Kubernetes; workers mount no token
  CKV2_K8S_6            # the policies are in platform/, which is scanned apart
)
scan() { "$environment/bin/checkov" --quiet --compact --skip-download "$@"; }
scan -d infra --framework terraform
scan -f infra/Dockerfile --framework dockerfile
scan -d cluster/kuberay/platform --framework kubernetes
scan -d "$pods" --framework kubernetes --skip-check "$(IFS=, && echo "${accepted[*]}")"
scan -d cluster -d infra --framework secrets
