"""Arrays of an HDF5 file, which may be anybody's: nothing outside the file is opened."""

import h5py
import numpy as np
from numpy.typing import NDArray


def item(root: h5py.Group, place: str) -> h5py.Group | h5py.Dataset | None:
    """The group or array at `place` below `root`, not yet read; None: there is none.

    Raises:
        ValueError: it, or a group on the way, is a link, or its values are in another file. HDF5
            would follow them to any file of this machine.
    """
    found: h5py.Group | h5py.Dataset = root
    for name in place.split("/"):
        if not isinstance(found, h5py.Group) or name not in found.keys():  # noqa: SIM118
            return None
        if not isinstance(found.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} of {place} is a link")
        found = found[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise ValueError(f"the values of {place} are in another file")
    return found


def array(root: h5py.Group, place: str, *, limit: int) -> NDArray[np.float32]:
    """The array of float32 at `place` below `root`.

    Args:
        root: a group, or the file.
        place: path in it.
        limit: bytes that the array may have. A file of a kilobyte can declare a terabyte.

    Raises:
        ValueError: as `item`; there is none, or it is larger or of another type.
    """
    found = item(root, place)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"there is no array {place}")
    if found.dtype != np.float32 or found.nbytes > limit:
        raise ValueError(f"{place} is {found.dtype} with {found.nbytes:,} bytes")
    return np.asarray(found[()])
