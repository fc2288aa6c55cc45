"""Who am I: tables of environments as the launchers make them, and real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

import pytest

from mlflow_relay import processes
from mlflow_relay.errors import LaunchError
from mlflow_relay.launch import Launch, detect, relay_run_id
from mlflow_relay.processes import launcher_process, own_process

UUID_4 = "3c1a3f0e-7b1c-4f5e-9b0a-2f4f3f9e8d11"

#: Captured from Open MPI 4.1.8, `mpirun -n 2`.
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_MCA_ess_base_jobid": "1976827905",
    "OMPI_MCA_orte_hnp_uri": "1976827904.0;tcp://192.0.2.2:56987;tcp6://[2001:db8::2]:47283",
    "OMPI_MCA_orte_precondition_transports": "3cd0757882da89c5-e294d79190cdecb1",
    "PMIX_NAMESPACE": "1976827905",
    "PMIX_RANK": "1",
}
OPEN_MPI_4_KEY = "mpi/3cd0757882da89c5-e294d79190cdecb1/1976827904.0;tcp://192.0.2.2:56987"
#: Captured from Open MPI 5.0.11, `mpirun -n 2`.
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node7-6470@1",
    "PMIX_RANK": "1",
    "PRTE_LAUNCHED": "1",
}
#: Captured from MPICH 5.0.2, `mpirun -n 2`.
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
TORCHRUN_2_NODES = TORCHRUN | {
    "RANK": "7",
    "WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
}
BATCH_SCRIPT = {
    "SLURM_CLUSTER_NAME": "ac",
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SRUN = BATCH_SCRIPT | {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
SRUN_1_TASK = SRUN | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
SRUN_1_TASK_PER_NODE = SRUN | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
#: What `salloc` gives its shell where LaunchParameters=use_interactive_step.
INTERACTIVE = SRUN_1_TASK | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PTY_PORT": "41245",
    "PMIX_RANK": "0",
    "PMIX_NAMESPACE": "slurm.pmix.4242.4294967290",
}
LIGHTNING_CHILD = {
    "LOCAL_RANK": "2",
    "NODE_RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "40555",
}


def launch(env: dict[str, str], **arguments) -> Launch:
    return detect(
        env, launcher_process=lambda _marks: "PARENT", random_key=lambda: "SELF", **arguments
    )


# --- rank and sizes


@pytest.mark.parametrize(
    ("env", "launcher", "place"),  # rank, local rank, sizes of world and node, node, nodes
    [
        ({}, "plain", (0, 0, 1, 1, 0, 1)),
        (TORCHRUN, "torchrun", (3, 3, 4, 4, 0, 1)),
        (SRUN, "slurm", (6, 2, 8, 4, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, "slurm", (6, 2, 8, 3, 1, 2)),
        (SRUN_1_TASK, "slurm", (0, 0, 1, 1, 0, 1)),
        (SRUN_1_TASK_PER_NODE | TORCHRUN_2_NODES, "torchrun", (7, 3, 8, 4, 1, 2)),
        (BATCH_SCRIPT, "plain", (0, 0, 1, 1, 0, 1)),
        (INTERACTIVE, "plain", (0, 0, 1, 1, 0, 1)),
        (OPEN_MPI_4, "mpi", (1, 1, 2, 2, None, None)),
        (OPEN_MPI_5, "mpi", (1, 1, 2, 2, None, None)),
        (MPICH, "mpi", (1, 1, 2, 2, None, None)),
        (LIGHTNING_CHILD, "lightning", (2, 2, 4, None, 0, None)),
        # Lightning in a shell of Slurm's, and below an srun of one task.
        (INTERACTIVE | LIGHTNING_CHILD, "lightning", (2, 2, 4, None, 0, None)),
        (SRUN_1_TASK | LIGHTNING_CHILD, "lightning", (2, 2, 4, None, 0, None)),
    ],
)
def test_place_is_what_the_launcher_says(env, launcher, place):
    assert launch(env)[:7] == (*place, launcher)


def test_arguments_win_over_the_environment():
    here = launch(TORCHRUN, rank=1, world_size=2, run_key="k")
    assert (here.rank, here.world_size, here.launcher) == (1, 2, "explicit")


def test_arguments_alone_are_enough():
    here = launch({}, rank=2, world_size=4)
    assert (here.rank, here.local_rank, here.world_size) == (2, 2, 4)
    assert here.run_key == "launcher/PARENT"


def test_ranks_of_an_mpirun_in_a_slurm_job_are_those_of_mpi():
    # On all nodes but the first, Slurm's numbers are those of Open MPI's daemon.
    daemon = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    far = OPEN_MPI_4 | {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}
    near = launch(BATCH_SCRIPT | far | {"OMPI_COMM_WORLD_RANK": "0"})
    assert launch(daemon | far).rank == 5
    assert launch(daemon | far).run_key == near.run_key == OPEN_MPI_4_KEY


def test_restarts_of_torchrun_and_of_slurm_are_counted_together():
    assert launch({}).restart_count == 0
    restarted = TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "1"}
    assert launch(restarted).restart_count == 3


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "4"}, "RANK='abc'"),
        ({"RANK": "abc"}, "RANK='abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1'"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1"),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, "rank=1, world_size=unknown"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four'"),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x'"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
        (SRUN | {"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID='batch'"),
        (MPICH | {"PMI_SIZE": "0"}, "PMI_RANK=1 is not below PMI_SIZE=0"),
        (LIGHTNING_CHILD | {"NODE_RANK": "1"}, "rank=unknown, world_size=4"),
    ],
)
def test_a_bad_value_is_named(env, named):
    with pytest.raises(LaunchError) as raised:
        launch(env)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 4, "world_size": 4},
        {"rank": -1, "world_size": 4},
        {"rank": 0, "world_size": 0},
        {"rank": 1},
        {"rank": 1, "world_size": 1},
        {"world_size": 4},
        {"run_key": ""},
        {"run_key": "two\nlines"},
        {"run_key": "x" * 501},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(LaunchError):
        launch({}, **arguments)


def test_a_damaged_environment_is_no_error_where_arguments_say_it_all():
    assert launch({"RANK": "abc", "WORLD_SIZE": "4"}, rank=1, world_size=2).rank == 1


def test_blank_variables_count_as_unset():
    assert launch({"RANK": "", "WORLD_SIZE": " ", "MLFLOW_RELAY_RUN_KEY": ""}).launcher == "plain"


# --- the run key


@pytest.mark.parametrize(
    ("env", "run_key"),
    [
        ({}, "launcher/SELF"),
        (SRUN, "slurm/ac/4242/0"),
        (SRUN | {"SLURM_STEP_ID": "3"}, "slurm/ac/4242/3"),
        (SRUN_1_TASK_PER_NODE | TORCHRUN_2_NODES, "slurm/ac/4242/0"),
        # A batch script may train twice, a shell or a notebook server in a step many times.
        (BATCH_SCRIPT, "launcher/SELF"),
        (BATCH_SCRIPT | TORCHRUN, "launcher/PARENT"),
        (INTERACTIVE, "launcher/SELF"),
        (INTERACTIVE | TORCHRUN, "launcher/PARENT"),
        (INTERACTIVE | MPICH, "launcher/PARENT"),
        (SRUN_1_TASK, "launcher/SELF"),
        (SRUN_1_TASK | TORCHRUN, "launcher/PARENT"),
        # Each task of the step starts a training of its own.
        (SRUN | TORCHRUN, "launcher/PARENT"),
        (SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": UUID_4}, f"torchrun/{UUID_4}"),
        (TORCHRUN, "launcher/PARENT"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "job1"}, "launcher/PARENT"),
        (TORCHRUN_2_NODES | {"TORCHELASTIC_RUN_ID": UUID_4}, f"torchrun/{UUID_4}"),
        (OPEN_MPI_4, OPEN_MPI_4_KEY),
        (OPEN_MPI_5, "launcher/PARENT"),
        (OPEN_MPI_5 | {"PBS_JOBID": "77.pbs"}, "mpi/77.pbs/prterun-node7-6470@1"),
        (MPICH, "launcher/PARENT"),
        (MPICH | {"PALS_RANKID": "1", "PALS_APID": UUID_4}, f"mpi/{UUID_4}"),
        # Lightning's rank 0 is the parent of the others.
        (LIGHTNING_CHILD, "launcher/PARENT"),
        (LIGHTNING_CHILD | {"LOCAL_RANK": "0"}, "launcher/SELF"),
    ],
)
def test_run_key_is_what_never_comes_back(env, run_key):
    assert launch(env).run_key == run_key


def test_run_key_of_the_argument_then_of_the_variable_come_first():
    named = SRUN | {"MLFLOW_RELAY_RUN_KEY": "from env"}
    assert launch(named).run_key == "from env"
    assert launch(named, run_key="from argument").run_key == "from argument"


def test_the_only_task_of_a_slurm_step_goes_on_when_its_job_is_requeued():
    task = SRUN_1_TASK | {"SLURM_TASK_PID": str(os.getpid())}
    assert launch(task).run_key == launch(task | {"SLURM_RESTART_COUNT": "1"}).run_key
    assert launch(task).run_key == "slurm/ac/4242/0"
    # What runs in a batch script, a shell, or as one of several tasks by itself, may run again.
    assert launch(BATCH_SCRIPT | {"SLURM_TASK_PID": str(os.getpid())}).run_key == "launcher/SELF"
    assert launch(INTERACTIVE | {"SLURM_TASK_PID": str(os.getpid())}).run_key == "launcher/SELF"
    assert launch(SRUN_1_TASK | {"SLURM_TASK_PID": "1"}).run_key == "launcher/SELF"
    many = SRUN | {"SLURM_TASK_PID": str(os.getpid())}
    assert launch(many, world_size=1).run_key == "launcher/SELF"


def test_a_process_that_says_it_is_alone_has_a_key_of_its_own():
    here = launch(SRUN, world_size=1)
    assert (here.rank, here.world_size, here.run_key) == (0, 1, "launcher/SELF")


def test_ranks_spawned_by_a_process_of_a_launch_are_one_training():
    assert launch(SRUN_1_TASK, rank=3, world_size=4).run_key == "launcher/PARENT"
    assert launch(SRUN_1_TASK_PER_NODE, rank=3, world_size=8).run_key == "slurm/ac/4242/0"


def test_spawned_ranks_are_not_looked_for_beyond_the_process_that_spawned_them():
    asked = []
    detect(
        SRUN_1_TASK,
        rank=3,
        world_size=4,
        launcher_process=lambda marks: asked.append(marks) or "PARENT",
    )
    assert asked == [{}]


def test_several_trainings_in_one_launch_need_names():
    with pytest.raises(LaunchError, match="SLURM_STEP_NUM_TASKS=8"):
        launch(SRUN, rank=0, world_size=4)
    assert launch(SRUN, rank=0, world_size=4, run_key="first half").run_key == "first half"


@pytest.mark.parametrize(
    ("env", "found"),
    [
        (TORCHRUN_2_NODES, "TORCHELASTIC_RUN_ID=none"),
        (TORCHRUN_2_NODES | {"TORCHELASTIC_RUN_ID": "job1"}, "TORCHELASTIC_RUN_ID=job1"),
        # With nobody saying that all ranks are here, they may be elsewhere.
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "trainer-0"}, "MASTER_ADDR=trainer-0"),
        (LIGHTNING_CHILD | {"MASTER_ADDR": "node7"}, "MASTER_ADDR=node7"),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "4"}, "PMIX_NAMESPACE=prterun-node7-6470@1"),
        # The namespace is that of the Slurm shell that hydra was called in.
        (INTERACTIVE | MPICH | {"PMI_SIZE": "4"}, "PMI_SIZE=4"),
    ],
)
def test_several_nodes_and_nothing_unique_is_an_error_that_says_what_to_pass(env, found):
    with pytest.raises(LaunchError) as raised:
        launch(env)
    text = str(raised.value)
    assert found in text
    assert "run_key=" in text
    assert "export MLFLOW_RELAY_RUN_KEY=" in text


def test_explicit_ranks_in_an_allocation_of_several_nodes_need_a_key():
    with pytest.raises(LaunchError, match="several nodes"):
        launch(BATCH_SCRIPT, rank=0, world_size=8)
    with pytest.raises(LaunchError, match="several nodes"):
        launch({"NODE_RANK": "0"}, rank=0, world_size=8)


def test_a_launcher_that_cannot_be_seen_is_an_error_that_says_what_to_pass():
    def unseen(_marks):
        raise FileNotFoundError(2, "No such file", "/proc/0/stat")

    with pytest.raises(LaunchError, match="run_key="):
        detect(TORCHRUN, launcher_process=unseen, random_key=lambda: "SELF")


# --- the relay run id


def test_relay_run_id_is_32_hex_digits_and_the_same_for_ever():
    # If this changes, every job that spans an upgrade falls into two runs.
    assert relay_run_id("slurm/ac/4242/0", 1) == "c12a231f4edb585c9de3dae1d11f776a"
    assert uuid.UUID(relay_run_id("k", 1)).version == 5


def test_relay_run_ids_differ_by_key_and_by_ordinal():
    ids = {relay_run_id(key, n) for key in ("a", "b", "a#1") for n in (1, 2, 11)}
    assert len(ids) == 9


# --- real processes

SHOW_KEY = """
import os
from mlflow_relay.launch import detect
print(detect(os.environ).run_key, flush=True)
"""
#: Starts two ranks as torchrun does; its arguments are their command.
LAUNCHER = """
import os, subprocess, sys
for rank in "01":
    env = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500",
                        "TORCHELASTIC_RUN_ID": "none"}
    subprocess.run(sys.argv[1:], env=env, check=True)
