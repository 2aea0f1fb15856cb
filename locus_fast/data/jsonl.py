"""JSON lines of {"image": name, "bbox": four numbers}."""

from __future__ import annotations

import json

from locus_fast.data.rows import Rows, utf8
from locus_fast.errors import UserError

_LINE = '{"image": name, "bbox": [x1, y1, x2, y2]}'


def read_jsonl(rows: Rows) -> None:
    """Take every line of `rows.source` into `rows`; raises UserError for a line that is something else."""
    with rows.source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{rows.source} line {number}"
            text = utf8(line, where).rstrip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                known = isinstance(error, json.JSONDecodeError)
                reason = f"{error.msg}, column {error.colno}" if known else error  # type: ignore[union-attr]
                raise UserError(f"{where} is not JSON ({reason}): each line is {_LINE}") from None
            name = record.get("image") if isinstance(record, dict) else None
            if not isinstance(name, str) or not name or "bbox" not in record:
                raise UserError(f'{where} lacks "image" or "bbox": each line is {_LINE}')
            rows.add(rows.image(name, (0, 0)), record["bbox"], number)
    if not rows.names:
        raise UserError(f"{rows.source} is empty: each line is {_LINE}")
