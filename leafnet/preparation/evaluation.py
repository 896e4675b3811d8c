"""Photographs that a model is to be evaluated on, as a data set for as long as that takes."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from leafnet.core import storage
from leafnet.core.settings import RaySettings
from leafnet.preparation.samples import Listing
from leafnet.preparation.settings import PrepareSettings


@contextmanager
def data_set(listing: Listing, *, beside: str | None, ray: RaySettings) -> Iterator[str]:
    """The URL of a data set of the photographs in `listing`, which is gone when the block ends.

    All of them are in test, but for a source with splits of its own; copies stay.

    Args:
        listing: of any source.
        beside: a folder or URL that every machine of a cluster can reach; None: one of this
            machine's own for temporary files.
        ray: where the work is done.

    Raises:
        UserError: no photograph can be read.
    """
    from leafnet.preparation import prepare  # takes seconds, as it needs Ray

    own = f"{storage.absolute(beside)}.data" if beside else tempfile.mkdtemp(prefix="leafnet-")
    out, mark = storage.join(own, "shards"), storage.join(own, ".leafnet-data")
    if beside:
        storage.delete_folder(own, mark=mark)  # of a start that was killed
        storage.write_bytes(mark, b"")
    try:
        settings = PrepareSettings(
            source=listing.source, out=out, split="0/0/100", duplicates="report", ray=ray
        )
        prepare.run(settings, listing, say_next=False)
        yield out
    finally:
        if beside:
            storage.delete_folder(own, mark=mark)
        else:
            shutil.rmtree(own, ignore_errors=True)
