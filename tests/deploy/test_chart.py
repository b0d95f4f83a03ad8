"""The Helm chart, rendered by helm and checked against Kubernetes' schemas and our settings."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from helm_chart import Helm, Render
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from interpretops.settings import Settings, load_settings

FULL: dict[str, Any] = {
    "policies": {
        "source": "objectStorage",
        "objectStorage": {"remote": ":s3:policies", "secret": "bucket"},
    },
    "gateway": {
        "autoscaling": {"enabled": True},
        "tlsSecret": "certificate",
        "storage": {"class": "fast"},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "guard", "operator": "Exists"}],
        "env": [{"name": "OTEL_RESOURCE_ATTRIBUTES", "value": "team=a"}],
    },
    "engine": {
        "model": {"name": "big", "folder": "/models/big", "claim": "models"},
        "image": {"tag": "gpu"},
        "replicas": 4,
        "autoscaling": {"enabled": True},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
    },
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
        "gatewayEgress": [{"ports": [{"port": 4318, "protocol": "TCP"}]}],
    },
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "all of it": FULL,
    "policies of a ConfigMap": {"policies": {"source": "configMap", "configMap": "our-policies"}},
}
OPERATORS = ("ServiceMonitor", "PrometheusRule")
"""Kinds of the Prometheus operator, for which Kubernetes has no schema."""

variants = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Component and pod of each StatefulSet."""
    for document in documents:
        if document["kind"] == "StatefulSet":
            yield (
                document["metadata"]["labels"]["app.kubernetes.io/component"],
                document["spec"]["template"]["spec"],
            )


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one document of a kind and name."""
    (found,) = (each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def settings_of(documents: list[dict[str, Any]], tmp_path: Path) -> Settings:
    """The settings that the gateway loads from the chart's configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(one(documents, "ConfigMap", "guard-gateway")["data"]["config.yaml"])
    return load_settings(path, environ={})


def test_chart_is_linted(helm: Helm) -> None:
    """helm's linter reports nothing."""
    done = helm("lint")
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@variants
def test_documents_fit_kubernetes_schemas(values: dict[str, Any], render: Render, tools: Path) -> None:
    """Kubernetes 1.32 and 1.37 accept every document, without unknown keys."""
    documents = [each for each in render(**values) if each["kind"] not in OPERATORS]
    assert len(documents) >= 9
    for path in sorted(tools.glob("schemas-*.json")):
        schema = json.loads(path.read_bytes())
        known = Registry().with_resource(
            "/api/_definitions.json",
            Resource(contents=schema, specification=DRAFT202012),  # type: ignore[call-arg]  # of attrs
        )
        kinds = {
            (each.get("group", ""), each["version"], each["kind"]): name
            for name, definition in schema["$defs"].items()
            for each in definition.get("x-kubernetes-group-version-kind", ())
        }
        for document in documents:
            group, _, version = document["apiVersion"].rpartition("/")
            name = kinds[group, version, document["kind"]]
            checker = Draft202012Validator({"$ref": f"/api/_definitions.json#/$defs/{name}"}, registry=known)
            faults = [f"{fault.json_path}: {fault.message}" for fault in checker.iter_errors(document)]
            assert faults == [], f"{path.name}: {document['kind']} {document['metadata']['name']}"


@variants
def test_gateway_accepts_the_charts_settings(values: dict[str, Any], render: Render, tmp_path: Path) -> None:
    """The chart's configuration loads, with the ports, engine and key file of the pods."""
    documents = render(**values)
    settings = settings_of(documents, tmp_path)
    gateway = one(documents, "StatefulSet", "guard-gateway")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in gateway["ports"]}
    assert ports == {"openai": settings.gateway.port, "admin": settings.gateway.admin_port}
    assert (settings.gateway.host, settings.gateway.admin_host) == ("0.0.0.0", "0.0.0.0")  # noqa: S104
    service = one(documents, "Service", "guard-engine")
    assert settings.engine.url == (f"dns+http://guard-engine:{service['spec']['ports'][0]['port']}",)
    assert service["spec"]["clusterIP"] == "None"
    mounts = {each["mountPath"]: each["name"] for each in gateway["volumeMounts"]}
    assert settings.paths.keys is not None
    assert mounts[str(settings.paths.keys.parent)] == "keys"
    assert (settings.gateway.tls_cert is not None) == ("tls" in mounts.values())


def test_own_settings_win_over_the_charts(render: Render, tmp_path: Path) -> None:
    """Values in `config` win; the rest of a section stays as the chart set it."""
    documents = render(config={"gateway": {"shutdown_grace_s": 20}, "tenants": [{"id": "a"}], "bindings": []})
    settings = settings_of(documents, tmp_path)
    assert (settings.gateway.shutdown_grace_s, settings.gateway.host) == (20, "0.0.0.0")  # noqa: S104
    assert [tenant.id for tenant in settings.tenants] == ["a"]


