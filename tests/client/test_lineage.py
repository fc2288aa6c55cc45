"""What a rank may say of its run's ancestry."""

from __future__ import annotations

import uuid

import pytest

from mlflow_relay.lineage import RESUME_MODES, checked_lineage, run_id

ID = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32

FOUND = {
    "as it is": ID,
    "in capitals": ID.upper(),
    "as a UUID": str(uuid.UUID(ID)),
    "with blanks around it": f"  {ID}\n",
}

WRONG = {
    "a name": "o96 baseline",
    "nothing": "",
    "too short": ID[:-1],
    "too long": ID + "0",
    "another letter": ID[:-1] + "g",
    "a path": f"runs/{ID}",
    "other digits": "\N{ARABIC-INDIC DIGIT ZERO}" * 32,
}


@pytest.mark.parametrize("given", FOUND.values(), ids=FOUND)
def test_an_id_has_one_spelling(given):
    assert run_id("resume", given) == ID


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["resume", "fork"])
def test_what_is_no_id_is_refused_by_name_and_value(name, given):
    with pytest.raises(ValueError, match="32 hex digits") as caught:
        checked_lineage(**{"resume": None, "fork": None, "resume_mode": "child", name: given})
    assert f"{name}={given!r}" in str(caught.value)


@pytest.mark.parametrize("given", [17, b"0" * 32, uuid.UUID(ID), ["a"]])
def test_what_is_no_text_is_refused_by_type(given):
    with pytest.raises(TypeError, match=f"resume=.*{type(given).__name__}"):
        checked_lineage(given, "child", None)


@pytest.mark.parametrize("mode", RESUME_MODES)
def test_nothing_given_means_no_ancestors(mode):
    assert checked_lineage(None, mode, None) == {"resume": "", "resume_mode": mode, "fork": ""}


def test_a_child_may_start_from_other_weights():
    fields = checked_lineage(ID, "child", OTHER)
    assert fields == {"resume": ID, "resume_mode": "child", "fork": OTHER}


def test_a_run_that_goes_on_as_itself_cannot_start_from_other_weights():
    with pytest.raises(ValueError, match=r"fork.*same"):
        checked_lineage(ID, "same", OTHER)


@pytest.mark.parametrize("mode", ["", "Same", "copy", None, 1])
def test_another_mode_is_refused(mode):
    with pytest.raises(ValueError, match="child, same"):
        checked_lineage(ID, mode, None)
