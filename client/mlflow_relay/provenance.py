"""Where a run comes from: user, script, commit, command, host, job. These become its tags.

It is asked for in every start_run: no child process, no network of its own, small reads of files
only. What cannot be told is left out; nothing here raises.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .launch import Launch

COMMAND_CHARS_MAX = 5000  # mlflow.entities.RunTag: what every backend takes as a tag's value
_RAW_CHARS_MAX = 2 * COMMAND_CHARS_MAX  # masking may shorten; what lies beyond is never looked at
_PARENT_FOLDERS_MAX = 32
_GIT_FILE_BYTES_MAX = 4 << 20  # packed-refs of a repository with 50,000 branches
_SYMBOLIC_REFS_MAX = 5  # git's own limit, refs.h SYMREF_MAXDEPTH

_MASK = "***"
# Patterns are text, compiled by `re` when first needed: 3 ms that most command lines never cost.
#: Names whose value is a secret, by their end: hf_token and apiKey, but not tokenizer, max_tokens.
_SENSITIVE = (
    r"(?:token|password|passwd|passphrase|secret|secrets|credentials?"
    r"|(?:api|access|private|secret|auth|signing|encryption)[_.\-]?keys?"
    r"|(?<![a-z])(?:pass|pwd|auth|authorization))"
)
#: --db.password=..., {"token": "..."}, ?api_key=...&...; begins where a name begins, or a long word
#: would be tried from each of its letters.
_ASSIGNMENT = (
    rf"(?i)(?<![\w.\-])([\w.\-]*?{_SENSITIVE}[\"']?\s*[:=]\s*)"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s&,;}]+)"
)
#: A whole word of the command line: all behind the = is the value, blanks and all.
_SETTING = rf"(?is)([+~]*[\w.\-]*?{_SENSITIVE}=).*"
_OPTION = rf"(?i)-[\w.\-]*?{_SENSITIVE}"  # its value is the next word
_USERINFO = r"(?<=://)[^/@\s]+(?=@)"
_SCHEME = r"(?i)\b(bearer|basic)\s+[\w.~+/=\-]+"
#: What Hugging Face, GitHub, GitLab, OpenAI, Databricks, Slack, AWS and JWT issuers hand out.
_ISSUED = r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|dapi|xox[abp]-|AKIA|eyJ)[\w.\-]{14,}"
#: Without any of these, in small letters, none of the patterns above can match.
_HINTS = (
    *("token", "pass", "pwd", "secret", "credential", "key", "auth", "://", "bearer", "basic"),
    *("hf_", "gh", "glpat-", "sk-", "dapi", "xox", "akia", "eyj"),
)


def provenance() -> dict[str, str]:
    """Return the tags that tell where this process's run comes from, as far as they can be told.

    `SLURM_JOB_ID` is the name under which Anemoi keeps the job, and its users search for it.
    """
    job = os.environ.get("SLURM_JOB_ID")
    facts: dict[str, Callable[[], str | None]] = {
        "mlflow.user": user,
        "mlflow.source.name": source_name,
        "mlflow.source.type": lambda: "NOTEBOOK" if _notebook() is not None else "LOCAL",
        "mlflow.source.git.commit": lambda: git_commit(_source_folder()),
        "relay.command": lambda: masked_command(sys.orig_argv),
        "relay.hostname": lambda: os.uname().nodename,
        "relay.slurm_job_id": lambda: job,
        "SLURM_JOB_ID": lambda: job,
    }
    tags: dict[str, str] = {}
    for name, fact in facts.items():
        try:
            value = fact()
        except Exception:  # noqa: BLE001, S112  # a tag is never worth a training
            continue
        if value:
            tags[name] = value
    return tags


def launch_tags(launch: Launch) -> dict[str, str]:
    """Return the tags that tell how large the training is."""
    tags = {"relay.world_size": str(launch.world_size)}
    if launch.node_count is not None:
        tags["relay.node_count"] = str(launch.node_count)
    return tags


def user() -> str | None:
    """Return the name of the real user; the environment's only where the uid has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container that knows no users
        names = ("SLURM_JOB_USER", "LOGNAME", "USER", "USERNAME")
        return next((os.environ[name] for name in names if os.environ.get(name)), None)


