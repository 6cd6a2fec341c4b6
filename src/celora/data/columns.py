"""Which columns are read of a source, and what a source is before its rows are judged."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from celora.core.reading import Form
from celora.data.table import SPLITS

SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True)
class Columns:
    """What is read of a source, and the names of the columns that hold it.

    Attributes:
        forms: the task's; the first whose columns a source has is read.
        of: role -> its column; a role that is not named here is its own column's name.
        label, client, split: columns; `client` and `split` are optional.
    """

    forms: Sequence[Form]
    of: Mapping[str, str]
    label: str
    client: str | None = None
    split: str | None = None

    def column(self, role: str) -> str:
        """The column of a role."""
        return self.of.get(role, role)

    @property
    def image(self) -> str | None:
        """The column of images; None where no image is read."""
        return self.column("image") if any("image" in form.roles for form in self.forms) else None

    def setting(self, role: str) -> str:
        """The setting in [data] that names a role's column."""
        return role if role in ("text", "image") else f"columns.{role}"

    def settings(self) -> dict[str, str]:
        """The columns that must exist, as the first form has them -> the setting that chose them."""
        form = self.forms[0]
        chosen = {self.column(role): self.setting(role) for role in form.roles if role not in form.optional}
        if form.labelled:
            chosen.setdefault(self.label, "label")
        named = {"client": self.client, "split": self.split}
        return {**chosen, **{name: setting for setting, name in named.items() if name}}

    def names(self) -> list[str]:
        """The columns that must exist."""
        return list(self.settings())

    def wanted(self) -> set[str]:
        """All columns that may be read, whatever form a source has."""
        roles = {self.column(role) for form in self.forms for role in form.roles}
        return roles | {name for name in (self.label, self.client, self.split) if name}

    def within(self, names: Collection[str]) -> "Columns":
        """As a source with these columns has them: with the first form that fits, or the one that fits best."""

        def share(form: Form) -> float:
            needed = [self.column(role) for role in form.roles if role not in form.optional]
            return sum(column in names for column in needed) / len(needed)

        return replace(self, forms=[max(self.forms, key=share)])  # the first of those that fit alike


@dataclass(frozen=True)
class Sheet:
    """One file, or one split of a Hub data set, as it was found."""

    name: str
    columns: Collection[str]
    """Their names; where each record has its own (JSON Lines), those of the records that were read so far."""
    records: Iterable[tuple[int, Mapping[str, object]]]
    """(line or row number, values), read as they are asked for; a missing column or None is a missing value."""
    unit: str = "line"
    group: str | None = None
    """The client this sheet belongs to, if there is one sheet for each client."""
    split: str | None = None
    """The split this sheet is, if its source fixes it."""
