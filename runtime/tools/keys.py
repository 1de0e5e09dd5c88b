"""Keys for encrypted sessions: ``python -m runtime.tools.keys new | allow | show``.

A server has one pair and a folder of the public keys that it lets in; a client has one pair and the
server's public key. Certificates are ZMQ's own text files: ``NAME.key`` is public and may travel,
``NAME.key_secret`` stays where it was made, readable by its owner alone.
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
from policies.flags import Flag, add_flags, from_flags
from policies.standard_streams import run_command
from transport.zeromq.curve import OPERATORS, KeyFileError, public_key

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class NewCommand:
    """``new``."""

    dir: Annotated[Path, Flag("where the pair is made", positional=True)]
    name: Annotated[str, Flag("of both files", positional=True)]


@dataclass(frozen=True, slots=True)
class AllowCommand:
    """``allow``."""

    key: Annotated[Path, Flag("NAME.key", positional=True)]
    list: Annotated[Path, Flag("the folder that the server was given", positional=True)]
    operator: Annotated[bool, Flag("may also give orders (runtime.tools.ctl)")] = False


@dataclass(frozen=True, slots=True)
class ShowCommand:
    """``show``."""

    key: Annotated[Path, Flag("NAME.key", positional=True)]


def new_keys(folder: str | Path, name: str) -> tuple[Path, Path]:
    """Make a pair: (public file, secret file with mode 600).

    Raises:
        KeyFileError: A name that cannot be a file's, keys that are there already, or a folder
            that cannot be written.
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
                    f"{path}: it exists; delete it first if nobody needs it any more"
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
    """Put a public key on a server's list, under its file's name; where it lies now.

    Raises:
        KeyFileError: Not a key's file, or another key is listed by that name.
    """
    known = public_key(key)
    folder = Path(listed) / OPERATORS if operator else Path(listed)
    entry = folder / f"{Path(key).stem}.key"
    secret_word = "secret-key"  # noqa: S105  of the format, not a secret
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
    cli = CommandLine(prog="python -m runtime.tools.keys", description="Keys for CURVE.")
    commands = cli.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a pair: DIR/NAME.key and DIR/NAME.key_secret")
    add_flags(new, NewCommand)
    allowing = commands.add_parser("allow", help="put a client's public key on a server's list")
    add_flags(allowing, AllowCommand)
    add_flags(commands.add_parser("show", help="print a public key"), ShowCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if args.command == "new":
            new = from_flags(NewCommand, args)
            public, secret = new_keys(new.dir, new.name)
            print(f"{public}  public: copy it to whoever must know it")
            print(f"{secret}  secret: it stays here")
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
