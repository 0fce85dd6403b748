"""An array in a file that is filled from its beginning, so that an interrupted run goes on where it stopped."""

import json
from pathlib import Path

import numpy as np

from loragen_agents.support.files import replacing


class KeptArray:
    """A float16 array mapped from `folder/NAME.npy`; `folder/NAME.json` holds its digest and how much is done.

    Args:
        folder: where both files are kept.
        name: of the files.
        shape: of the array.
        digest: of all that the content depends on; an array with another digest is begun anew.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], digest: str) -> None:
        self._note, self._digest = folder / f"{name}.json", digest
        path = folder / f"{name}.npy"
        self.done = 0
        if path.is_file() and self._note.is_file():
            kept = json.loads(self._note.read_text(encoding="utf-8"))
            self.done = int(kept["done"]) if kept["texts"] == digest else 0
        self.array = np.lib.format.open_memmap(path, "r+" if self.done else "w+", np.float16, shape)

    def keep(self, done: int) -> None:
        """Say that what comes before `done` is written."""
        self.array.flush()
        self.done = done
        with replacing(self._note) as temporary:
            temporary.write_text(json.dumps({"texts": self._digest, "done": done}), encoding="utf-8")
