"""Where the rows come from and who holds them: `load(Data(...), base, seed)` -> `FederatedDataset`.

    files, hub                         a source -> Table (`gather` judges its rows)
    docstrings, instructions, digits   embedded sources -> Table
    partition                          a Table -> the rows of each client
    split                              a client's rows -> its own training, validation and test rows

Bad input is a `DataError`; what is merely odd (an empty client, a client of one class) is a notice.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from celora import fields
from celora.core.reading import IMAGES, PAIRS, TEXTS, Form
from celora.core.reading import Columns as TaskColumns
from celora.data import partition
from celora.data.columns import Columns
from celora.data.digits import read_digits
from celora.data.docstrings import read_docstrings
from celora.data.files import read_files
from celora.data.hub import read_hub
from celora.data.instructions import read_instructions
from celora.data.row_split import split_rows
from celora.data.table import ClientRows, FederatedDataset, Table, counted, did_you_mean, listing
from celora.errors import DataError
from celora.fields import Count, setting, settings

__all__ = ["ClientRows", "Data", "FederatedDataset", "Table", "load", "read"]

EMBEDDED = ("docstrings", "instructions", "digits")


@settings
class Data:
    """The [data] section: a source, how it is dealt to the clients, and how each client splits its rows."""

    source: str = setting(
        "docstrings",
        "'docstrings', 'instructions', 'digits', 'hub:<name>', a path or pattern of .csv, .jsonl, .parquet, .npz or "
        "image files, or a folder of images, <client>/<label>/<name>.png",
    )
    test: str | None = setting(None, "path or pattern of separate test files; none: each client splits its own rows")
    text: str = setting("text", "column of the texts", min_length=1)
    image: str | None = setting(
        None, "column of images (bytes of JPEG or PNG files, or arrays), instead of texts", min_length=1
    )
    columns: Mapping[str, str] | None = setting(
        None, 'columns of what else a task reads, such as {prompt = "question", completion = "answer"}'
    )
    label: str = setting("label", "column of the labels", min_length=1)
    client: str | None = setting(None, "column that names the client of a row (natural partition)", min_length=1)
    split: str | None = setting(None, "column that says train, validation or test of a row", min_length=1)
    partition: Literal["auto", "iid", "dirichlet", "classes", "quantity", "natural"] = setting(
        "auto",
        "how rows are dealt; auto: natural with several files or a client column, else dirichlet (no labels: iid)",
    )
    clients: Count = setting(8, "number of clients; a natural partition has one for each group instead")
    alpha: fields.Positive = setting(0.5, "dirichlet, quantity: concentration; smaller is more skewed", le=1e6)
    classes_per_client: Count = setting(2, "classes: how many labels each client holds")
    clients_per_group: Count = setting(1, "natural: cut each group at random into so many clients")
    rows: Count | None = setting(None, "at most so many training rows for each client; none: all")
    validation: fields.Fraction = setting(0.2, "share of a client's rows for validation, unless the source fixes them")
    test_share: fields.Fraction = setting(0.2, "share of a client's rows for testing, unless the source fixes them")
    max_validation: Count | None = setting(None, "at most so many validation rows for each client; none: all")
    max_test: Count | None = setting(None, "at most so many test rows for each client; none: all")

    def __post_init__(self) -> None:
        if self.validation + self.test_share >= 1:
            raise ValueError(
                f"validation + test_share = {self.validation + self.test_share:g} leaves no row to train on; "
                "expected less than 1"
            )
        if self.source in EMBEDDED or self.source.startswith("hub:"):
            file_only: dict[str, object] = {"test": self.test, "split": self.split}
            if self.source in EMBEDDED:
                file_only |= {"client": self.client, "image": self.image, "columns": self.columns}
            if chosen := [name for name, value in file_only.items() if value is not None]:
                raise ValueError(f"{' and '.join(chosen)} cannot be set with source = {self.source!r}; remove it")
        if self.image is not None and "pair" in (self.columns or {}):
            raise ValueError("image and columns.pair both say what is read of a row; set one of them")
        if self.test is not None and self.split is not None:
            raise ValueError("test and split both say which rows test; set one of them")


class Reading(Protocol):
    """What a task says of the rows it reads (`celora.core.task.Task`)."""

    @property
    def forms(self) -> Sequence[Form]:
        """The forms in which a source may hold them."""

    def strata(self, columns: TaskColumns) -> Sequence[str] | None:
        """What rows are dealt and split by: the stratum of each row; None: nothing."""


class Labelled:
    """Texts or images with labels, by which they are dealt: as a classifier reads them."""

    forms = (PAIRS, TEXTS, IMAGES)

    def strata(self, columns: TaskColumns) -> Sequence[str]:
        """The labels."""
        return columns.labels


def load(data: Data, base: Path, seed: int, task: Reading | None = None) -> FederatedDataset:
    """Read the source, deal its rows to the clients, and split each client's rows.

    Args:
        base: the folder that relative paths start at: the one of the configuration file.
        seed: of every draw; the same data and seed give the same federation on any machine.
        task: whose rows they are; none: rows have labels.

    Raises:
        DataError: saying what was found, what was expected and what to do.
    """
    task = task or Labelled()
    table = read(data, base, task.forms)
    of_rows = task.strata(table)
    drawn: partition.Kind = "iid" if of_rows is None else "dirichlet"
    by_default: partition.Kind = drawn if table.groups is None else "natural"
    kind = by_default if data.partition == "auto" else data.partition
    hands = partition.partition_rows(
        table, kind, strata=of_rows, clients=data.clients, alpha=data.alpha, classes_per_client=data.classes_per_client,
        clients_per_group=data.clients_per_group, seed=seed,
    )  # fmt: skip
    groups = table.empty if kind == "natural" else {}
    return _carved(table, of_rows, hands, data, seed, groups, task)


def alone(data: Data, base: Path, client: str, seed: int, task: Reading | None = None) -> FederatedDataset:
    """One client with all rows of the source: a site. Its splits are those it has where all clients are read at once.

    Raises:
        DataError: as `load`.
    """
    task = task or Labelled()
    table = read(data, base, task.forms)
    splits = table.splits or ["train"] * len(table)
    hand = ClientRows(
        *([row for row, of in enumerate(splits) if of == split] for split in ("train", "validation", "test"))
    )
    return _carved(table, task.strata(table), {client: hand}, data, seed, {}, task)


def _carved(
    table: Table,
    strata: Sequence[str] | None,
    hands: Mapping[str, ClientRows],
    data: Data,
    seed: int,
    empty: Mapping[str, str],
    task: Reading,
) -> FederatedDataset:
    """Each client's own training, validation and test rows."""
    labels = [""] * len(table) if strata is None else strata
    fixed = set(table.splits or ())
    wanted = {
        "validation": 0.0 if "validation" in fixed else data.validation,
        "test": 0.0 if "test" in fixed else data.test_share,
    }
    clients = {
        client: split_rows(
            held, labels, client, validation=wanted["validation"], test=wanted["test"], rows=data.rows,
            max_validation=data.max_validation, max_test=data.max_test, seed=seed,
        )
        for client, held in hands.items() if held.train
    }  # fmt: skip
    excluded = {**{client: "has no training rows" for client, held in hands.items() if not held.train}, **empty}
    expected = [name for name in ("validation", "test") if name in fixed or wanted[name] > 0]
    learned = strata if any(form.labelled for form in task.forms) else None  # elsewhere a label is a group of rows
    return FederatedDataset(
        table=table, clients=clients, excluded=excluded,
        notices=(*table.notices, *(_oddities(learned, clients) if learned else ()), *_without(clients, expected)),
    )  # fmt: skip


