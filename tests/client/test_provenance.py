"""What becomes a run's tags: git by hand against real git, commands without their secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlflow_relay import provenance as module
from mlflow_relay.launch import Launch
from mlflow_relay.provenance import (
    COMMAND_CHARS_MAX,
    git_commit,
    launch_tags,
    masked_command,
    provenance,
    source_name,
    user,
)

# --- all together


def test_provenance_says_who_what_and_where(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    tags = provenance()
    assert tags["mlflow.user"] == user()
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["relay.hostname"] == os.uname().nodename
    assert tags["relay.slurm_job_id"] == tags["SLURM_JOB_ID"] == "4242"
    assert all(tags.values())


def test_what_cannot_be_told_is_left_out(monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("gone")

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(module, "git_commit", fail)
    monkeypatch.setattr(module, "source_name", fail)
    tags = provenance()
    assert "mlflow.source.name" not in tags
    assert "mlflow.source.git.commit" not in tags
    assert "SLURM_JOB_ID" not in tags
    assert "relay.hostname" in tags


def test_provenance_starts_no_process_and_imports_nothing_heavy():
    code = (
        "import sys, mlflow_relay.provenance as p\n"
        "before = set(sys.modules)\n"
        "sys.addaudithook(lambda event, _: sys.exit(event) if event in"
        " ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'socket.connect') else None)\n"
        "p.provenance()\n"
        "heavy = {'subprocess', 'getpass', 'importlib.metadata', 'inspect', 'git'}\n"
        "added = heavy & (set(sys.modules) - before)\n"
        "sys.exit(str(added) if added else 0)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], env=_client_path(), check=False)
    assert done.returncode == 0


def _client_path() -> dict[str, str]:
    # -S: without site, whose .pth files may import anything.
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_launch_tags_say_how_large_the_training_is():
    here = Launch(3, 3, 8, 4, 0, 2, "torchrun", "key", 0)
    assert launch_tags(here) == {"relay.world_size": "8", "relay.node_count": "2"}
    assert launch_tags(here._replace(node_count=None)) == {"relay.world_size": "8"}


# --- user and source


def test_user_is_the_real_one_whatever_the_environment_says(monkeypatch):
    real = user()
    monkeypatch.setenv("USER", "mallory")
    monkeypatch.setenv("LOGNAME", "mallory")
    assert user() == real


def test_user_of_an_unknown_uid_is_the_environments(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(module.pwd, "getpwuid", unknown)
    for name in ("SLURM_JOB_USER", "LOGNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "anna")
    assert user() == "anna"
    monkeypatch.delenv("USER")
    assert user() is None


@pytest.mark.parametrize(
    ("argv", "name"), [(["train.py", "x"], "train.py"), ([""], "<console>"), ([], "<console>")]
)
def test_source_is_the_script(monkeypatch, argv, name):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    monkeypatch.setattr(sys, "argv", argv)
    assert source_name() == name


@pytest.mark.parametrize(("spec", "name"), [("pkg.train", "pkg.train"), ("pkg.__main__", "pkg")])
def test_source_is_the_module_after_m(monkeypatch, spec, name):
    main = SimpleNamespace(__spec__=SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert source_name() == name


@pytest.fixture
def notebook(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {"user_ns": {}})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return shell


def test_a_notebook_is_a_notebook(monkeypatch, notebook):
    assert provenance()["mlflow.source.type"] == "NOTEBOOK"
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/anna/plots.ipynb")
    assert source_name() == "plots.ipynb"
    notebook.user_ns["__vsc_ipynb_file__"] = "/home/anna/other.ipynb"
    assert source_name() == "other.ipynb"


# --- git

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    (folder / "src" / "deep").mkdir(parents=True)
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    return folder


@needs_git
def test_commit_of_a_branch_is_found_from_a_folder_below(repository):
    assert git_commit(str(repository / "src" / "deep")) == git(repository, "rev-parse", "HEAD")


@needs_git
def test_commit_of_packed_refs_is_found(repository):
    for n in range(20):
        git(repository, "branch", f"branch-{n}")
    git(repository, "checkout", "-q", "-b", "feature/x")
    git(repository, "commit", "-q", "--allow-empty", "-m", "two")
    git(repository, "pack-refs", "--all", "--prune")
    assert not (repository / ".git" / "refs" / "heads" / "feature" / "x").exists()
    assert git_commit(str(repository)) == git(repository, "rev-parse", "HEAD")


@needs_git
def test_detached_commit_is_found(repository):
    git(repository, "checkout", "-q", "--detach")
    assert git_commit(str(repository)) == git(repository, "rev-parse", "HEAD")


@needs_git
@pytest.mark.parametrize("packed", [False, True])
def test_commit_of_a_worktree_is_its_own(repository, tmp_path, packed):
    tree = tmp_path / "tree"
    git(repository, "worktree", "add", "-q", "-b", "other", str(tree))
    git(tree, "commit", "-q", "--allow-empty", "-m", "two")
    if packed:
        git(repository, "pack-refs", "--all", "--prune")
    commit = git(tree, "rev-parse", "HEAD")
    assert git_commit(str(tree)) == commit != git(repository, "rev-parse", "HEAD")


@needs_git
def test_commit_of_a_submodule_is_its_own(repository, tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init", "-q")
    git(library, "commit", "-q", "--allow-empty", "-m", "library")
    git(repository, "submodule", "add", "-q", str(library), "lib")
    assert git_commit(str(repository / "lib")) == git(library, "rev-parse", "HEAD")


@needs_git
def test_a_repository_without_a_commit_has_none(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_commit(str(tmp_path)) is None


def test_a_folder_outside_repositories_has_no_commit(tmp_path):
    assert git_commit(str(tmp_path)) is None
    assert git_commit(None) is None


@pytest.mark.parametrize(
    "head", ["", "nonsense", "ref: refs/heads/gone", "ref: HEAD", "ref: ../../../etc/passwd"]
)
def test_a_damaged_repository_has_no_commit(tmp_path, head):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text(head + "\n")
    assert git_commit(str(tmp_path)) is None


def test_installed_code_is_not_of_the_repository_around_its_environment(monkeypatch, tmp_path):
    script = tmp_path / ".venv" / "bin" / "train"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script)))
    assert module._source_folder() is None
    own = tmp_path / "train.py"
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(own)))
    assert module._source_folder() == str(tmp_path)


# --- the command

ISSUED = "hf_" + "a1" * 17


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train.py", "--lr=1e-3", "two words"], "train.py --lr=1e-3 'two words'"),
        (["--token=abc"], "'--token=***'"),
        (["--token=two words"], "'--token=***'"),
        (["--hf-token", "abc", "x"], "--hf-token *** x"),
        (["--password", "a b", "x"], "--password *** x"),
        (["--password", "--verbose"], "--password --verbose"),
        (["db.password=abc", "+model.apiKey=abc"], "'db.password=***' '+model.apiKey=***'"),
        (["WANDB_API_KEY=abc", "run"], "'WANDB_API_KEY=***' run"),
        (["AWS_SECRET_ACCESS_KEY=a/b+c"], "'AWS_SECRET_ACCESS_KEY=***'"),
        (["sh", "-c", "f --token=abc --lr 1"], "sh -c 'f --token=*** --lr 1'"),
        (["--db=postgresql://u:p@host/x"], "'--db=postgresql://***@host/x'"),
        (["https://h/x?access_token=abc&lr=3"], "'https://h/x?access_token=***&lr=3'"),
        (["Authorization: Bearer abc.def"], "'Authorization: *** ***'"),
        (['{"password": "a b", "lr": 1}'], """'{"password": ***, "lr": 1}'"""),
        ([f"x={ISSUED}"], "'x=***'"),
        # What only sounds like a secret is what people want to read.
        (["tokenizer=bert", "--max_tokens=9"], "tokenizer=bert --max_tokens=9"),
        (
            ["bypass=1", "author=anna", "model.token_dim=64"],
            "bypass=1 author=anna model.token_dim=64",
        ),
        (["user@host:/path", "2024-01-01T00:00"], "user@host:/path 2024-01-01T00:00"),
    ],
)
def test_command_shows_everything_but_secrets(arguments, shown):
    assert masked_command(arguments) == shown


@pytest.mark.parametrize("secret", ["s3cr3t-value", ISSUED])
def test_no_secret_is_left_where_the_command_is_cut(secret):
    for filler in range(COMMAND_CHARS_MAX - 60, COMMAND_CHARS_MAX + 10, 3):
        shown = masked_command(["x" * filler, f"--token={secret}", f"a://u:{secret}@h", "y" * 9000])
        assert len(shown) <= COMMAND_CHARS_MAX
        assert shown.endswith("...")
        assert secret[:6] not in shown


def test_a_long_command_is_cut():
    shown = masked_command(["x"] * 100_000)
    assert len(shown) == COMMAND_CHARS_MAX
    assert shown.endswith("...")


@pytest.mark.parametrize(
    "word",
    ["x" * 9000, "token" * 2000, "://" * 3000, "-" * 9000, "token" + " " * 9000, "a.b-" * 2500],
)
@pytest.mark.timeout(5)
def test_no_command_takes_long(word):
    for _ in range(20):
        masked_command([word])
