"""C4 from the hub by the published draw, without a copy of the shard on disk.

The draw takes documents of the shard at random until one is longer than the window, so it can ask for any of 356,317.
Which ones it may ask for is nevertheless known before the first is read: each random number is made of the next word of
the generator, so that a document's number can only be the top bits of one of its first words. One pass over the stream
keeps the documents of those numbers, and the draw then runs on them.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

# One shard of each split, as the released loaders take. The plain json loader: naming the files on ("allenai/c4", "en")
# fails on datasets 4.0 to 5.0.1.
FILES = {
    "train": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
    "validation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
}
TRAIN_DOCUMENTS = 356317
EVALUATION_DOCUMENTS = 1100
EVALUATION_WINDOWS = 256

# Words of the generator whose documents are kept: some 22,000, enough for 128 windows where one document in 150 is longer.
WORDS = 1 << 15


def candidates(seed: int, documents: int, words: int) -> set[int]:
    """The numbers 0 <= i < documents that a draw from random.Random(seed) can give while it uses at most `words` words.

    True of any draw by randint over less than 2^32 values, whatever lies between: each try takes the top bits of one word.
    """
    rng = random.Random(seed)
    bits = documents.bit_length()
    return {number for _ in range(words) if (number := rng.getrandbits(bits)) < documents}


class Kept(Sequence[str]):
    """A shard of which some documents were kept: its length is the shard's, and any other document is a KeyError."""

    def __init__(self, documents: dict[int, str], length: int) -> None:
        self._documents, self._length = documents, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        return self._documents[number]


def train_candidates(seed: int) -> Kept:
    """The training shard, with the documents that a draw of this seed may ask for first.

    `datasets` stores them (50 MB), so that the next run with this seed reads nothing from the hub.
    """
    import datasets

    given = {"file": FILES["train"], "seed": seed, "documents": TRAIN_DOCUMENTS, "words": WORDS}
    kept = datasets.Dataset.from_generator(_wanted, gen_kwargs=given)
    return Kept(dict(zip(kept["number"], kept["text"], strict=True)), TRAIN_DOCUMENTS)


def _wanted(file: str, seed: int, documents: int, words: int) -> Iterator[dict[str, Any]]:
    import datasets

    wanted, number = candidates(seed, documents, words), -1
    stream = datasets.load_dataset("json", data_files={"train": file}, split="train", streaming=True)
    for number, row in enumerate(stream.select_columns("text")):
        if number in wanted:
            yield {"number": number, "text": row["text"]}
    if number + 1 != documents:
        raise ValueError(f"it has {number + 1} documents instead of {documents}")


def evaluation_documents() -> list[str]:
    """The first documents of the validation shard; no more than these are fetched."""
    import datasets

    stream = datasets.load_dataset("json", data_files={"train": FILES["validation"]}, split="train", streaming=True)
    return [row["text"] for row in islice(stream, EVALUATION_DOCUMENTS)]