"""
#: Calls start_run before and after Lightning starts the other ranks of `python train.py`.
LIGHTNING_SCRIPT = (
    SHOW_KEY
    + """
import subprocess, sys
if "LOCAL_RANK" not in os.environ:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="40555", NODE_RANK="0",
                      LOCAL_RANK="0", WORLD_SIZE="3")
    print(detect(os.environ).run_key, flush=True)
    for rank in "12":
        env = os.environ | {"LOCAL_RANK": rank}
        subprocess.run([sys.executable, *sys.argv], env=env, check=True)
"""
)


def run_keys(*argv: object, **variables: str) -> list[str]:
    """Return the lines that a command prints, without this session's own launcher around it."""
    names = ("SLURM_", "OMPI_", "PMI", "PALS_", "MLFLOW_RELAY_", "TORCHELASTIC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        env=env | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()


@pytest.fixture
def train(tmp_path):
    """A script that prints its run key."""
    path = tmp_path / "train.py"
    path.write_text(SHOW_KEY)
    return path


def test_four_ranks_of_this_process_agree_on_its_name(train):
    ranks = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    keys = [run_keys(train, RANK=rank, LOCAL_RANK=rank, **ranks) for rank in "0123"]
    assert keys == [[f"launcher/{own_process()}"]] * 4


def test_two_launches_differ(train):
    first = run_keys("-c", LAUNCHER, sys.executable, train)
    second = run_keys("-c", LAUNCHER, sys.executable, train)
    assert first[0] == first[1] != second[0] == second[1]


def test_two_processes_that_are_alone_differ(train):
    assert run_keys(train) != run_keys(train)


def test_shells_around_the_ranks_are_passed_over(train, tmp_path):
    inner, outer = tmp_path / "inner.sh", tmp_path / "outer.sh"
    inner.write_text(f"{sys.executable} {train}\ntrue\n")  # `true`: else sh would exec Python
    outer.write_text(f"export MORE=1\nsh {inner}\ntrue\n")
    keys = run_keys("-c", LAUNCHER, "sh", outer)
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_a_launcher_that_was_given_rank_0_itself_is_not_passed_over(train):
    # As in a pod of a PyTorchJob: RANK counts pods there, and torchrun replaces it for its ranks.
    keys = run_keys("-c", LAUNCHER, sys.executable, train, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert len(keys) == 2
    assert keys[0] == keys[1] != f"launcher/{own_process()}"


def test_lightnings_ranks_agree_with_the_script_that_starts_them(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LIGHTNING_SCRIPT)
    keys = run_keys(script)
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_a_pid_that_comes_round_again_is_another_name(monkeypatch):
    first = own_process()
    real = processes._stat
    monkeypatch.setattr(processes, "_stat", lambda pid: (*real(pid)[:2], real(pid)[2] + 1))
    assert own_process() != first


def test_a_forked_child_finds_its_parents_name():
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, f"{own_process()} {launcher_process()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    own, parent = os.read(read, 1000).decode().split()
    os.close(read)
    os.close(write)
    assert own != parent == own_process()
