"""The files of `deploy/` parse, and all options and metrics in them exist."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_engine import FakeEngine
from typer.testing import CliRunner

from milora.serving.metrics import Metrics
from milora_cli.main import app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
HELP = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["serve", "--help"]).output


@pytest.fixture(scope="module")
def series() -> set[str]:
    """The names of all series that a server exports."""
    metrics = Metrics(FakeEngine().statistics, lambda: False)
    metrics.requests.labels("ada", "/v1/completions", "200").inc()
    for counter in (metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens):
        counter.labels("ada").inc()
    for histogram in (metrics.first_token_seconds, metrics.per_token_seconds, metrics.request_seconds):
        histogram.labels("ada").observe(0.1)
    lines = metrics.text().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_the_dashboard_shows_what_there_is(series: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in shown for name in re.findall(r"\bmilora_\w+", expression)}
    assert len(names) >= 15
    assert names <= series
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_page_lists_every_metric(series: set[str]) -> None:
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    listed = set(re.findall(r"`(milora_\w+)`", page))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series if name.startswith("milora_")}
    assert listed == families


def test_the_container_starts_milora_serve() -> None:
    lines = (DEPLOY / "Containerfile").read_text()
    assert 'ENTRYPOINT ["milora", "serve"]' in lines
    assert "USER milora" in lines
    for source in re.findall(r"^COPY (.+) \S+$", lines, flags=re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists()
    version = re.search(r"torch==(\S+)", lines)
    assert version is not None
    assert f"torch=={version[1]}\n" in (ROOT / "constraints.txt").read_text()


def test_the_unit_s_options_exist() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((DEPLOY / "milora.service").read_text().replace("\\\n", " "))
    options = re.findall(r"--[\w-]+", unit["Service"]["ExecStart"])
    assert len(options) >= 6
    assert all(option in HELP for option in options)


def test_the_manifest_is_consistent() -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes-vllm.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert set(by_kind) == {"PersistentVolumeClaim", "Secret", "Deployment", "Service"}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"].items() <= labels.items()
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]} <= ports
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert secret["name"] == by_kind["Secret"]["metadata"]["name"]
    assert secret["key"] in by_kind["Secret"]["stringData"]
    assert "--enable-lora" in container["args"]


def test_the_pages_options_exist() -> None:
    for page in ("serve.md", "deploy.md", "security.md"):
        text = (ROOT / "docs" / "how-to" / page).read_text()
        for line in re.findall(r"`(--[\w-]+)", text):
            if line not in ("--tensor-parallel-size", "--stop-timeout", "--shared-words", "--lora-modules"):
                assert line in HELP, f"{page}: {line}"
