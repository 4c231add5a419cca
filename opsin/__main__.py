"""`opsin` on the command line, and `python -m opsin`."""

from __future__ import annotations

import sys

from opsin.errors import OpsinError


def main() -> None:
    """Run the command line; errors meant for the user are one line on stderr and an exit code."""
    from opsin.cli import app

    try:
        app()
    except OpsinError as error:
        sys.stderr.write(f"opsin: {error.line()}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
