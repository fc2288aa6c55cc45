"""The calls of a Run that make artifacts: a file is staged, then a record says so.

When a call has returned, its content survives the process. A wrong argument raises; a disk without
room does not: the file stays where it is then, and what is no file is counted as lost.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import clock, settings
from .records import Artifact, pack_artifact
from .staging import (
    NO_ROOM,
    Staged,
    find_room,
    leave_in_place,
    run_folder,
    stage_bytes,
    stage_file,
)
from .values import check_artifact_path

if TYPE_CHECKING:
    from . import media

log = logging.getLogger("mlflow_relay")

LOGGED_TABLES_TAG = "mlflow.loggedArtifacts"  # mlflow.utils.mlflow_tags.MLFLOW_LOGGED_ARTIFACTS
LOGGED_IMAGES_TAG = "mlflow.loggedImages"  # ... MLFLOW_LOGGED_IMAGES


class ArtifactCalls:
    """What `Run` inherits; it brings the rest."""

    run_id: str
    _socket: Path

    def __init__(self) -> None:
        self._tables: dict[str, media.Table] = {}

    # ── files ──

    def log_artifact(
        self,
        local_path: str | os.PathLike[str],
        artifact_path: str | None = None,
        *,
        copy: bool = True,
    ) -> None:
        """Log a file, or a folder with all that is in it, as mlflow does.

        Args:
            local_path: when this returns it may be changed, moved or deleted. One exception: a
                file of 32 MiB and more on a file system without reflinks is kept as a hard link;
                replace such a file by renaming another over it, do not write into it.
            artifact_path: the folder in the run's artifacts; default its root.
            copy: False: the file stays where it is and as it is until it is uploaded (for files
                too large for another copy). If it has changed by then, it becomes a dead letter.

        Raises: OSError, ValueError: there is no such file, it cannot be read, or is no regular
            file; artifact_path is no plain relative path.
        """
        path = os.fspath(local_path)
        folder = "" if not artifact_path else check_artifact_path(artifact_path)
        name = posixpath.basename(os.path.abspath(path))
        target = posixpath.join(folder, name)
        if os.path.isdir(path):
            self.log_artifacts(path, target, copy=copy)
        else:
            self._log_file(path, check_artifact_path(target), copy=copy)

    def log_artifacts(
        self,
        local_dir: str | os.PathLike[str],
        artifact_path: str | None = None,
        *,
        copy: bool = True,
    ) -> None:
        """Log all files of a folder and of those in it.

        A file in it that cannot be taken (gone meanwhile, a FIFO, not readable, a name that no
        store takes) stops neither the rest nor the training: it is named in the log and counted
        as lost.

        Args: as `log_artifact`.
        Raises: NotADirectoryError: it is no folder; ValueError: artifact_path is none.
        """
        top = os.fspath(local_dir)
        if not os.path.isdir(top):
            raise NotADirectoryError(f"{top!r} is no folder")
        root = "" if not artifact_path else check_artifact_path(artifact_path)
        for folder, _, names in os.walk(top):
            inner = os.path.relpath(folder, top)
            target = root if inner == "." else posixpath.join(root, inner)
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    self._log_file(path, check_artifact_path(posixpath.join(target, name)), copy)
                except (OSError, ValueError) as error:
                    self._lose(f"{path!r} is no artifact: {error}")

    def _log_file(self, path: str, target: str, copy: bool) -> None:
        if not copy:
            self._keep_in_place(path, target)
            return
        least = settings.link_bytes_min(os.environ)
        try:
            size = os.stat(path).st_size
            self._keep_staged(target, size, lambda file: stage_file(path, file, least))
        except OSError as error:
            if error.errno not in NO_ROOM or not os.access(path, os.R_OK):
                raise
            log.error(
                "there is no room for a copy of %r (%s): it is uploaded from where it is, and must "
                "stay as it is until then; MLFLOW_RELAY_STAGING names another place",
                path,
                error.strerror,
            )
            self._keep_in_place(path, target)

    # ── content ──

    def log_text(self, text: str, artifact_file: str) -> None:
        """Log text as a file.

        Raises: TypeError, ValueError: no text, or `artifact_file` is no plain relative path.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; it must be a str")
        self._log_bytes(text.encode(errors="surrogatepass"), check_artifact_path(artifact_file))

    def log_dict(self, dictionary: Mapping[str, Any] | list[Any], artifact_file: str) -> None:
        """Log a dict or list as JSON, or as YAML if the file's name ends so.

        Raises: TypeError, ValueError: it cannot be written so.
        """
        from . import media

        target = check_artifact_path(artifact_file)
        self._log_bytes(media.dict_bytes(dictionary, target), target)

    def log_figure(
        self, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Log a figure of matplotlib or plotly.

        Args: save_kwargs: for `savefig`, `to_html` or `to_image`.
        Raises: TypeError, ValueError: no figure, or of no kind that it can be saved as.
        """
        from . import media

        target = check_artifact_path(artifact_file)
        self._log_bytes(media.figure_bytes(figure, target, dict(save_kwargs or {})), target)

    def log_image(  # noqa: PLR0917  # mlflow's order
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        """Log an image: a NumPy array, a PIL image or an mlflow.Image.

        Args:
            artifact_file: a file of this name; or
            key, step, timestamp: a point in a series of images, as MLflow's UI shows them.
            synchronous: as in mlflow; of no meaning here.
        Raises: TypeError, ValueError: no image; both or neither of artifact_file and key.
        """
        from . import media

        if (artifact_file is None) == (key is None):
            raise TypeError("one of artifact_file and key is wanted: a file, or a series of images")
        picture = media.to_pil(image)
        if artifact_file is not None:
            if step is not None or timestamp is not None:
                raise TypeError("step and timestamp go together with key, not with artifact_file")
            target = check_artifact_path(artifact_file)
            self._log_bytes(media.picture_bytes(picture, target), target)
            return
        stem = media.series_name(str(key), step or 0, timestamp or clock.now_ms())
        for name, each in ((".png", picture), ("+compressed.webp", media.thumbnail(picture))):
            target = check_artifact_path(stem + name)
            self._log_bytes(media.picture_bytes(each, target), target)
        self.set_tag(LOGGED_IMAGES_TAG, "True")

    def log_table(self, data: Any, artifact_file: str) -> None:
        """Log rows of a table; a second call with the same file adds to it, as in mlflow.

        What other processes have logged under that name is not read: there may be no server to ask.

        Args:
            data: a dict of columns, or a pandas.DataFrame.
            artifact_file: ends in .json, or in .parquet, which needs pandas.
        Raises: TypeError, ValueError: no table, or one that cannot be written so.
        """
        from . import media

        target = check_artifact_path(artifact_file)
        table = media.add_rows(self._tables.get(target), data)
        content = media.table_bytes(table, target)
        self._tables[target] = table
        self._log_bytes(content, target)
        self.set_tag(LOGGED_TABLES_TAG, media.tables_tag(self._tables))

    def _log_bytes(self, content: bytes, target: str) -> None:
        try:
            self._keep_staged(target, len(content), lambda file: stage_bytes(content, file))
        except OSError as error:
            self._lose(f"there is no room to keep the artifact {target!r}: {error.strerror}")

    # ── both ──

    def _keep_staged(self, target: str, size: int, stage: Callable[[Path], Staged]) -> None:
        """Stage, then keep the record. Crash: between the two, a file is left that no record
        names, and the daemon removes it: the call had not returned.

        Raises: OSError: no room, or the disk's trouble; ValueError: no regular file.
        """
        name = os.urandom(16).hex()
        room = find_room(self._socket, os.environ)
        file = run_folder(room.root, self.run_id) / name
        room.check(size)
        staged, is_kept = stage(file), False
        try:
            is_kept = self._keep(pack_artifact(Artifact(clock.now_ms(), target, name, *staged)))
        finally:
            if not is_kept:
                file.unlink(missing_ok=True)

    def _keep_in_place(self, path: str, target: str) -> None:
        name, staged = os.urandom(16).hex(), leave_in_place(path)
        self._keep(pack_artifact(Artifact(clock.now_ms(), target, name, *staged)))

    def _keep(self, record: bytes) -> bool:
        raise NotImplementedError

    def _lose(self, why: str) -> None:
        raise NotImplementedError

    def set_tag(self, key: str, value: Any) -> None:
        raise NotImplementedError
