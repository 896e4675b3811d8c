#!/usr/bin/env bash
# A scale (none < light < severe) can come back from Parquet still marked as ordered, but with
# its steps in another order, so that the worst grade of "severe, none, light" is "light".
#
# Versions: pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6.
# Guess:    use_dictionary=False only changes how the strings are encoded in the file. An
#           ordered categorical column comes back in its order, or not ordered.
# Happens:  Parquet itself knows no categories. With dictionary encoding pyarrow takes the order
#           of the dictionary page, which holds the whole scale. Without it (also where
#           use_dictionary names other columns only), the reader builds the categories from
#           the rows in order of appearance, and the stored Arrow schema still says ordered.
#           Comparison, sort, min and max are wrong without an error, and so the same table
#           gives another answer for every order of its rows. Steps that no row has are gone.
# Seen:     use_dictionary=True       ordered: none < light < severe     worst: severe
#           use_dictionary=False      ordered: severe < none < light     worst: light
#           use_dictionary=['plant']  ordered: severe < none < light     worst: light
#           rows above "light": 1, then 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import pandas as pd

scale = ["none", "light", "severe"]
table = pd.DataFrame(
    {
        "plant": ["a", "b", "c", "d"],
        "mildew": pd.Categorical(["severe", "none", "light", "none"], scale, ordered=True),
    }
)

worst, above_light = [], []
for use_dictionary in (True, False, ["plant"]):
    table.to_parquet("night.parquet", engine="pyarrow", use_dictionary=use_dictionary)
    column = pd.read_parquet("night.parquet", engine="pyarrow")["mildew"]
    assert column.cat.ordered and list(column) == list(table["mildew"])
    worst.append(column.max())
    above_light.append(int((column > "light").sum()))
    order = " < ".join(column.cat.categories)
    print(f"use_dictionary={use_dictionary!s:10} ordered: {order:25} worst: {worst[-1]}")
print(f'rows above "light": {above_light[0]}, then {above_light[1]}')

as_stated = worst == ["severe", "light", "light"] and above_light == [1, 0, 0]
sys.exit(0 if as_stated else "not as stated: the order of categories from Parquet has changed")
PY