def read(data: Data, base: Path, forms: Sequence[Form] = Labelled.forms) -> Table:
    """The table of a source, before it is dealt out.

    Args:
        forms: in which the source may hold the rows.

    Raises:
        DataError: if the source does not exist or cannot be read.
    """
    columns = named(data, forms)
    if data.source == "docstrings":
        return read_docstrings()
    if data.source == "instructions":
        if not any("prompt" in form.roles for form in forms):
            raise DataError(
                "source = 'instructions' holds prompts and completions, which the task does not read: "
                'set task.name = "causal-lm", or take another source'
            )
        return read_instructions()
    if data.source == "digits":
        return read_digits()
    if data.source.startswith("hub:"):
        return read_hub(data.source.removeprefix("hub:"), columns)
    if "." not in data.source and "*" not in data.source and not (base / data.source).exists():
        raise DataError(
            f"found source = {data.source!r}, expected {listing(EMBEDDED)}, 'hub:<name>', or the path of a "
            f".csv, .jsonl, .parquet or .npz file or of a folder of images.{did_you_mean(data.source, EMBEDDED)}"
        )
    return read_files(data.source, base, columns, data.test)


def named(data: Data, forms: Sequence[Form]) -> Columns:
    """The columns that are read of a source.

    Raises:
        DataError: if a role is named that the task does not read.
    """
    of = {"text": data.text, **({"image": data.image} if data.image else {}), **(data.columns or {})}
    known = {role for form in forms for role in form.roles}
    if foreign := [role for role in data.columns or {} if role not in known]:
        raise DataError(f"data.columns names {foreign[0]!r}, which the task does not read; expected {listing(known)}")
    for role, is_named in (("pair", "pair" in (data.columns or {})), ("image", data.image is not None)):
        having = [form for form in forms if role in form.roles]  # pairs and images are read where they are asked for
        if is_named or len(having) == len(forms):
            forms = having or forms
        else:
            forms = [form for form in forms if role not in form.roles]
    return Columns(forms, of, data.label, data.client, data.split)


def _without(clients: Mapping[str, ClientRows], expected: list[str]) -> Iterable[str]:
    """Clients that lack a split."""
    for name in expected:
        without = [client for client, share in clients.items() if not getattr(share, name)]
        if without:
            yield f"{counted(len(without), 'client')} without {name} rows: {listing(without)}"


def _oddities(labels: Sequence[str], clients: Mapping[str, ClientRows]) -> Iterable[str]:
    """What the user should know about the clients' labels before reading their scores."""
    single = [client for client, share in clients.items() if len({labels[row] for row in share.train}) == 1]
    if single:
        yield f"{counted(len(single), 'client')} with training rows of one label only: {listing(single)}"
    trained = {labels[row] for share in clients.values() for row in share.train}
    asked = Counter(labels[row] for share in clients.values() for row in share.validation + share.test)
    lost = sorted(set(asked) - trained)
    if lost:
        yield f"the cap `rows` left no training row of {listing(lost)}, which is still tested; raise `rows`"
    if len(set(labels)) > len(labels) / 2:
        yield (
            f"{len(set(labels)):,} different labels in {len(labels):,} rows: is `label` the right "
            "column? Most labels have a single row"
        )
