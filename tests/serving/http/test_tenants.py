"""Keys, limits, and that tenants learn nothing about each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.fake_engine import FakeEngine, spelled

from milora.serving.app import build_app
from milora.serving.errors import ApiError
from milora.serving.process import read_tenants
from milora.serving.requests import QueueFullError
from milora.serving.service import Service
from milora.serving.tenants import Tenant, Tenants, read_digest, read_entries
from milora_core.errors import MiLoraError

from .conftest import ADMIN, bearer, digest, entry

MakeService = Callable[..., Service]


@pytest.fixture
def guarded(make_service: MakeService) -> TestClient:
    return TestClient(
        build_app(
            make_service(
                entry("ada", adapters=["ada"], backbone=True),
                entry("bo", adapters=["bo*"]),
                entry("watch", metrics=True),
            )
        )
    )


def post(client: TestClient, key: str | None, **body: Any) -> Any:
    headers = {} if key is None else bearer(key)
    return client.post("/v1/completions", json={"model": "ada", "prompt": "hey", **body}, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        {"Authorization": "ada-key"},
        {"Authorization": "Basic ada-key"},
        {"Authorization": b"Bearer \xff\xfe"},
        bearer(digest("ada-key")),
    ],
)
def test_requests_without_a_known_key_are_refused(guarded: TestClient, engine: FakeEngine, headers: Any) -> None:
    for path in ("/v1/models", "/metrics", "/nothing"):
        response = guarded.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    response = guarded.post("/v1/completions", content=b"{", headers=headers)
    assert response.status_code == 401
    assert engine.requests == []


def test_health_and_version_need_no_key(guarded: TestClient) -> None:
    assert guarded.get("/health").json() == {"status": "ok"}
    assert set(guarded.get("/version").json()) == {"version"}


def test_a_key_sees_and_uses_its_adapters_only(guarded: TestClient, engine: FakeEngine) -> None:
    engine.known["bo-2"] = Path("/adapters/bo-2")

    def models(key: str) -> list[str]:
        return [card["id"] for card in guarded.get("/v1/models", headers=bearer(key)).json()["data"]]

    assert models("ada-key") == ["base", "ada"]
    assert models("bo-key") == ["bo", "bo-2"]
    assert models("watch-key") == []
    assert models(ADMIN) == ["base", "ada", "bo", "bo-2"]
    assert post(guarded, "ada-key").status_code == 200
    assert post(guarded, "ada-key", model="base").status_code == 200
    assert [request.tenant for request in engine.requests] == ["ada", "ada"]

    # Responses for existing and missing models are the same.
    foreign, missing, hidden = (post(guarded, "bo-key", model=model) for model in ("ada", "boa", "base"))
    for response, name in ((foreign, "ada"), (missing, "boa"), (hidden, "base")):
        assert response.status_code == 404
        expected = f"The model '{name}' does not exist, or this key may not use it."
        assert response.json()["error"]["message"] == expected
        assert guarded.get(f"/v1/models/{name}", headers=bearer("bo-key")).json() == response.json()
    assert guarded.get("/v1/models/bo", headers=bearer("bo-key")).json()["parent"] == "base"
    assert len(engine.requests) == 2


def test_metrics_are_for_keys_that_may_read_them(guarded: TestClient) -> None:
    assert post(guarded, "ada-key").status_code == 200
    assert guarded.get("/metrics", headers=bearer("bo-key")).status_code == 403
    text = guarded.get("/metrics", headers=bearer("watch-key")).text
    assert 'milora_requests_total{route="/v1/completions",status="200",tenant="ada"} 1.0' in text
    assert 'milora_prompt_tokens_total{tenant="ada"} 3.0' in text
    assert 'milora_generated_tokens_total{tenant="ada"} 4.0' in text
    assert 'milora_time_to_first_token_seconds_count{tenant="ada"} 1.0' in text
    assert 'milora_time_per_output_token_seconds_count{tenant="ada"} 1.0' in text
    assert "milora_requests_waiting 3.0" in text
    assert "milora_engine_steps_total 7.0" in text


def test_only_the_admin_key_loads(guarded: TestClient, make_service: MakeService, engine: FakeEngine) -> None:
    body = {"lora_name": "x", "lora_path": "x"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        sent = body if "un" not in path else {"lora_name": "ada"}
        assert guarded.post(path, json=sent, headers=bearer("ada-key")).status_code == 403
        open_server = TestClient(build_app(make_service(admin=False)))
        refused = open_server.post(path, json=sent)
        assert refused.status_code == 403
        assert "--admin-key-file" in refused.json()["error"]["message"]
    assert set(engine.known) == {"ada", "bo"}
    assert guarded.post("/v1/unload_lora_adapter", json={"lora_name": "bo"}, headers=bearer(ADMIN)).status_code == 200
    assert set(engine.known) == {"ada"}


def test_concurrent_requests_are_limited(make_service: MakeService, engine: FakeEngine) -> None:
    service = make_service(entry("ada", adapters=["*"], concurrent_requests=2))
    client = TestClient(build_app(service))
    tenant = service.tenants.of("Bearer ada-key")
    assert tenant is not None
    tenant.begin()
    tenant.begin()
    refused = post(client, "ada-key")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    tenant.end()
    # Requests free their slot when they end, also with an error.
    for refusal in (None, QueueFullError("full"), None):
        engine.refusal = refusal
        assert post(client, "ada-key").status_code == (429 if refusal else 200)
    assert post(client, "ada-key", prompt=[10**6]).status_code == 400
    assert post(client, "ada-key").status_code == 200


def test_tokens_per_minute() -> None:
    now = 100.0
    tenant = Tenant("ada", tokens_per_minute=60, clock=lambda: now)
    tenant.reserve(40)
    tenant.give_back(10)
    tenant.reserve(30)
    with pytest.raises(ApiError, match="try again in 21 seconds") as raised:
        tenant.reserve(20)
    assert (raised.value.status, raised.value.retry_after) == (429, 21)
    now += 20.5
    tenant.reserve(20)
    with pytest.raises(ApiError, match="61 tokens, and this key allows 60"):
        tenant.reserve(61)
    now += 1000
    # Unused tokens accumulate for at most a minute.
    tenant.reserve(60)
    with pytest.raises(ApiError, match="try again"):
        tenant.reserve(1)


def test_unused_tokens_come_back(make_service: MakeService, engine: FakeEngine) -> None:
    client = TestClient(build_app(make_service(entry("ada", adapters=["*"], tokens_per_minute=100))))
    engine.script = lambda request: spelled("yes")
    # Each request reserves 3 + 60 tokens and uses 6.
    for _ in range(6):
        assert post(client, "ada-key", max_tokens=60).status_code == 200
    assert post(client, "ada-key", max_tokens=98).status_code == 400
    assert post(client, "ada-key", max_tokens=97).status_code == 429
    engine.refusal = QueueFullError("full")
    for _ in range(3):
        assert post(client, "ada-key", max_tokens=50).json()["error"]["code"] == "queue_full"
    engine.refusal = None
    # A request without a limit reserves the maximum that its key allows.
    messages = [{"role": "user", "content": "a"}]
    chat = {"model": "ada", "messages": messages}
    assert client.post("/v1/chat/completions", json=chat, headers=bearer("ada-key")).status_code == 429


def test_files_of_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"tenants:\n- name: ada\n  key_sha256: {digest('k')}\n  adapters: [ada, 'ada-*']\n  concurrent_requests: 2\n"
    )
    admin = tmp_path / "admin"
    admin.write_text(f"{digest('root')}  -\n")
    tenants = read_tenants(keys, admin, {})
    found = tenants.of("bearer k")
    assert found is not None
    assert (found.name, found.is_admin, found.concurrent_requests) == ("ada", False, 2)
    assert [found.may_use(name) for name in ("ada", "ada-1", "adam", "Ada")] == [True, True, False, False]
    root = tenants.of("Bearer root")
    assert root is not None
    assert root.is_admin
    assert tenants.of("Bearer other") is None

    of_variables = read_tenants(
        None, None, {"MILORA_KEYS": keys.read_text(), "MILORA_ADMIN_KEY_SHA256": digest("root")}
    )
    assert of_variables.of("Bearer k") is not None
    assert of_variables.has_admin
    everyone = read_tenants(None, None, {}).of(None)
    assert everyone is not None
    assert (everyone.may_use("x"), everyone.backbone, everyone.is_admin) == (True, True, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not YAML"),
        ("tenants: []", "at least one"),
        ("a: b", "list `tenants`"),
        ("tenants: [{name: ada, key_sha256: short}]", "tenant 1.key_sha256"),
        (f"tenants: [{{name: ada, key_sha256: {'a' * 64}, keys: 1}}]", "tenant 1.keys"),
        (f"tenants: [{{name: a b, key_sha256: {'a' * 64}}}]", "tenant 1.name"),
    ],
)
def test_wrong_files_of_keys(text: str, said: str) -> None:
    with pytest.raises(MiLoraError, match=r"^keys\.yaml") as raised:
        read_entries(text, "keys.yaml")
    assert said in str(raised.value)
    assert "short" not in str(raised.value)


def test_keys_and_names_are_each_one_tenant_s() -> None:
    one = entry("ada")
    with pytest.raises(MiLoraError, match="Two tenants"):
        Tenants([one, entry("ada")])
    with pytest.raises(MiLoraError, match="one key"):
        Tenants([one, one.model_copy(update={"name": "bo"})])
    with pytest.raises(MiLoraError, match="one key"):
        Tenants([one], one.key_sha256)
    with pytest.raises(MiLoraError, match="64 hexadecimal digits"):
        read_digest("the key itself", "admin")
