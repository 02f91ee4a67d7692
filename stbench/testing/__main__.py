"""`python -m stbench.testing golden DIR`: compare stbench with the golden files in a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stbench.core.errors import UserError
from stbench.testing.golden.run import run


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns exit code 0 if all checks pass, 1 if one fails, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m stbench.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    golden = commands.add_parser("golden", help="compare stbench with golden files")
    golden.add_argument("folder", type=Path, metavar="DIR", help="folder of NAME.safetensors and NAME.json")
    try:
        return run(parser.parse_args(argv).folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
