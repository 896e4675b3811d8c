"""Pictures of both reports for the README: `python -m tests.support.screenshots`."""

import tempfile
from pathlib import Path

from PIL import Image

from leafnet.scoring import report as night_report
from leafnet.training import report as run_report
from tests.conftest import write_data_set
from tests.support import stored
from tests.support.browser import DESKTOP, PHONE, Page, browser

PICTURES = Path(__file__).parents[1] / "pictures"
# Of the night, down to the photographs for review.
_SIZES = {"night-desktop": (DESKTOP[0], 1450), "night-phone": PHONE}
_SIZES |= {"run-desktop": DESKTOP, "run-phone": PHONE}


def main() -> None:
    """Write tests/pictures/REPORT-SIZE.png."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        reports = _reports(Path(folder))
        for name, size in _SIZES.items():
            picture = Page(chromium, reports[name.split("-")[0]], size=size).picture()
            target = PICTURES / f"{name}.png"
            # Few enough colours for a small file.
            picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)
            print(f"{target}   {target.stat().st_size:,} bytes")


def _reports(folder: Path) -> dict[str, Path]:
    out, run = folder / "predictions", folder / "potato"
    for day in range(2, 24):
        count = 118 + 7 * (day * day % 11)
        names = [f"{day}/leaf_{i:04d}.jpg" for i in range(count)]
        night = f"2026-11-{day:02d}"
        stored.write_night(out, night, images="/field", names=names, seed=day, failed=day % 3)
    names = [f"24/leaf_{i:04d}.jpg" for i in range(164)]
    stored.write_night(
        out,
        "2026-11-24",
        images="/field",
        names=names,
        seed=24,
        failed=2,
        placed=True,
        novelty=49.0,
        leaves=90,
        side=256,
    )
    index = write_data_set(str(folder / "shards"), {"train": 12, "valid": 3, "test": 3})
    stored.write_run(run, index)
    return {
        "night": Path(night_report.write(str(out), "2026-11-24")),
        "run": Path(run_report.write(str(run))),
    }


if __name__ == "__main__":
    main()
