"""Dicts, figures, images and tables → the bytes of a file, as mlflow would write them.

matplotlib, plotly, PIL, NumPy, pandas and yaml are the user's own: the client depends on none of
them, and imports one only where the value comes from it.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

#: Of the small copy of an image that MLflow's UI shows first (mlflow.tracking.multimedia).
THUMBNAIL_PIXELS = 256
_SERIES_KEY = re.compile(r"[a-zA-Z0-9_\-./ ]+")
_PLOTLY_IMAGES = (".png", ".jpeg", ".webp", ".svg", ".pdf")


def dict_bytes(value: Any, name: str) -> bytes:
    """Return JSON, or YAML for a name that says so. Raises: TypeError, ValueError."""
    if name.endswith((".yml", ".yaml")):
        try:
            yaml = import_module("yaml")
        except ImportError:
            pass  # JSON is YAML, too
        else:
            return bytes(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())
    return json.dumps(value, indent=2, default=_plain).encode()


def figure_bytes(figure: Any, name: str, options: dict[str, Any]) -> bytes:
    """Return a figure's file. Raises: TypeError, ValueError: no figure, no such format."""
    suffix = os.path.splitext(name)[1].lower()
    kind = type(figure).__module__.partition(".")[0]
    if hasattr(figure, "savefig"):
        buffer = io.BytesIO()
        figure.savefig(buffer, **{"format": suffix.removeprefix(".") or "png", **options})
        return buffer.getvalue()
    if kind == "plotly" and suffix == ".html":
        options.pop("auto_open", None)  # of write_html alone
        return bytes(figure.to_html(**{"include_plotlyjs": "cdn", **options}).encode())
    if kind == "plotly" and suffix in _PLOTLY_IMAGES:
        return bytes(figure.to_image(**{"format": suffix.removeprefix("."), **options}))
    if kind == "plotly":
        raise TypeError(f"a plotly figure is saved as .html or {', '.join(_PLOTLY_IMAGES)}")
    raise TypeError(f"{type(figure).__name__} is no figure of matplotlib or plotly")


# ── images ──


def to_pil(image: Any) -> Any:
    """Return a PIL image. Raises: TypeError, ValueError: it is none, nor an array of pixels."""
    if hasattr(image, "to_pil"):  # mlflow.Image
        return image.to_pil()
    if hasattr(image, "save") and hasattr(image, "resize"):  # PIL.Image.Image
        return image
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(image, numpy.ndarray):
        raise TypeError(
            f"{type(image).__name__} is no image: a NumPy array, a PIL image or an mlflow.Image"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ValueError(
            f"an image of shape {image.shape}: height x width, with 1, 3 or 4 channels behind"
        )
    return import_module("PIL.Image").fromarray(_to_bytes(numpy, image))


def _to_bytes(numpy: Any, pixels: Any) -> Any:
    """Return pixels as uint8; floats are taken as 0 to 1, and scaled if they go beyond."""
    kind = pixels.dtype.kind
    if kind not in "biuf":
        raise TypeError(f"pixels of type {pixels.dtype}")
    if not pixels.size:
        raise ValueError("an image without pixels")
    low, high = pixels.min(), pixels.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(f"pixels from {low} to {high}: whole numbers go from 0 to 255")
        return pixels.astype(numpy.uint8)
    if kind == "f" and (low < 0 or high > 1):
        pixels = (pixels - low) / ((high - low) or 1)
    return (pixels * 255).astype(numpy.uint8)


def thumbnail(picture: Any) -> Any:
    """Return the image scaled so that its longer side is THUMBNAIL_PIXELS."""
    width, height = picture.size
    scale = THUMBNAIL_PIXELS / max(width, height)
    return picture.resize((max(1, int(width * scale)), max(1, int(height * scale))))


def picture_bytes(picture: Any, name: str) -> bytes:
    """Return an image's file. Raises: ValueError: no format of that name."""
    suffix = os.path.splitext(name)[1].lower()
    form = import_module("PIL.Image").registered_extensions().get(suffix)
    if form is None:
        raise ValueError(f"{name!r}: PIL knows no image format of the name {suffix!r}")
    buffer = io.BytesIO()
    picture.save(buffer, format=form)
    return buffer.getvalue()


def series_name(key: str, step: int, timestamp_ms: int) -> str:
    """Return where an image of a series goes, without its ending, as MLflow's UI looks for it."""
    if not _SERIES_KEY.fullmatch(key):
        raise ValueError(f"image key {key!r}: letters, digits, '_', '-', '.', ' ' and '/' only")
    name = key.replace("/", "~")
    return f"images/{name}+step+{step}+timestamp+{timestamp_ms}+{uuid.uuid4()}"


# ── tables ──


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[Any]]


def add_rows(table: Table | None, data: Any) -> Table:
    """Return the table with the rows of a dict of columns, or of a DataFrame, behind its own.

    Raises: TypeError, ValueError: no table.
    """
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        data = data.to_dict(orient="list")
    if not isinstance(data, Mapping):
        raise TypeError(f"a table is a dict of columns or a DataFrame, not {type(data).__name__}")
    is_column = [_is_column(value) for value in data.values()]
    if not any(is_column):
        data = {name: [value] for name, value in data.items()}
    lists = {str(name): list(value) if _is_column(value) else value for name, value in data.items()}
    count = max((len(each) for each in lists.values() if isinstance(each, list)), default=0)
    full = {name: _as_long(name, each, count) for name, each in lists.items()}
    known = table or Table([], [])
    columns = known.columns + [name for name in full if name not in known.columns]
    gap = [None] * (len(columns) - len(known.columns))
    rows = [row + gap for row in known.rows]
    rows += [[full[name][at] if name in full else None for name in columns] for at in range(count)]
    return Table(columns, rows)


def table_bytes(table: Table, name: str) -> bytes:
    """Return a table's file. Raises: TypeError, ValueError."""
    if name.endswith(".json"):
        content = {"columns": table.columns, "data": table.rows}
        return json.dumps(content, default=_plain).encode()
    if not name.endswith(".parquet"):
        raise ValueError(f"{name!r}: a table's file ends in .json or .parquet")
    buffer = io.BytesIO()
    import_module("pandas").DataFrame(table.rows, columns=table.columns).to_parquet(
        buffer, index=False
    )
    return buffer.getvalue()


def tables_tag(names: Iterable[str]) -> str:
    """Return the tag by which MLflow's UI finds a run's tables."""
    return json.dumps([{"path": name, "type": "table"} for name in names])


def _is_column(value: Any) -> bool:
    return not isinstance(value, str | bytes | Mapping) and hasattr(value, "__iter__")


def _as_long(name: str, column: Any, count: int) -> list[Any]:
    if not isinstance(column, list):
        return [column] * count
    if len(column) != count:
        raise ValueError(f"column {name!r} has {len(column)} rows, another has {count}")
    return column


# ── both ──


def _plain(value: Any) -> Any:
    """Return what JSON knows for what it does not: NumPy's numbers and arrays, dates, paths."""
    for method in ("tolist", "isoformat", "__fspath__"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
