"""How a kernel divides its work; see `kernels`."""

import functools
from typing import NamedTuple

from ...cells import NUM_INPUTS

MOST_SEGMENTS = 64


class Work(NamedTuple):
    """What a tiling depends on."""

    cell: str
    itemsize: int
    """Bytes of an element of the sequences."""
    num_sequences: int
    num_steps: int
    num_features: int
    backward: bool = False
    has_reset: bool = False
    is_packed: bool = False
    is_timed: bool = False
    """Whether there are elapsed times or a lower bound of the decay."""
    wave: int = 32
    """Number of threads of a warp, 64 on some AMD GPUs."""
    is_amd: bool = False
    processors: int = 132
    """Number of multiprocessors."""


class Tiling(NamedTuple):
    chunks: int
    """Number of chunks of a tile, C."""
    steps: int
    """Number of steps of a chunk, T."""
    features: int
    """Number of features of a program, F."""
    segments: int
    """Number of segments of time that are computed in parallel."""
    warps: int
    stages: int | None
    """Number of tiles whose inputs are loaded in advance; None if the compiler decides."""


@functools.lru_cache(1024)
def tiling_of(work: Work) -> Tiling:
    """Return the tiling of a kernel. It is the same for all GPUs with as many processors and threads of a warp."""
    itemsize, backward, num_steps, num_features = work.itemsize, work.backward, work.num_steps, work.num_features
    # Values of one step that a warp loads if each thread loads 16 bytes.
    warp = work.wave * 16 // itemsize
    steps = {2: 8, 4: 8, 8: 4}[itemsize] // (2 if backward else 1)
    if work.is_timed:
        # Elapsed times and bounds need more registers, and compile for longer.
        steps //= 2
    # Three numbers of each step and feature are needed for the gradients of these cells, instead of two.
    is_large = backward and work.cell in ("minlstm", "minlstm_unnormalized", "mingru_rotation", "mingru_quaternion")
    if is_large and itemsize == 2:
        # More steps would need more registers than there are.
        steps = 2
    if num_steps <= 2 * steps or (work.num_sequences * num_features >= 1 << 17 and num_features > warp // 2):
        # The smallest power of 2 that is not less.
        features = 1 << (num_features - 1).bit_length()
        return Tiling(1, 1 if num_steps == 1 else steps, min(warp, features), 1, 1, None)
    # 128 bytes of a step if that gives enough programs for all processors of a GPU, otherwise fewer; 32 is a sector.
    sizes = [size // itemsize for size in (128, 64, 32)]
    enough = 1.8 * work.processors
    features = next((size for size in sizes if work.num_sequences * -(-num_features // size) >= enough), sizes[-1])
    programs = work.num_sequences * -(-num_features // features)
    # Loading in advance would need barriers for packed steps, whose addresses are loaded too.
    stages = None if work.is_amd or work.is_packed else 2
    # Segments cannot be combined if |a| > 1, because the product of a segment may overflow.
    if work.cell in NUM_INPUTS and 4 * programs < 3 * work.processors:
        for warps in (1,) if work.is_amd else (8, 4, 2):
            chunks = warps * warp // features
            # Two programs for each processor: rounded up, the last ran alone. A chunk has two tiles.
            segments = min(MOST_SEGMENTS, 2 * work.processors // programs, num_steps // (2 * chunks * steps))
            # A smaller program only helps if it makes more segments.
            if segments == MOST_SEGMENTS or 4 * programs * segments >= 3 * work.processors:
                break
        if segments > 1:
            # A whole number of tiles, so that no segment is empty.
            length = -(-num_steps // (segments * chunks * steps)) * chunks * steps
            return Tiling(chunks, steps, features, -(-num_steps // length), warps, stages)
    if itemsize == 2:
        # Chunks need more registers, because the coefficients of all their steps are kept: 4 values of a step for each
        # thread instead of 8.
        warp //= 2
        steps = 4 if backward else 8
        is_rdna = work.is_amd and work.wave == 32
        steps = steps // 2 if work.is_timed else steps - (is_large and (work.has_reset or is_rdna))
    elif is_large and not work.is_timed:
        steps -= itemsize == 4
    # One warp on AMD GPUs, where scans across warps were wrong in some versions of Triton (ROCm/triton#947).
    warps = 1 if work.is_amd or programs >= 8 * work.processors else 4 if programs >= work.processors else 8
    chunks = warps * warp // features
    # Three sizes, so that sequences of many lengths need few kernels.
    chunks = next((size for size in (8, 32) if size < chunks and size * steps >= num_steps), chunks)
    warps = max(1, chunks * features // warp)
    return Tiling(chunks, steps, features, 1, warps, stages)
