"""The number of the kernels' sources, in a clone and in a built library. `setup.py` runs this file too."""

import zlib
from pathlib import Path

# csrc/driver.cpp writes the number after this text, and a point.
_MARK = b"built from the mingru sources "


def number_of_sources(root: Path) -> int:
    """Return a number that changes with the sources in this folder, and with how they are built."""
    paths = sorted([*(root / "csrc").glob("*.h"), *(root / "csrc").glob("*.cpp"), root / "setup.py"])
    return zlib.crc32(b"".join(path.read_bytes() for path in paths))


def number_in(library: Path) -> int | None:
    """Return the number of the sources of a built library, or None if the file is not whole."""
    content = library.read_bytes() if library.is_file() else b""
    # Searched from the end, where it is.
    _, mark, rest = content.rpartition(_MARK)
    number, point, _ = rest.partition(b".")
    return int(number) if mark and point else None
