"""Settings: where they come from, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_relay_daemon import settings_file
from mlflow_relay_daemon.commands.check import settings_lines
from mlflow_relay_daemon.config import (
    SETTINGS,
    Config,
    ConfigError,
    describe,
    load_config,
    unknown_variables,
)
from mlflow_relay_daemon.setting import parse_size, size_text


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings_file, "SYSTEM_FILE", tmp_path / "etc" / "mlflow-relay.toml")
    monkeypatch.delenv("MLFLOW_RELAY_SOCKET", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    assert caught.value.exit_code == 78
    return text


# --- order ------------------------------------------------------------------------------------


def test_a_flag_wins_over_variable_file_and_default(tmp_path: Path, home: dict[str, str]) -> None:
    file = write(tmp_path / "relay.toml", "delivery_threads = 2\n")
    variable = {"MLFLOW_RELAY_DELIVERY_THREADS": "3"}
    found = [
        load_config({"delivery_threads": "4"}, config_file=file, environ={**home, **variable}),
        load_config(config_file=file, environ={**home, **variable}),
        load_config({"delivery_threads": None}, config_file=file, environ=home),
        load_config(environ=home),
    ]
    assert [c.delivery_threads for c in found] == [4, 3, 2, 4]
    assert [c.origin["delivery_threads"] for c in found] == [
        "flag --delivery-threads",
        "MLFLOW_RELAY_DELIVERY_THREADS",
        str(file),
        "default",
    ]


def test_the_first_file_that_exists_is_read_and_no_other(
    tmp_path: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = write(tmp_path / "etc.toml", "log_level = 'error'\nbatch_age_s = 7\n")
    monkeypatch.setattr(settings_file, "SYSTEM_FILE", system)
    assert load_config(environ=home).log_level == "error"
    write(tmp_path / ".config" / "mlflow-relay.toml", "log_level = 'warning'\n")
    assert load_config(environ=home).log_level == "warning"
    assert load_config(environ=home).batch_age_s == 0.5  # files are not merged
    xdg = write(tmp_path / "xdg" / "mlflow-relay.toml", "log_level = 'info'\n").parent
    with_xdg = {**home, "XDG_CONFIG_HOME": str(xdg)}
    assert load_config(environ=with_xdg).origin["log_level"] == str(xdg / "mlflow-relay.toml")
    named = write(tmp_path / "named.toml", "log_level = 'debug'\n")
    with_variable = {**with_xdg, "MLFLOW_RELAY_CONFIG": str(named)}
    assert load_config(environ=with_variable).log_level == "debug"
    assert load_config(config_file=system, environ=with_variable).log_level == "error"


def test_mlflows_own_tracking_uri_comes_before_the_default_and_after_the_file(
    tmp_path: Path, home: dict[str, str]
) -> None:
    theirs = {**home, "MLFLOW_TRACKING_URI": "http://theirs:5000"}
    file = write(tmp_path / "relay.toml", "tracking_uri = 'http://file:5000'\n")
    assert load_config(environ=theirs).tracking_uri == "http://theirs:5000"
    assert load_config(environ=theirs).origin["tracking_uri"] == "MLFLOW_TRACKING_URI"
    assert load_config(config_file=file, environ=theirs).tracking_uri == "http://file:5000"
    assert load_config(environ=home).tracking_uri == (
        f"sqlite:///{home['HOME']}/.local/state/mlflow-relay/mlflow.db"
    )


def test_a_rank_s_relay_uri_is_not_the_daemon_s_target(home: dict[str, str]) -> None:
    config = load_config(environ={**home, "MLFLOW_TRACKING_URI": "relay://"})
    assert config.origin["tracking_uri"] == "default"
    assert "itself" in refusal({"tracking_uri": "relay://"}, environ=home)


def test_a_variable_set_to_nothing_counts_as_not_set(home: dict[str, str]) -> None:
    empty = {setting.variable: "" for setting in SETTINGS.values()}
    assert load_config(environ={**home, **empty}) == load_config(environ=home)


def test_each_node_has_its_own_spool_in_a_shared_home(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spools = set()
    for node in ("node1", "node2"):
        monkeypatch.setattr(socket, "gethostname", lambda node=node: node)
        spools.add(load_config(environ=home).spool)
    state = Path(home["HOME"]) / ".local/state/mlflow-relay"
    assert spools == {state / "node1", state / "node2"}


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says(home: dict[str, str]) -> None:
    assert load_config(environ={**home, "XDG_STATE_HOME": "state"}) == load_config(environ=home)


def test_paths_become_absolute(home: dict[str, str]) -> None:
    config = load_config({"spool": "here", "socket": "~/relay.sock"}, environ=home)
    assert config.spool == Path.cwd() / "here"
    assert config.socket == Path("~/relay.sock").expanduser()


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512_000_000),
        ("2GiB", 2 << 30),
        ("1_000_000", 1_000_000),
        ("64 kb", 64_000),
        ("1.5GB", 1_500_000_000),
        ("0", 0),
        ("3TiB", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", "1e6", "1,000", "0x10", "1 2", "٣MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(min_value=0, max_value=10**15))
def test_a_size_that_is_written_is_read_back(size: int) -> None:
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.most])
def test_both_ends_of_each_range_are_allowed_and_nothing_beyond(
    name: str, home: dict[str, str]
) -> None:
    setting = SETTINGS[name]
    for value in (setting.least, setting.most):
        text = f"{value:f}" if setting.kind == "seconds" else str(int(value))
        assert getattr(load_config(environ={**home, setting.variable: text}), name) == value
    for value in (setting.least - 1, setting.most + 1):
        text = f"{value:f}" if setting.kind == "seconds" else str(int(value))
        assert setting.allowed in refusal(environ={**home, setting.variable: text})


def test_every_default_is_in_its_range(home: dict[str, str]) -> None:
    config = load_config(environ=home)
    for name, setting in SETTINGS.items():
        value = getattr(config, name)
        if setting.most and value is not None:
            assert setting.least <= value <= setting.most, name
        if setting.choices:
            assert value in setting.choices, name


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "ten", "1e400", "10s", "0x10"])
def test_a_duration_that_is_no_number_in_range_is_refused(value: str, home: dict[str, str]) -> None:
    text = refusal(environ={**home, "MLFLOW_RELAY_DRAIN_TIMEOUT_S": value})
    assert text.startswith("MLFLOW_RELAY_DRAIN_TIMEOUT_S: drain_timeout_s = ")
    assert "from 0 to 86400" in text


def test_none_takes_back_what_a_file_has_set(tmp_path: Path, home: dict[str, str]) -> None:
    file = write(tmp_path / "relay.toml", "spool_bytes_max = '2GB'\n")
    assert load_config(config_file=file, environ=home).spool_bytes_max == 2_000_000_000
    lifted = load_config({"spool_bytes_max": "none"}, config_file=file, environ=home)
    assert lifted.spool_bytes_max is None
    assert "free_bytes_min" in refusal({"free_bytes_min": "none"}, environ=home)


# --- refusals ---------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, home: dict[str, str]
) -> None:
    file = write(tmp_path / "relay.toml", "tracking-url = 'http://mlflow'\n")
    text = refusal(config_file=file, environ=home)
    assert str(file) in text
    assert "did you mean tracking_uri?" in text
    file = write(tmp_path / "relay.toml", "[zebra]\nx = 1\n")
    assert "allowed are artifact_bytes_per_s" in refusal(config_file=file, environ=home)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("delivery_threads = 65", "delivery_threads = 65 is refused"),
        ("delivery_threads = true", "a whole number from 1 to 64"),
        ("delivery_threads = 2.0", "a whole number from 1 to 64"),
        ("segment_bytes_max = '1KB'", "a size from 64KB to 1GiB"),
        ("offline = 1", "true or false"),
        ("log_format = 'yaml'", "text or json"),
        ("spool = ''", "a path"),
        ("spool = 2026-01-01", "a path"),
        ("batch_age_s = [1]", "a number of seconds from 0 to 60"),
        ("log_level = 'a\\nb'", "debug or info or warning or error"),
    ],
)
def test_a_bad_value_is_refused_with_file_key_value_and_range(
    tmp_path: Path, home: dict[str, str], line: str, words: str
) -> None:
    file = write(tmp_path / "relay.toml", line)
    text = refusal(config_file=file, environ=home)
    assert text.startswith(f"{file}: {line.partition(' ')[0]} = ")
    assert words in text


def test_a_bad_value_is_refused_even_where_a_flag_hides_it(
    tmp_path: Path, home: dict[str, str]
) -> None:
    file = write(tmp_path / "relay.toml", "batch_age_s = 'soon'\n")
    environ = {**home, "MLFLOW_RELAY_BATCH_AGE_S": "1"}
    assert str(file) in refusal(config_file=file, environ=environ)


def test_a_named_file_must_exist(tmp_path: Path, home: dict[str, str]) -> None:
    missing = tmp_path / "missing.toml"
    assert "flag --config" in refusal(config_file=missing, environ=home)
    environ = {**home, "MLFLOW_RELAY_CONFIG": str(missing)}
    assert refusal(environ=environ).startswith("MLFLOW_RELAY_CONFIG: there is no file")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, home: dict[str, str]) -> None:
    assert f"{tmp_path}: cannot be read" in refusal(config_file=tmp_path, environ=home)
    file = write(tmp_path / "relay.toml", "spool = 'x\n")
    assert f"{file}: is not TOML" in refusal(config_file=file, environ=home)
    file.write_bytes(b"# \xff\n")
    assert f"{file}: is not TOML" in refusal(config_file=file, environ=home)


def test_a_socket_path_over_the_kernels_limit_is_refused_with_its_length(
    home: dict[str, str],
) -> None:
    longest = "/" + "s" * 106
    assert str(load_config({"socket": longest}, environ=home).socket) == longest
    text = refusal({"socket": longest + "s"}, environ=home)
    assert "108 bytes" in text
    assert "MLFLOW_RELAY_SOCKET" in text
    # Bytes count, not characters.
    assert "bytes" in refusal({"socket": "/" + "ü" * 54}, environ=home)


def test_no_home_is_said_and_not_needed_when_everything_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", _no_home)
    assert "HOME" in refusal(environ={})
    flags = {"spool": str(tmp_path), "tracking_uri": "http://mlflow:5000"}
    assert load_config(flags, environ={}).spool == tmp_path


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_misspelt_variable_is_noticed_and_the_clients_own_are_not() -> None:
    environ = {
        "MLFLOW_RELAY_DELIVERY_THREAD": "2",
        "MLFLOW_RELAY_RUN_KEY": "x",
        "MLFLOW_RELAY_AUTOSTART": "1",
        "MLFLOW_RELAY_SPOOL": "/x",
    }
    assert unknown_variables(environ) == {
        "MLFLOW_RELAY_DELIVERY_THREAD": "MLFLOW_RELAY_DELIVERY_THREADS"
    }


# --- secrets ----------------------------------------------------------------------------------


def test_a_password_in_the_uri_is_never_repeated(home: dict[str, str]) -> None:
    uri = "http://ann:hunter2@mlflow:5000"
    config = load_config({"tracking_uri": uri}, environ=home)
    assert config.tracking_uri == uri
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(describe(config))
    assert "hunter2" not in refusal({"tracking_uri": f"{uri}\n"}, environ=home)


# --- completeness -----------------------------------------------------------------------------


def test_every_field_is_a_setting_with_help_and_a_unit_where_it_has_one() -> None:
    for field in dataclasses.fields(Config):
        if field.name == "origin":
            continue
        setting = SETTINGS[field.name]
        assert setting.help.endswith("."), field.name
        assert setting.allowed
        if setting.kind == "seconds":
            assert "_s" in field.name
        if setting.kind == "bytes":
            assert "bytes" in field.name


def test_the_settings_that_check_prints_can_be_kept_as_a_file(
    tmp_path: Path, home: dict[str, str]
) -> None:
    flags = {"spool": str(tmp_path / 'a "b" ü'), "offline": True, "exit_when_idle_s": "2.5",
             "spool_bytes_max": "7MB", "log_format": "json"}  # fmt: skip
    before = load_config(flags, environ=home)
    text = "\n".join(settings_lines(describe(before)))
    after = load_config(config_file=write(tmp_path / "kept.toml", text), environ=home)
    assert after == before
    assert {n for n, origin in after.origin.items() if origin != "default"} == set(flags)
    with_defaults = text.replace("\n# ", "\n")
    assert all(f"\n{name} = " in with_defaults for name in SETTINGS)


# --- fuzz -------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.text(max_size=200),
    st.integers(),
    st.integers(min_value=10**300, max_value=10**320),
    st.floats(),
    st.booleans(),
    st.dates(),
    st.datetimes(),
    st.sampled_from(["none", "1MB", "~", "~nobody-is-called-so/x", "\x1b[31m", "a\0b", "relay://"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
)
KEYS = st.sampled_from(sorted(SETTINGS)) | st.text(max_size=300)


def as_toml(value: object) -> str:
    """Write a value as TOML; some strings come out invalid, which is welcome."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(k)} = {as_toml(v)}" for k, v in value.items()) + "}"
    return str(value)


