"""What operators are given as files: Dockerfiles, compose, Kubernetes, alerts, dashboard. Checked without running them.

`docker/try_containers.py` runs the images; `tests/over_triton/test_dashboards.py` asks a live Prometheus.
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
from engine.monitoring.metrics import MEASURES
from engine.runners.native import isa_variants as forms
from google.protobuf import text_format
from ruamel.yaml import YAML
from tritonclient.grpc import model_config_pb2

DOCKER = ROOT / "docker"
_NAME = re.compile(r"\btritonlm_\w+")
_PARTS = ("_bucket", "_count", "_sum")


def loaded(file: Path) -> ModuleType:
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
def test_dockerfiles_are_as_they_should_be(file: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [str(hadolint), "--config", str(DOCKER / "hadolint.yaml"), str(file)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("variant", ["base", "gpu", "keda"])
def test_kubernetes_takes_the_manifests(variant: str, tmp_path: Path) -> None:
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("no kubectl here to put the manifests together")
    command = [kubectl, "kustomize", str(DOCKER / "kubernetes" / variant)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    # What KEDA adds to Kubernetes no schema here knows.
    known = [part for part in made.split("\n---\n") if "keda.sh/" not in part]
    file = tmp_path / "manifests.yaml"
    file.write_text("\n---\n".join(known), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_nobody_in_the_manifests_may_more_than_he_must() -> None:
    for file in ("triton.yaml", "gateway.yaml"):
        for part in YAML(typ="safe").load_all(DOCKER / "kubernetes" / "base" / file):
            if part["kind"] not in ("Deployment", "StatefulSet"):
                continue
            pod = part["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                rights = container["securityContext"]
                assert rights["readOnlyRootFilesystem"]
                assert not rights["allowPrivilegeEscalation"]
                assert rights["capabilities"] == {"drop": ["ALL"]}
                drain = int(container["args"][container["args"].index("--drain-seconds") + 1])
                # preStop, the drain, and what the end itself takes.
                assert pod["terminationGracePeriodSeconds"] >= drain + 5 + 10


def test_compose_gives_all_of_them_time_to_drain_and_no_rights() -> None:
    services = yaml_of(DOCKER / "compose.yaml")["services"]
    assert {"triton-1", "triton-2", "gateway", "triton-gpu", "prometheus", "grafana"} <= set(services)
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        if name not in ("prometheus", "grafana"):
            assert service["stop_grace_period"] == "60s", name


def test_alerts_fire_when_they_should() -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not here (Debian: prometheus)")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        told = subprocess.run(
            [promtool, *command], cwd=DOCKER / "prometheus", capture_output=True, text=True, timeout=60, check=False
        )
        assert told.returncode == 0, told.stdout + told.stderr


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = loaded(DOCKER / "grafana" / "dashboard.py")
    assert script.FILE.read_text(encoding="utf-8") == script.text()


def test_dashboard_and_alerts_ask_only_for_what_there_is() -> None:
    known = {measure.published_name for measure in MEASURES} | set(_NAME.findall(gateway_metrics_table()))
    asked = (DOCKER / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    asked += (DOCKER / "grafana" / "dashboards" / "tritonlm.json").read_text(encoding="utf-8")
    asked += (DOCKER / "kubernetes" / "keda" / "scaled-triton.yaml").read_text(encoding="utf-8")
    for name in set(_NAME.findall(asked)):
        plain = next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)
        assert plain in known, name


def test_newer_tritons_get_their_bound_and_the_rest_stays_as_it_was() -> None:
    bounded = loaded(DOCKER / "newer_triton.py").bounded
    for model in ("abacus", "fable", "generate", "detokenize"):
        config = (ROOT / "model_repository" / model / "config.pbtxt").read_text(encoding="utf-8")
        made = bounded(config, 256)
        is_ensemble = model in ("abacus", "fable")
        assert made.count("max_inflight_requests: 256") == is_ensemble
        # This machine's protocol does not know the field; without it the text is still a configuration.
        rest = made.replace("  max_inflight_requests: 256\n", "")
        parse = text_format.Parse(rest, model_config_pb2.ModelConfig())
        assert parse == text_format.Parse(config, model_config_pb2.ModelConfig())


V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ZEN4 = V4 | {"avx512_bf16", "avx512_vnni"}
SAPPHIRE = ZEN4 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("flags", "limit", "form"),
    [
        (set(), "", "plain"),
        (V3, "", "avx2"),
        (V4, "", "avx512"),
        (V4 | {"avx512_bf16"}, "", "avx512"),
        (ZEN4, "", "avx512bf16"),
        (ZEN4 | {"amx_tile", "amx_bf16"}, "", "avx512bf16"),
        (SAPPHIRE, "", "amx"),
        (SAPPHIRE, "avx2", "avx2"),
        (V4, "default", "plain"),
        (V3 - {"fma"}, "", "plain"),
    ],
)
def test_an_image_chooses_the_kernels_that_its_machine_can_run(flags: set[str], limit: str, form: str) -> None:
    assert forms.choose(flags, limit).name == form