def source_name() -> str:
    """Return the notebook, the module after `python -m`, or the script; as MLflow names them."""
    notebook = _notebook()
    if notebook:
        return os.path.basename(notebook)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).removesuffix(".__main__")
    return (sys.argv[0] if sys.argv else "") or "<console>"


def _notebook() -> str | None:
    """Return the path of the notebook that this kernel runs, '' if unknown, None if it is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or type(shell).__name__ != "ZMQInteractiveShell":
        return None
    named = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    return str(named or "")


def _source_folder() -> str | None:
    """Return the folder whose repository the code is from, or None if it is installed code."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or _notebook() is not None:
        return os.getcwd()
    folder = os.path.dirname(os.path.abspath(script))
    # A virtual environment often lies in a repository that ignores it.
    is_installed = sys.prefix != sys.base_prefix and f"{folder}/".startswith(f"{sys.prefix}/")
    return None if is_installed else folder


# --- git, read by hand: no child process, no import


def git_commit(folder: str | None) -> str | None:
    """Return the commit that is checked out in the repository around a folder, or None.

    Knows worktrees and submodules (`gitdir:` files), packed and symbolic refs; not reftables.
    Source: gitrepository-layout(5).
    """
    git = None if folder is None else _git_folder(folder)
    if git is None:
        return None
    common = os.path.join(git, (_first_line(f"{git}/commondir") or ".").strip())
    head = _first_line(f"{git}/HEAD")
    for _ in range(_SYMBOLIC_REFS_MAX):
        if head is None or not head.startswith("ref: "):
            break
        ref = head[5:].strip()
        head = _first_line(f"{git}/{ref}") or _first_line(f"{common}/{ref}") or _packed(common, ref)
    commit = (head or "").strip()
    return commit if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit) else None


def _git_folder(folder: str) -> str | None:
    for _ in range(_PARENT_FOLDERS_MAX):
        git = os.path.join(folder, ".git")
        if os.path.isdir(git):
            return git
        link = _first_line(git)
        if link is not None and link.startswith("gitdir: "):
            return os.path.join(folder, link[8:].strip())
        parent = os.path.dirname(folder)
        if parent == folder:
            break
        folder = parent
    return None


def _packed(common: str, ref: str) -> str | None:
    refs = _read(f"{common}/packed-refs") or b""
    end = refs.find(f" {ref}\n".encode())
    return refs[refs.rfind(b"\n", 0, end) + 1 : end].decode() if end > 0 else None


def _first_line(path: str) -> str | None:
    content = _read(path)
    return None if content is None else content.split(b"\n", 1)[0].decode()


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(_GIT_FILE_BYTES_MAX)
    except OSError:
        return None


# --- the command, without its secrets


def masked_command(arguments: list[str]) -> str:
    """Return the command line as a shell would take it, values that look like secrets as ***.

    Returns: at most COMMAND_CHARS_MAX characters, '...' at the end where there was more.
    """
    words: list[str] = []
    chars_left = _RAW_CHARS_MAX
    is_secret = False
    for argument in arguments:
        word = argument[:chars_left]
        chars_left -= len(word) + 1
        words.append(_MASK if is_secret and not argument.startswith("--") else masked(word))
        is_secret = _may_hold_secrets(word) and re.fullmatch(_OPTION, word) is not None
        if chars_left <= 0:
            break
    command = shlex.join(words).replace(f"'{_MASK}'", _MASK)
    if len(command) > COMMAND_CHARS_MAX:
        return command[: COMMAND_CHARS_MAX - 3] + "..."
    return command


def masked(text: str) -> str:
    """Return the text with *** for what looks like a password, key or token."""
    if not _may_hold_secrets(text):
        return text
    setting = re.fullmatch(_SETTING, text)
    if setting is not None:
        return setting[1] + _MASK
    text = re.sub(_USERINFO, _MASK, text)
    text = re.sub(_SCHEME, rf"\1 {_MASK}", text)
    text = re.sub(_ASSIGNMENT, rf"\1{_MASK}", text)
    return re.sub(_ISSUED, _MASK, text)


def _may_hold_secrets(text: str) -> bool:
    small = text.lower()
    return any(hint in small for hint in _HINTS)
