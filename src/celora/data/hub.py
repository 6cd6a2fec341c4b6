"""A data set of the Hugging Face Hub: `hub:ag_news`, `hub:owner/name@revision`, `hub:glue:configuration`.

The only module that imports `datasets`, and only when it is asked to: `pip install "celora[hub]"`.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from celora.data.columns import SPLIT_NAMES, Columns, Sheet
from celora.data.gather import gather
from celora.data.table import Table, listing
from celora.errors import DataError


def read_hub(name: str, columns: Columns) -> Table:
    """The table behind `hub:<name>`; its train, validation and test splits are kept as they are.

    Splits of other names ("unsupervised") are left out with a notice, as are rows with the Hub's mark for
    "no label", -1.

    Args:
        name: `data set[:configuration][@revision]`; give a revision if the run is to be repeatable.

    Raises:
        DataError: if `datasets` is not installed, the data set cannot be loaded, or a column is missing.
    """
    library = _library()
    path, _, revision = name.partition("@")
    path, _, configuration = path.partition(":")
    try:
        found: Mapping[str, Any] = library.load_dataset(path, configuration or None, revision=revision or None)
    except Exception as error:  # network, credentials, builder code: `datasets` has no common base class
        raise DataError(
            f"the Hub data set {path!r} cannot be loaded: {type(error).__name__}: {error}. "
            "Check the network and the name on https://huggingface.co/datasets, or give the path of Parquet "
            "files that hold it."
        ) from error
    known = {split: SPLIT_NAMES[split] for split in found if split in SPLIT_NAMES}
    if "train" not in known.values():
        raise DataError(f"the Hub data set {path!r} has the splits {listing(found)}, expected 'train' among them.")
    table = gather([_sheet(library, path, split, found[split], columns) for split in known], columns)
    others = [split for split in found if split not in known]
    notices = (f"{path}: the splits {listing(others)} were left out",) if others else ()
    return replace(table, notices=(*notices, *table.notices))


def _library() -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError(
            'a source "hub:…" needs the library `datasets`, which is not installed: pip install "celora[hub]"'
        ) from error


def _sheet(library: ModuleType, path: str, split: str, content: Any, columns: Columns) -> Sheet:
    names = list(content.column_names)
    kept = content.select_columns([one for one in names if one in columns.wanted()])
    image = columns.column("image")
    if image in columns.wanted() and image in names and isinstance(content.features.get(image), library.Image):
        kept = kept.cast_column(image, library.Image(decode=False))  # the files, as any other source has them
    feature = content.features.get(columns.label)
    classes = feature.names if isinstance(feature, library.ClassLabel) else None

    def named(record: Mapping[str, object]) -> Mapping[str, object]:
        number = record.get(columns.label)
        if classes is None or not isinstance(number, int):
            return record
        return {**record, columns.label: classes[number] if number >= 0 else None}

    records = ((number, named(record)) for number, record in enumerate(kept, start=1))
    return Sheet(f"{path}/{split}", names, records, unit="row", split=SPLIT_NAMES[split])
