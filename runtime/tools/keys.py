"""``metronome keys new | allow | show``: make and list the CURVE keys of encrypted sessions.

A server has one key pair and a folder of the public keys of allowed clients; a client has one key
pair and the server's public key. The files are ZMQ's certificates: ``NAME.key`` is public and may
be copied, ``NAME.key_secret`` stays on its machine, readable by its owner only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from zmq import auth

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from policies.standard_streams import run_command
from transport.zeromq.curve import OPERATORS, KeyFileError, public_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class NewCommand:
    """The arguments of ``new``."""

    dir: Annotated[Path, Flag("folder for the two key files", positional=True)]
    name: Annotated[str, Flag("name of both files, without suffix", positional=True)]


@dataclass(frozen=True, slots=True)
class AllowCommand:
    """The arguments of ``allow``."""

    key: Annotated[Path, Flag("public key file, NAME.key", positional=True)]
    list: Annotated[Path, Flag("the server's folder of allowed keys", positional=True)]
    operator: Annotated[bool, Flag("also allow admin commands (metronome ctl)")] = False


@dataclass(frozen=True, slots=True)
class ShowCommand:
    """The arguments of ``show``."""

    key: Annotated[Path, Flag("public key file, NAME.key", positional=True)]


def new_keys(folder: str | Path, name: str) -> tuple[Path, Path]:
    """Make a key pair; return (public file, secret file with mode 600).

    Raises:
        KeyFileError: An invalid name, keys that exist already, or a folder that cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"name: got {name!r}, expected letters, digits, '.', '_' and '-'")
    folder = Path(folder)
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    before = os.umask(0o077)
    try:
        for path in (public, secret):
            if path.exists():
                raise KeyFileError(
                    f"{path}: got a file that exists, expected none; delete it if it is not needed"
                )
        folder.mkdir(parents=True, exist_ok=True)
        auth.create_certificates(folder, name)
        public.chmod(0o644)
    except OSError as error:
        raise KeyFileError(f"{folder}: got {error.strerror}, expected a folder to write") from error
    finally:
        os.umask(before)
    return public, secret


def allow(key: str | Path, listed: str | Path, *, operator: bool = False) -> Path:
    """Copy a public key into a server's folder of allowed keys; return the copy's path.

    Args:
        key: The public key file; the copy keeps its name.
        listed: The server's folder.
        operator: Whether the key may also send admin commands.

    Raises:
        KeyFileError: Not a public key file, or another key is listed under that name.
    """
    known = public_key(key)
    folder = Path(listed) / OPERATORS if operator else Path(listed)
    entry = folder / f"{Path(key).stem}.key"
    secret_word = "secret-key"  # noqa: S105  a word of the file format, not a secret
    try:
        if entry.exists() and public_key(entry) != known:
            raise KeyFileError(f"{entry}: another key has that name; rename one of them")
        if secret_word in Path(key).read_text(encoding="utf-8"):
            raise KeyFileError(f"{key}: got a secret key, expected the public one, {entry.name}")
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(key, entry)
    except OSError as error:
        raise KeyFileError(f"{entry}: got {error.strerror}, expected a file to write") from error
    return entry


def parser() -> argparse.ArgumentParser:
    """Return the parser, with its subcommands."""
    cli = CommandLine(
        prog="metronome keys", description="Make and list the CURVE keys of encrypted sessions."
    )
    commands = cli.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key pair: DIR/NAME.key and DIR/NAME.key_secret")
    add_flags(new, NewCommand)
    allowing = commands.add_parser("allow", help="allow a client's public key on a server")
    add_flags(allowing, AllowCommand)
    add_flags(commands.add_parser("show", help="print a public key"), ShowCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; return the exit status: 0, or 2 for bad input."""
    args = parser().parse_args(argv)
    try:
        if args.command == "new":
            new = from_flags(NewCommand, args)
            public, secret = new_keys(new.dir, new.name)
            print(f"{public}  public: copy it to the other side")
            print(f"{secret}  secret: keep it on this machine")
        elif args.command == "allow":
            entry = from_flags(AllowCommand, args)
            print(f"listed as {allow(entry.key, entry.list, operator=entry.operator)}")
        else:
            print(public_key(from_flags(ShowCommand, args).key).decode())
    except KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
