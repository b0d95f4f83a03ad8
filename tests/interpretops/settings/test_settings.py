"""Settings: defaults that need no file, three sources in order, faults that name source, field and value."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from interpretops.errors import ConfigError
from interpretops.settings import NO_EFFECT_YET, Settings, load_settings
from interpretops.settings.environment import NOT_SETTINGS

REFERENCE = Path(__file__).resolve().parents[2] / "fixtures" / "reference-config.yaml"
DSN = "postgresql://user:pass@localhost:5432/interpretops"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(path: Path | None = None, overrides: dict[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides, environ)
    return str(caught.value)


def test_no_file_is_needed() -> None:
    """Everything has a default: ports on the loopback address, a local engine, nothing stored elsewhere."""
    settings = load_settings(environ={})
    assert settings == Settings()
    assert (settings.gateway.host, settings.gateway.port) == ("127.0.0.1", 8000)
    assert (settings.gateway.admin_host, settings.gateway.admin_port) == ("127.0.0.1", 8001)
    assert settings.engine.url == ()
    assert settings.store.postgres_dsn is None
    assert settings.paths.plans is None


def test_default_bindings_offer_every_policy_and_impose_none() -> None:
    """Out of the box any loaded policy may be chosen and none applies unasked."""
    (binding,) = load_settings(environ={}).bindings
    assert (binding.policy, binding.mode) == ("*", "optional")
    assert binding.match.model_dump() == dict.fromkeys(("tenant", "key", "model_alias", "route"))


def test_reference_configuration_loads_as_it_stands() -> None:
    """The configuration file that users write is read whole, with every value where it belongs."""
    settings = load_settings(REFERENCE, environ={})
    assert settings.model.name == "EleutherAI/pythia-1.4b"
    assert (settings.model.dtype, settings.model.device) == ("bfloat16", "cuda")
    assert settings.cache.dir == REFERENCE.parent / ".io_cache"
    assert settings.store.postgres_dsn is not None
    assert settings.store.postgres_dsn.get_secret_value() == DSN
    assert settings.store.s3_bucket == "interpretops-artifacts"
    assert settings.runtime.max_latency_overhead_pct == 20
    assert (settings.compliance.pii_redaction, settings.compliance.retention_days) == (True, 14)


def test_setting_without_effect_is_told_and_its_secret_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference file loads; each of its settings that nothing reads yet is one line, no default is."""
    load_settings(REFERENCE, environ={})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[1].split(" is set")[0] for line in lines] == list(NO_EFFECT_YET)
    assert all(line.startswith(f"{REFERENCE}: ") and "has no effect yet: " in line for line in lines)
    assert "pass@" not in caplog.text
    caplog.clear()
    load_settings(environ={"INTERPRETOPS_STORE_S3_BUCKET": "b"})
    assert caplog.records[0].getMessage().startswith("INTERPRETOPS_STORE_S3_BUCKET: store.s3_bucket is set")
    caplog.clear()
    load_settings(environ={})
    assert caplog.records == []


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    """A value is taken from the command line, else the environment, else the file, else the default."""
    path = write(tmp_path, "gateway: {port: 1, admin_port: 2, host: a, max_body_bytes: 2048}\n")
    environ = {"INTERPRETOPS_GATEWAY_PORT": "3", "INTERPRETOPS_GATEWAY_ADMIN_PORT": "4"}
    gateway = load_settings(path, {"gateway.port": 5, "gateway.host": None}, environ).gateway
    assert (gateway.port, gateway.admin_port, gateway.host, gateway.max_body_bytes) == (5, 4, "a", 2048)
    assert gateway.body_timeout_s == 30


def test_environment_names_the_file(tmp_path: Path) -> None:
    """INTERPRETOPS_CONFIG stands in for --config, and --config wins over it."""
    path = write(tmp_path, "gateway: {port: 1}\n")
    other = tmp_path / "other.yaml"
    other.write_text("gateway: {port: 2}\n")
    environ = {"INTERPRETOPS_CONFIG": str(path)}
    assert load_settings(environ=environ).gateway.port == 1
    assert load_settings(other, environ=environ).gateway.port == 2


