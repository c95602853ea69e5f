"""``python -m fusedstep info | selftest | demo | bench``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import fusedstep

# name: (module with add_arguments(parser) and main(args) -> exit code, what it does)
COMMANDS = {
    "info": ("fusedstep.commands.info", "print what is installed and what a step would run on"),
    "selftest": ("fusedstep.commands.selftest", "check every kernel on this machine"),
    "demo": ("fusedstep.commands.demo", "learn handwritten digits and draw the loss curves"),
    "bench": ("fusedstep.bench", "measure speed against this machine's memory bandwidth"),
}
# Those of the extra named after the command.
OPTIONAL_PACKAGES = {"matplotlib", "rich", "sklearn", "threadpoolctl"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedstep",
        description="Fused optimizer steps for NumPy and CuPy arrays.",
        epilog="commands:\n" + "\n".join(f"  {n:<10}{text}" for n, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fusedstep {fusedstep.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; try --help")
    args = parser.parse_args(argv)
    try:
        fusedstep.get_isa(), fusedstep.get_num_threads()
    except ValueError as error:  # an environment variable that cannot be understood
        parser.error(str(error))

    # Only the command asked for is imported: one that lacks a package does not stop the others.
    program = f"{parser.prog} {args.command}"
    try:
        command = import_module(COMMANDS[args.command][0])
        command_parser = argparse.ArgumentParser(
            prog=program,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(command_parser)
        return command.main(command_parser.parse_args(args.arguments)) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL_PACKAGES:
            raise
        print(
            f"`{program}` needs the package {package!r}, which is not installed; "
            f"get all that it needs with: pip install 'fusedstep[{args.command}]'",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
