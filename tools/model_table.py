"""Write docs/models.md: every model family that transformers ships for text, built small and tried.

With names of families it tries those and prints their rows.
"""

import argparse
import os
import sys
import time

from modeltable.families import causal_families, multimodal_families
from modeltable.measure import Row, rows
from modeltable.page import PAGE, lines, page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; none: all of them, into docs/models.md")
    names = parser.parse_args().families
    os.nice(10)
    causal, multimodal = causal_families(), multimodal_families()
    unknown = sorted(set(names) - {*causal, *multimodal})
    if unknown:
        print(f"not a model type of transformers' causal or multimodal models: {', '.join(unknown)}", file=sys.stderr)
        return 2
    if names:
        print(lines(rows(names)))
        return 0
    start = time.perf_counter()
    found: dict[str, Row] = {}
    for row in rows([*causal, *multimodal]):
        found[row.family] = row
        print(f"{row.family}: {row.way or row.error or row.unbuilt}"[:110], flush=True)
    PAGE.write_text(page([found[f] for f in causal], [found[f] for f in multimodal]), encoding="utf-8")
    print(f"{len(found)} families in {time.perf_counter() - start:.0f} s -> {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