def test_environment_spells_every_kind_of_value() -> None:
    """Texts stay texts even when they look like numbers; numbers, booleans and lists are read as such."""
    settings = load_settings(
        environ={
            "INTERPRETOPS_CACHE_DIR": "/somewhere/else",
            "INTERPRETOPS_MODEL_NAME": "123",
            "INTERPRETOPS_GATEWAY_WATCH_POLICIES": "false",
            "INTERPRETOPS_ENGINE_ENFORCE_EAGER": "true",
            "INTERPRETOPS_ENGINE_EXTRA_ARGS": "[--seed=1, --max-logprobs=5]",
            "INTERPRETOPS_BINDINGS": "[{policy: calm, mode: mandatory}]",
            "ANOTHER_TOOLS_INTERPRETOPS_PORT": "x",
        }
    )
    assert settings.cache.dir == Path("/somewhere/else")
    assert settings.model.name == "123"
    assert settings.gateway.watch_policies is False
    assert settings.engine.enforce_eager is True
    assert settings.engine.extra_args == ("--seed=1", "--max-logprobs=5")
    assert [(b.policy, b.mode) for b in settings.bindings] == [("calm", "mandatory")]


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    """A file means the same from whichever folder a command is started."""
    path = write(
        tmp_path, "model: {name: ./tiny}\npaths: {policies: p, plans: ../plans}\ncache: {dir: /abs}\n"
    )
    settings = load_settings(path, environ={})
    assert settings.paths.policies == tmp_path / "p"
    assert settings.paths.plans == tmp_path / ".." / "plans"
    assert settings.cache.dir == Path("/abs")
    assert Path(settings.model.name) == tmp_path / "tiny"


def test_wrong_value_names_file_field_value_and_remedy(tmp_path: Path) -> None:
    """One line per fault, with the file it stands in."""
    path = write(tmp_path, "gateway:\n  port: 99999\ncompliance:\n  retention_days: soon\n")
    assert fault(path).splitlines() == [
        f'{path}: compliance.retention_days = "soon", but it should be a valid integer',
        f"{path}: gateway.port = 99999, but it should be less than or equal to 65535",
    ]


def test_fault_names_the_source_it_came_from() -> None:
    """A wrong variable and a wrong flag are named as such and not blamed on a file."""
    text = fault(None, {"gateway.port": -1}, INTERPRETOPS_GATEWAY_ADMIN_PORT="high")
    assert "command line: gateway.port = -1, but" in text
    assert 'INTERPRETOPS_GATEWAY_ADMIN_PORT: gateway.admin_port = "high", but' in text


@pytest.mark.parametrize("text", ["gatewy: {}\n", "gateway: {prot: 1}\n"])
def test_unknown_keys_are_refused_with_the_known_ones(tmp_path: Path, text: str) -> None:
    """A misspelt section or field stops the start, and the message lists what exists there."""
    message = fault(write(tmp_path, text))
    assert "is not a setting; known here: " in message
    assert ("gateway" if "gatewy" in text else "port") in message.split("known here: ")[1]


def test_misspelt_variable_of_a_known_section_is_refused() -> None:
    """INTERPRETOPS_GATEWAY_PROT is a mistake and not another tool's variable."""
    assert "INTERPRETOPS_GATEWAY_PROT: gateway.prot is not a setting" in fault(INTERPRETOPS_GATEWAY_PROT="1")


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        (
            "INTERPRETOPS_GATEWAY_PROT",
            "gateway.prot is not a setting; did you mean INTERPRETOPS_GATEWAY_PORT",
        ),
        ("INTERPRETOPS_GATEWY_PORT", "no section 'gatewy'; did you mean INTERPRETOPS_GATEWAY_PORT"),
        (
            "INTERPRETOPS_GATEWAY__PORT",
            "gateway._port is not a setting; did you mean INTERPRETOPS_GATEWAY_PORT",
        ),
        ("INTERPRETOPS_PORT", "no section 'port'; did you mean INTERPRETOPS_GATEWAY_PORT"),
        ("INTERPRETOPS_FOO_BAR", "no section 'foo'; docs/configuration.md lists"),
        ("INTERPRETOPS_", "no section ''; docs/configuration.md lists"),
        ("INTERPRETOPS_GATEWAY", "gateway is a section; each of its fields has a variable of its own"),
        ("INTERPRETOPS_GATEWAY_", "gateway is a section; each of its fields"),
        ("INTERPRETOPS_BINDINGS_0_POLICY", "as a whole; write all of it as YAML in INTERPRETOPS_BINDINGS"),
        ("INTERPRETOPS_gateway_port", "in capitals; write INTERPRETOPS_GATEWAY_PORT"),
        ("interpretops_gateway_port", "in capitals; write INTERPRETOPS_GATEWAY_PORT"),
        ("Interpretops_Config", "in capitals; write INTERPRETOPS_CONFIG"),
        ("INTERPRETOPS_SERVICE_HOST", "`enableServiceLinks: false` in the pod"),
        ("INTERPRETOPS_PORT_8000_TCP_ADDR", "`enableServiceLinks: false` in the pod"),
    ],
)
def test_variable_that_sets_nothing_is_refused_with_the_nearest_one(variable: str, told: str) -> None:
    """Whatever begins with our prefix and is no setting stops the start; its value is not repeated."""
    text = fault(None, None, **{variable: "hunter2"})
    assert text.startswith(f"{variable}: ")
    assert told in text
    assert "hunter2" not in text