@variants
def test_pods_are_locked_down_but_can_write_where_needed(
    values: dict[str, Any], render: Render, tmp_path: Path
) -> None:
    """No root, capability, writable root file system, token, or service links as settings."""
    documents = render(**values)
    settings = settings_of(documents, tmp_path)
    found = dict(pods(documents))
    assert found.keys() == {"gateway", "engine"}
    for pod in found.values():
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert rights["allowPrivilegeEscalation"] is False
    (gateway,) = found["gateway"]["containers"]
    writable = [each["mountPath"] for each in gateway["volumeMounts"] if not each.get("readOnly")]
    assert settings.audit.path is not None
    for path in (settings.paths.state, settings.audit.path, Path("/var/cache/interpretops"), Path("/tmp/x")):
        assert any(PurePosixPath(path).is_relative_to(folder) for folder in writable), path
    grace = found["gateway"]["terminationGracePeriodSeconds"]
    assert grace > settings.gateway.shutdown_grace_s + 5


@variants
def test_only_gateways_can_reach_the_engine(values: dict[str, Any], render: Render) -> None:
    """One rule admits only the gateway's pods; nothing may go out."""
    documents = render(**values)
    policy = one(documents, "NetworkPolicy", "guard-engine")["spec"]
    pod_labels = {
        name: one(documents, "StatefulSet", f"guard-{name}")["spec"]["template"]["metadata"]["labels"]
        for name in ("gateway", "engine")
    }
    assert policy["podSelector"]["matchLabels"] == pod_labels["engine"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": pod_labels["gateway"]}}]
    assert [port["port"] for port in rule["ports"]] == ["vllm"]
    assert pod_labels["gateway"] != pod_labels["engine"]


def test_only_monitoring_can_reach_the_admin_listener(render: Render) -> None:
    """The rule that opens the admin port names one namespace; the endpoint's clients may be named."""
    documents = render(**FULL)
    rules = one(documents, "NetworkPolicy", "guard-gateway")["spec"]["ingress"]
    by_port = {port["port"]: rule.get("from") for rule in rules for port in rule["ports"]}
    assert by_port == {
        "openai": FULL["networkPolicy"]["clients"],
        "admin": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }


def test_alerts_and_dashboard_are_those_of_the_repository(render: Render, repository: Path) -> None:
    """The operator's rules and Grafana's dashboard equal the files; the job name matches theirs."""
    documents = render(**FULL)
    deploy = repository / "deploy"
    rules = one(documents, "PrometheusRule", "guard-gateway")["spec"]
    assert rules == yaml.safe_load((deploy / "prometheus" / "rules.yaml").read_bytes())
    shown = one(documents, "ConfigMap", "guard-dashboard")["data"]["interpretops.json"]
    assert shown == (deploy / "grafana" / "interpretops.json").read_text()
    monitor = one(documents, "ServiceMonitor", "guard-gateway")
    labels = one(documents, "Service", "guard-gateway")["metadata"]["labels"]
    assert labels[monitor["spec"]["jobLabel"]] == "interpretops"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_autoscaler_asks_for_a_metric_that_the_adapter_serves(render: Render, repository: Path) -> None:
    """The adapter's rules define the metric, with the kind that the autoscaler asks for."""
    rules = yaml.safe_load((repository / "deploy/prometheus/adapter.yaml").read_bytes())["rules"]
    scaler = one(render(**FULL), "HorizontalPodAutoscaler", "guard-gateway")["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert [each["seriesQuery"].startswith(name + "{") for each in rules["custom"]] == [True]
    scaler = one(render(**FULL), "HorizontalPodAutoscaler", "guard-engine")["spec"]
    (metric,) = scaler["metrics"]
    name = metric["external"]["metric"]["name"]
    assert [each["seriesQuery"].startswith(name + "{") for each in rules["external"]] == [True]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"gatewya": {}}, "gatewya"),
        ({"engine": {"args": ["--host=1.2.3.4"]}}, "/engine/args/0"),
        ({"policies": {"source": "objectStorage"}}, "/policies"),
        ({"policies": {"source": "git"}}, "/policies/source"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str, helm: Helm) -> None:
    """The schema refuses wrong values, and says where they are."""
    done = helm("template", values)
    assert done.returncode != 0
    assert named in done.stderr


def test_image_with_a_digest_ignores_the_tag(render: Render, helm: Helm) -> None:
    """A digest fixes the image: the tag is ignored, and a malformed digest is refused."""
    digest = "sha256:" + "0" * 64
    images = {
        container["image"]
        for document in render(gateway={"image": {"digest": digest}}, engine={"image": {"digest": digest}})
        if document["kind"] == "StatefulSet"
        for container in document["spec"]["template"]["spec"]["containers"]
    }
    assert images == {f"interpretops-gateway@{digest}", f"interpretops-engine@{digest}"}
    wrong = helm("template", {"gateway": {"image": {"digest": "latest"}}})
    assert wrong.returncode != 0
    assert "/gateway/image/digest" in wrong.stderr.replace(".", "/")
    movable = {"policies": {"objectStorage": {"image": "rclone/rclone:1.71.0"}}}
    assert helm("template", movable).returncode != 0
