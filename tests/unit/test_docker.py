"""Deployment files: Dockerfiles, compose, Kubernetes, alerts, dashboard. Checked without running them.

`docker/try_containers.py` runs the images; `tests/over_triton/test_dashboards.py` queries a live Prometheus.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from contract_tables import ROOT, gateway_metrics_table
from engine.monitoring.metrics import METRIC_SPECS
from engine.runners.native import isa_variants
from google.protobuf import text_format
from ruamel.yaml import YAML
from tritonclient.grpc import model_config_pb2

DOCKER = ROOT / "docker"
_NAME = re.compile(r"\btritonlm_\w+")
_PARTS = ("_bucket", "_count", "_sum")


def load_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def yaml_of(file: Path) -> Any:
    return YAML(typ="safe").load(file)


@pytest.mark.parametrize("file", sorted(DOCKER.glob("Dockerfile*")), ids=lambda file: file.name)
def test_dockerfiles_pass_hadolint(file: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [str(hadolint), "--config", str(DOCKER / "hadolint.yaml"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("variant", ["base", "gpu", "keda"])
def test_kubernetes_manifests_are_valid(variant: str, tmp_path: Path) -> None:
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(DOCKER / "kubernetes" / variant)]
    manifests = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    # There is no schema for KEDA's resources here.
    checked = [part for part in manifests.split("\n---\n") if "keda.sh/" not in part]
    file = tmp_path / "manifests.yaml"
    file.write_text("\n---\n".join(checked), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_containers_in_the_manifests_have_minimal_rights() -> None:
    for file in ("triton.yaml", "gateway.yaml"):
        for part in YAML(typ="safe").load_all(DOCKER / "kubernetes" / "base" / file):
            if part["kind"] not in ("Deployment", "StatefulSet"):
                continue
            pod = part["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            # Kubernetes would set TRITONLM_PORT to the address of a service named tritonlm.
            assert not pod["enableServiceLinks"]
            for container in pod["containers"]:
                rights = container["securityContext"]
                assert rights["readOnlyRootFilesystem"]
                assert not rights["allowPrivilegeEscalation"]
                assert rights["capabilities"] == {"drop": ["ALL"]}
                drain = int(container["args"][container["args"].index("--drain-seconds") + 1])
                # preStop, the drain, and the shutdown itself.
                assert pod["terminationGracePeriodSeconds"] >= drain + 5 + 10


def test_compose_services_have_no_capabilities_and_time_to_drain() -> None:
    services = yaml_of(DOCKER / "compose.yaml")["services"]
    assert {"triton-1", "triton-2", "gateway", "triton-gpu", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        if name not in ("prometheus", "grafana"):
            assert service["stop_grace_period"] == "60s", name


@pytest.mark.parametrize("pair", [("triton-1", "gateway"), ("triton-2", "gateway"), ("triton-gpu", "gateway-gpu")])
def test_compose_shares_the_adapters_between_engines_and_gateway(pair: tuple[str, str]) -> None:
    services = yaml_of(DOCKER / "compose.yaml")["services"]
    folders, mounts = set(), set()
    for service in (services[name] for name in pair):
        folders.add(service["environment"]["TRITONLM_ADAPTERS_FOLDER"])
        mounts.add(tuple(service["volumes"]))
    assert folders == {"/data/tritonlm/adapters"}
    # The default registry of the images, whose XDG_CONFIG_HOME is /data, lies beside it.
    assert mounts == {("models:/data",)}
    assert services["gateway"]["environment"]["HF_HOME"] in (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def test_alert_rules_pass_promtool() -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        result = subprocess.run(
            [promtool, *command], cwd=DOCKER / "prometheus", capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboard_file_matches_its_script() -> None:
    script = load_script(DOCKER / "grafana" / "dashboard.py")
    assert script.FILE.read_text(encoding="utf-8") == script.text()


def test_dashboard_and_alerts_query_only_existing_metrics() -> None:
    known = {spec.prometheus_name for spec in METRIC_SPECS} | set(_NAME.findall(gateway_metrics_table()))
    queries = (DOCKER / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    queries += (DOCKER / "grafana" / "dashboards" / "tritonlm.json").read_text(encoding="utf-8")
    queries += (DOCKER / "kubernetes" / "keda" / "scaled-triton.yaml").read_text(encoding="utf-8")
    for name in set(_NAME.findall(queries)):
        plain = next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)
        assert plain in known, name


def test_the_inflight_bound_changes_ensembles_only() -> None:
    with_inflight_bound = load_script(DOCKER / "newer_triton.py").with_inflight_bound
    for model in ("abacus", "fable", "generate", "detokenize"):
        config = (ROOT / "model_repository" / model / "config.pbtxt").read_text(encoding="utf-8")
        changed = with_inflight_bound(config, 256)
        is_ensemble = model in ("abacus", "fable")
        assert changed.count("max_inflight_requests: 256") == is_ensemble
        # The installed protocol definition lacks the field; without it the text must equal the original.
        rest = changed.replace("  max_inflight_requests: 256\n", "")
        parse = text_format.Parse(rest, model_config_pb2.ModelConfig())
        assert parse == text_format.Parse(config, model_config_pb2.ModelConfig())


V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ZEN4 = V4 | {"avx512_bf16", "avx512_vnni"}
SAPPHIRE = ZEN4 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("flags", "limit", "variant"),
    [
        (set(), "", "plain"),
        (V3, "", "avx2"),
        (V4, "", "avx512"),
        (V4 | {"avx512_bf16"}, "", "avx512"),
        (V4 | {"avx512_vnni"}, "", "avx512vnni"),
        (ZEN4, "", "avx512bf16"),
        (ZEN4 | {"amx_tile", "amx_bf16"}, "", "avx512bf16"),
        (SAPPHIRE, "", "amx"),
        (SAPPHIRE, "avx2", "avx2"),
        (V4, "default", "plain"),
        (V3 - {"fma"}, "", "plain"),
    ],
)
def test_the_isa_variant_matches_the_processors_flags(flags: set[str], limit: str, variant: str) -> None:
    assert isa_variants.choose(flags, limit).name == variant
