"""Base of all records: frozen, strict validation, readable JSON, all faulty fields reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from rfmedsam2.arguments import path_of
from rfmedsam2.errors import RecordError, shortlist
from rfmedsam2.system.atomic import read_record, title_of, write_record
from rfmedsam2.system.json_text import JsonError, parse_json

_LATER_FORMAT = "later_format"
"""pydantic's type of the error of a record that a later version has written."""
MAX_DEPTH = 100
"""Most brackets within brackets in a record; ours have fewer than 10."""
OF_A_FILE = "Correct these fields, or create the file again with the command that wrote it"


class OtherKindError(RecordError):
    """The data are a record of another kind."""


class _Construction(type(BaseModel)):
    """Calling a record's class raises our error for faulty arguments, as reading one from a file does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise RecordError(_faults(cls, error), remedy="Correct these arguments") from None


if TYPE_CHECKING:
    _Checked = BaseModel  # type checkers learn the fields of records by its own metaclass alone
else:

    class _Checked(BaseModel, metaclass=_Construction):
        """A BaseModel whose construction raises our errors."""


class Record(_Checked):
    """Frozen, validated content of a file. Unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, data: object, *, where: object = None, remedy: str = OF_A_FILE) -> Self:
        """Validate plain data (from JSON); `remedy` is what to do about faulty fields.

        Raises:
            RecordError: names every faulty field, its value and what is expected.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            cls._require_own_fields(data, errors, where)
            later = next((e.get("ctx", {}) for e in errors if e["type"] == _LATER_FORMAT), None)
            if later is not None:
                raise RecordError(
                    "This was written by a later version of the package",
                    where=where,
                    expected=later["expected"],
                    found=later["found"],
                    remedy="Update the package: pip install --upgrade rfmedsam2",
                ) from None
            raise RecordError(_faults(cls, error), where=where, remedy=remedy) from None

    @classmethod
    def _require_own_fields(cls, data: object, errors: Sequence[Any], where: object) -> None:
        """Check that the data, and a record with a format that is a field of them, are of this kind.

        Raises:
            OtherKindError: most of their fields are none of this kind's.
        """
        if strange := cls._strange_fields(data, errors):
            required = [name for name, field in cls.model_fields.items() if field.is_required()]
            raise OtherKindError(
                f"This is another file than the {title_of(cls)}",
                where=where,
                expected=f"the fields {shortlist(required)}",
                found=f"the fields {shortlist(strange)}",
                remedy="Give the file that is meant",
            ) from None
        if not isinstance(data, dict):
            return
        for name, field in cls.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, VersionedRecord):
                inner = [e | {"loc": e["loc"][1:]} for e in errors if e["loc"][:1] == (name,)]
                kind._require_own_fields(data.get(name), inner, where)

    @classmethod
    def _strange_fields(cls, data: object, errors: Sequence[Any]) -> list[str]:
        """Fields that this kind does not have, if they are most of all: then the data are of another kind.

        Kinds of nnU-Net have fields of which we know nothing: then none that we need may be there, or it is ours.
        """
        if not isinstance(data, dict):
            return []
        strange = [str(e["loc"][0]) for e in errors if e["type"] == "extra_forbidden" and len(e["loc"]) == 1]
        later = any(e["type"] == _LATER_FORMAT for e in errors)  # nothing else was looked at
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        lacks = isinstance(data.get("format"), int) or required <= {e["loc"][0] for e in errors if e["loc"]}
        if later or (required and lacks and cls.model_config.get("extra") != "forbid"):
            strange = [str(name) for name in data if name not in {*cls.model_fields, "format"}]
        return strange if 2 * len(strange) > len(data) > 1 else []

    @classmethod
    def from_json(cls, text: str | bytes, *, where: object = None) -> Self:
        """Parse JSON text; a syntax error is reported with its line.

        Raises:
            RecordError: not JSON, or not a record of this kind; names every faulty field.
        """
        try:
            data = parse_json(text)
            _require_flat(data)
        except JsonError as error:
            raise RecordError(
                f"The {title_of(cls)} is not valid JSON ({error})",
                where=where,
                remedy="Correct the file or create it again",
            ) from None
        return cls.parse(data, where=where)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file.

        Raises:
            RecordError: missing, not JSON, or with faults, of which all are listed.
        """
        return read_record(path_of(path, "path"), cls)

    def save(self, path: str | Path) -> None:
        """Write a readable JSON file, whole or not at all.

        Raises:
            StoreError: the folder cannot be written, the disk is full.
        """
        write_record(path_of(path, "path"), self)

    def to_json(self) -> str:
        """Readable JSON: one field per line, lists of numbers or strings on one line."""
        return dump_json(self.model_dump(mode="json"))


def _faults(cls: type, error: ValidationError) -> str:
    faults = "; ".join(_fault(e) for e in error.errors(include_url=False))
    return f"The {title_of(cls)} has {error.error_count()} fault(s) ({faults})"


Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""Plain data of one format -> plain data of the next; its argument is a copy that it may change."""


def renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A copy with some keys renamed; order and other keys stay, also a key whose new name is taken."""
    return {key if names.get(key) in data else names.get(key, key): value for key, value in data.items()}


class VersionedRecord(Record):
    """A record with a format number, which is raised when a field is renamed or gets another meaning.

    A subclass of format N lists N - 1 upgrades, starting with format 1. Every earlier format can be read, also if the
    record is nested in another (a plan in a checkpoint), and is written back in the newest. Formats later than N are
    rejected: they need a later version of the package. Data without a format are taken for the newest, as those are
    that a person or a program hands in; every file has one.
    """

    upgrades: ClassVar[tuple[Upgrade, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _climb(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        newest = len(cls.upgrades) + 1
        found = data.get("format", newest)
        formats = "format 1" if newest == 1 else f"format 1 to {newest}"
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ValueError(f"expected {formats}, found format {found!r}")
        if found > newest:
            context = {"expected": f"the {title_of(cls)} in {formats}", "found": f"format {found}"}
            raise PydanticCustomError(_LATER_FORMAT, "expected {expected}, found {found}", context)
        for number, upgrade in enumerate(cls.upgrades[found - 1 :], start=found + 1):
            data = upgrade(dict(data)) | {"format": number}
        return data


def dump_json(value: object, indent: int = 0) -> str:
    """JSON text with short lists of scalars (also nested ones) on one line."""
    pad, inner = " " * indent, " " * (indent + 2)
    if isinstance(value, dict) and value:
        body = ",\n".join(f"{inner}{json.dumps(str(k))}: {dump_json(v, indent + 2)}" for k, v in value.items())
        return "{\n" + body + "\n" + pad + "}"
    if isinstance(value, list | tuple) and value and not _flat(value):
        return "[\n" + ",\n".join(inner + dump_json(v, indent + 2) for v in value) + "\n" + pad + "]"
    return json.dumps(value, ensure_ascii=False)


def _require_flat(data: object) -> None:
    """Refuse data that is nested more deeply than records are, which writing them back could not follow."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise JsonError(f"brackets are nested more than {MAX_DEPTH} deep")


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _flat(values: list[Any] | tuple[Any, ...]) -> bool:
    if any(isinstance(v, dict) for v in values):
        return False
    return all(not isinstance(v, list | tuple) or _flat(v) for v in values) and len(json.dumps(values)) <= 110


def _fault(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the whole"
    if error["type"] == "value_error":  # our own sentence says what was found; the input is the whole record
        return f"{place}: {error['ctx']['error']}"
    found = repr(error.get("input"))
    return f"{place}: {error['msg']}, found {found if len(found) < 80 else found[:77] + '...'}"