def test_every_variable_that_sets_nothing_is_named_at_once() -> None:
    """One line for each."""
    assert len(fault(None, None, INTERPRETOPS_A_B="1", INTERPRETOPS_C="2").splitlines()) == 2


def test_variables_of_ours_that_are_no_settings_are_known() -> None:
    """What commands read beside the settings is declared with them, and refuses no start."""
    sources = Path(__file__).resolve().parents[3]
    named = {
        name
        for package in ("interpretops", "mechctl", "proxy", "discovery", "steering_kernels", "benchmarks")
        for path in (sources / package).rglob("*.py")
        for name in re.findall(
            r"(?:environ(?:\.get\(|\[)|getenv\(|envvar=)\"(INTERPRETOPS_\w+)", path.read_text()
        )
    }
    assert named <= NOT_SETTINGS
    assert load_settings(environ={"INTERPRETOPS_DATA": "/data"}) == Settings()


@pytest.mark.parametrize(
    "text", ["gateway: {port: '8000'}\n", "gateway: {port: true}\n", "model: {name: 5}\n"]
)
def test_values_of_another_type_are_refused(tmp_path: Path, text: str) -> None:
    """A text is no number and a number is no text."""
    assert ", but it should be a valid" in fault(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("gateway: {body_timeout_s: .nan}\n", "gateway.body_timeout_s"),
        ("gateway: {port: 8001}\n", "gateway: port and admin_port are both 8001"),
        ("engine: {url: 'localhost:1'}\n", "engine.url"),
        ("engine: {extra_args: [--served_model_name=x]}\n", "extra_args[0] = '--served_model_name=x'"),
        ("engine: {extra_args: [--uds, x]}\n", "extra_args[0] = '--uds'"),
        ("bindings: [{policy: '*', mode: mandatory}]\n", "bindings[0]"),
        ("bindings: [{policy: a, match: {key: '!'}}]\n", "bindings[0].match.key"),
        ("bindings: [{policy: a, match: {tenant: acme}}]\n", ": bindings[0].match.tenant = 'acme'"),
        (
            "paths: {keys: k}\nbindings: [{policy: a, match: {tenant: acme}}]\n",
            "tenants declares no such tenant; none is known",
        ),
        ("tenants: [{id: a}, {id: a}]\n", "tenants: 'a' is declared twice"),
        ("gateway: {tls_cert: c.pem}\n", "tls_cert and tls_key belong together"),
        ("store: {s3_endpoint: 'ftp://x'}\n", "store.s3_endpoint"),
        ("model: {device: tpu}\n", "model.device"),
        ("gateway: 5\n", "gateway = 5"),
        ("- gateway\n", "holds a list"),
        ("gateway: &a {}\nengine: *a\n", "anchor"),
        ("gateway: {}\ngateway: {}\n", "twice"),
        ("gateway: [\n", "YAML"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(tmp_path: Path, text: str, field: str) -> None:
    """Each fault is a `ConfigError` that names the file and the field."""
    path = write(tmp_path, text)
    message = fault(path)
    assert message.startswith(str(path))
    assert field in message


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    """A configuration that was named but is not there stops the start."""
    assert "cannot be read" in fault(tmp_path / "none.yaml")


def test_absent_section_may_be_written_as_a_bare_key(tmp_path: Path) -> None:
    """A section whose lines are all commented out takes its defaults."""
    assert load_settings(write(tmp_path, "gateway:\n  # port: 1\n"), environ={}) == Settings()


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    """Neither `repr` nor a complaint about the secret itself gives the database password away."""
    assert "pass@" not in repr(load_settings(REFERENCE, environ={}))
    wrong = write(tmp_path, "store: {postgres_dsn: 'mysql://user:hunter2@host/db'}\n")
    assert "hunter2" not in fault(wrong)
    assert "hunter2" not in fault(write(tmp_path, "store: {postgres_dsn: [hunter2]}\n"))
    assert "hunter2" not in fault(write(tmp_path, "limits: {redis_url: 'http://:hunter2@host'}\n"))


def test_settings_cannot_change_after_loading() -> None:
    """Frozen: what was checked at start-up is what runs."""
    with pytest.raises(ValidationError, match="frozen"):
        load_settings(environ={}).gateway.port = 1  # type: ignore[misc]


def test_served_name_is_alias_then_folder_then_id(tmp_path: Path) -> None:
    """Clients see the alias, else a folder's own name, else the name as given."""
    assert load_settings(environ={}).model.served_name == "smollm2-135m-instruct"
    (tmp_path / "tiny").mkdir()
    overrides: dict[str, object] = {"model.name": str(tmp_path / "tiny")}
    assert load_settings(None, overrides, {}).model.served_name == "tiny"
    assert load_settings(None, {"model.name": "a/b"}, {}).model.served_name == "a/b"
    assert load_settings(None, overrides | {"model.alias": "mine"}, {}).model.served_name == "mine"
