"""What the fuzzer has found stays mended; a few thousand inputs of hypothesis beside it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.crash.cases import fuzz
from tests.crash.fuzz_findings import FINDINGS
from tests.crash.fuzz_targets import TARGETS
from tests.crash.outcome import Job
from tests.support.seeds import new_seed


@pytest.mark.parametrize("name", TARGETS)
def test_what_broke_a_decoder_once_does_not_break_it_again(name):
    for data in (*TARGETS[name].seeds, *FINDINGS.get(name, [])):
        TARGETS[name].run(data)


def test_every_finding_is_of_a_target():
    assert FINDINGS.keys() <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_break_a_decoder(name):
    @settings(deadline=None)  # a busy machine is no finding
    @given(data=st.binary(max_size=300))
    def try_any(data: bytes) -> None:
        TARGETS[name].run(data)

    try_any()


@pytest.mark.parametrize("name", TARGETS)
def test_a_good_input_with_a_changed_part_breaks_no_decoder(name):
    seed = new_seed()
    print(f"seed {seed}")
    rng, target = random.Random(seed), TARGETS[name]
    for _ in range(1000):
        data = bytearray(rng.choice(target.seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice((0, 1, 4))] = rng.randbytes(rng.choice((0, 1, 4)))
        target.run(bytes(data))


def test_the_fuzzer_counts_its_inputs(tmp_path):
    pytest.importorskip("atheris")

    count, findings = fuzz.fuzz("frame", tmp_path, Job(1, 60.0, tmp_path), 3.0)

    assert findings == []
    assert count > len(TARGETS["frame"].seeds)


def test_the_fuzzer_finds_a_planted_bug_and_shows_the_input(tmp_path):
    pytest.importorskip("atheris")

    count, findings = fuzz.fuzz("planted", tmp_path, Job(1, 60.0, tmp_path), 5.0)

    assert count > 0
    assert findings
    assert findings[0].endswith(": b'bug'")
