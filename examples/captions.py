"""Captions of PACS for `caption.toml`: "a pencil sketch of a dog.", said by a picture's domain and label.

    python examples/captions.py path/to/pacs96/all.parquet examples

writes captions.parquet, with columns image, completion, label and domain, in an order drawn from a fixed seed.
"""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STYLES = {
    "photo": "a photo of",
    "art_painting": "a painting of",
    "cartoon": "a cartoon of",
    "sketch": "a pencil sketch of",
}


def caption(domain: str, label: str) -> str:
    """What is said of a picture."""
    return f"{STYLES[domain]} {'an' if label[0] in 'aeiou' else 'a'} {label}."


def write(source: Path, folder: Path) -> Path:
    """Write captions.parquet into a folder; gives its path."""
    rows = pq.read_table(source, columns=["image", "label_text", "domain"]).to_pylist()
    random.Random(0).shuffle(rows)
    found = [
        {
            "image": row["image"],
            "completion": caption(row["domain"], row["label_text"]),
            "label": row["label_text"],
            "domain": row["domain"],
        }
        for row in rows
    ]
    path = folder / "captions.parquet"
    pq.write_table(pa.Table.from_pylist(found), path)
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), Path(sys.argv[2])))
