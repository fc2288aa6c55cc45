"""The client's settings: numbers in their range, or an error that names them."""

from __future__ import annotations

import pytest

from mlflow_relay import settings
from mlflow_relay.errors import RelayError

BYTES, TIMEOUT = "MLFLOW_RELAY_JOURNAL_BYTES_MAX", "MLFLOW_RELAY_END_TIMEOUT_S"


def test_without_a_word_the_defaults_hold():
    assert settings.journal_bytes_max({}) == 256 << 20
    assert settings.end_timeout_s({}) == 5.0
    assert settings.autostart({}) is False


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65536), ("1e9", 10**9), (" 1048576 ", 1 << 20)]
)
def test_a_size_is_a_whole_number_of_bytes(text, value):
    found = settings.journal_bytes_max({BYTES: text})

    assert found == value
    assert type(found) is int


@pytest.mark.parametrize("text", ["", "much", "64k", "65535", "-1", "nan", "inf", "0x10000"])
def test_a_bad_size_is_refused_by_name_value_and_range(text):
    with pytest.raises(RelayError) as refusal:
        settings.journal_bytes_max({BYTES: text})

    assert str(refusal.value).startswith(f"{BYTES}={text!r}: ")
    assert "65536" in str(refusal.value)


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.5", 0.5), ("60", 60.0)])
def test_a_timeout_is_a_number_of_seconds(text, value):
    assert settings.end_timeout_s({TIMEOUT: text}) == value


@pytest.mark.parametrize("text", ["", "soon", "-0.1", "nan", "5s", "inf"])
def test_a_bad_timeout_is_refused_by_name_value_and_range(text):
    """Infinite, too: the end of a training must not wait for ever for a daemon that hangs."""
    with pytest.raises(RelayError) as refusal:
        settings.end_timeout_s({TIMEOUT: text})

    assert str(refusal.value).startswith(f"{TIMEOUT}={text!r}: ")
    assert "at least 0" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("1", "true", "True", "YES", "on")),
        *((text, False) for text in ("", "0", "false", "No", "off")),
    ],
)
def test_a_daemon_is_started_only_for_a_clear_yes(text, value):
    assert settings.autostart({"MLFLOW_RELAY_AUTOSTART": text}) is value
