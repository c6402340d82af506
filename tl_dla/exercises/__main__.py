"""`python -m tl_dla.exercises FOLDER --out scores.csv` grades a folder of notebooks."""

import argparse
import csv
import sys
from pathlib import Path

from tl_dla.exercises.grading import grade


def main(argv: list[str] | None = None) -> int:
    """Grade every notebook in a folder, and write a CSV with a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_dla.exercises",
        description="Grade a folder of exercise notebooks. Each is run from the top, in a process"
        " of its own: run only notebooks whose code you would run, or run this in a container.",
    )
    parser.add_argument("folder", type=Path, help="the folder with the .ipynb files")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"), help="the CSV to write")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one cell")
    options = parser.parse_args(argv)
    notebooks = sorted(options.folder.glob("*.ipynb"))
    if not notebooks:
        parser.error(f"there is no .ipynb file in {options.folder}")
    grades = []
    for path in notebooks:
        one = grade(path, timeout=options.timeout)
        print(f"{path.name}: {one['points']} of {one['of']}", file=sys.stderr)
        grades.append(one)
    _write(grades, options.out)
    print(options.out)
    return 0


def _write(grades: list[dict[str, object]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(grades[0]))
        writer.writeheader()
        writer.writerows(grades)


if __name__ == "__main__":
    sys.exit(main())
