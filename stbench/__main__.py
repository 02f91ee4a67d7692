"""`python -m stbench` is the `stbench` command."""

from stbench.cli.app import main

if __name__ == "__main__":
    main()