@pytest.fixture(scope="module")
def fuzzed_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "fuzz.toml"


def check_outcome(path: Path) -> None:
    """Load a file: a Config in range, or an error on one line; nothing else."""
    try:
        config = load_config(config_file=path, environ={"HOME": "/nonexistent"})
    except ConfigError as error:
        text = str(error)
        assert text.isprintable()
        assert str(path) in text
        assert len(text) < 1000
        return
    for name, setting in SETTINGS.items():
        value = getattr(config, name)
        if setting.most and value is not None:
            assert setting.least <= value <= setting.most


@settings(max_examples=400, deadline=None)
@given(table=st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_toml_is_a_config_or_a_config_error(
    fuzzed_file: Path, table: dict[str, object]
) -> None:
    lines = [
        f"{key if key in SETTINGS else as_toml(key)} = {as_toml(value)}"
        for key, value in table.items()
    ]
    fuzzed_file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    check_outcome(fuzzed_file)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_config_or_a_config_error(fuzzed_file: Path, data: bytes) -> None:
    fuzzed_file.write_bytes(data)
    check_outcome(fuzzed_file)


@pytest.mark.parametrize(
    "text",
    [
        "delivery_threads = 0x" + "f" * 10_000,
        "batch_age_s = 0x" + "f" * 10_000,
        "spool = " + "[" * 100_000,
        "batch_age_s = 1e999",
        "delivery_threads = 1" + "0" * 5000,
        "# " + "x" * 2_000_000,
    ],
)
def test_absurd_files_are_refused_like_others(fuzzed_file: Path, text: str) -> None:
    fuzzed_file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(config_file=fuzzed_file, environ={"HOME": "/nonexistent"})
    check_outcome(fuzzed_file)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(SETTINGS)),
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=100),
)
def test_any_variable_is_a_config_or_a_config_error(name: str, value: str) -> None:
    variable = SETTINGS[name].variable
    try:
        load_config(environ={"HOME": "/nonexistent", variable: value})
    except ConfigError as error:
        assert str(error).isprintable()
        assert str(error).startswith(variable)
