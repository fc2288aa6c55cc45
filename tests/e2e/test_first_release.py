"""What the first release left on a node is delivered by this one: frames of version 1, old cards.

`tests/data/first-release` was written by the daemon and the client of then: offline, rank 0 had
ended, the daemon was killed, rank 1 logged on without it and was killed, too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.jobs import assert_exactly, ended_run, own_params
from tests.support.relay import Node

LEFT = Path(__file__).resolve().parents[1] / "data" / "first-release"
RUN_KEY = "first release"
#: Steps that each rank had logged when it ended or was killed.
STEPS = {0: 20, 1: 25}


def test_what_the_first_release_left_is_delivered(tmp_path, mlflow_server):
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        shutil.copytree(LEFT / "spool", node.spool)
        shutil.copytree(LEFT / "journals", node.runtime / "journals")
        for folder in (node.spool, node.runtime / "journals"):
            folder.chmod(0o700)

        node.start()
        run = ended_run(node, mlflow_server, RUN_KEY)

        assert_exactly(
            mlflow_server.all_points(run.info.run_id),
            [
                (prefix + key, step, value)
                for rank, prefix in enumerate(("", "rank_1/"))
                for step in range(STEPS[rank])
                for key, value in (("loss", step + rank / 2), ("lr", 0.001))
            ],
        )
        assert run.info.status == "FAILED"
        assert "rank 1 on node7" in run.data.tags["relay.end_reason"]
        assert run.data.tags["team"] == "ens"
        assert own_params(run) == {"lr": "0.1"}
        counts = node.run()
        assert not counts["dead_letters"] + counts["lost_records"] + counts["damaged_records"]
        assert list((node.runtime / "journals").iterdir()) == []
