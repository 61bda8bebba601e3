"""A command of the project: its settings and meaning, from which its --help comes, and how it ends.

A mistake of the user's is one line on stderr and exit code 2, Ctrl-C one line and exit code 130.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from radial.cli.console import drop_what_cannot_be_written
from radial.cli.ranks import Rank
from radial.cli.reader import guess, read, read_some
from radial.cli.settings import REQUIRED, default_of, described, help_lines, key_of, paragraphs
from radial.errors import Mistake


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: what people type, such as ``python -m data.check``.
        about: what it does; paragraphs have an empty line between them.
        schema: the dataclass of its settings.
        work: does it. It gets the settings, and after them the ``key=value`` words of others, where it takes any;
            what it returns is the exit code, None stands for 0.
        examples: whole command lines.
        positional: the setting that may stand without its name.
        others: what other ``key=value`` words are, such as "keys of a run"; empty: there are none.
        explain: an OSError as a user's mistake in words; None lets it through as the bug that it then is.
        more_help: further lines of --help; given the words after it, if there are any, the lines that explain those.
    """

    name: str
    about: str
    schema: type
    work: Callable[..., int | None]
    examples: Sequence[str] = ()
    positional: str | None = None
    others: str = ""
    explain: Callable[[OSError], str] | None = None
    more_help: Callable[[Sequence[str]], Iterable[str]] | None = None

    def usage(self, words: Sequence[str] = ()) -> str:
        """The text of --help.

        Args:
            words: that stand after it.

        Raises:
            Mistake: `more_help` does not know them.
        """
        if words and self.more_help is not None:
            return "\n".join(self.more_help(words)).rstrip()
        fields, hints = dataclasses.fields(self.schema), get_type_hints(self.schema)
        needed = [key_of(field) for field in fields if default_of(field) is REQUIRED]
        shown = dict.fromkeys([*([self.positional] if self.positional else []), *needed])
        words = [self._in_synopsis(name, name in needed) for name in shown]
        lines = [" ".join([self.name, *words, *["[key=value ...]"] * bool(len(fields) > len(shown) or self.others)])]
        lines += ["", *paragraphs(self.about)]
        for field in fields:
            lines += help_lines(key_of(field), field, hints[field.name])
        if self.others:
            lines += ["", *paragraphs(f"Other keys are {self.others}.")]
        else:
            lines += [""] * bool(fields)
        if fields:
            lines += ["--key value stands for key=value, and --key for key=true.", ""]
        if self.examples:
            lines += ["examples:", *(f"  {example}" for example in self.examples), ""]
        if self.more_help is not None:
            lines += self.more_help(())
        return "\n".join(lines).rstrip()

    def _in_synopsis(self, name: str, needed: bool) -> str:
        word = name.upper() if name == self.positional else f"{name}=VALUE"
        return word if needed else f"[{word}]"

    def __call__(self, words: Sequence[str]) -> int | None:
        """Reads the words and does the work.

        Raises:
            Mistake: what a user can mend.
        """
        if self.others:
            return self.work(*read_some(self.schema, words, self.positional))
        return self.work(read(self.schema, words, self.positional))

    def run(self, words: Sequence[str] | None = None) -> None:
        """As the process's command line: prints --help, ends as this module says.

        Args:
            words: instead of the process's own.
        """
        run(self, self.usage, words, self.explain)


@dataclass(frozen=True)
class Commands:
    """A command of several, such as ``python -m launch plan``.

    Attributes:
        name: what people type before the word that chooses.
        about: what they do.
        find: the word -> what it does in a phrase, and what finds its command, which may take seconds to import.
    """

    name: str
    about: str
    find: Mapping[str, tuple[str, Callable[[], Command]]]

    def usage(self, words: Sequence[str] = ()) -> str:
        """The text of --help, whatever words stand after it."""
        lines = [f"{self.name} COMMAND [key=value ...]", "", *paragraphs(self.about), "commands:"]
        for name, (about, _) in self.find.items():
            lines += described(name, about)
        return "\n".join([*lines, "", f"{self.name} COMMAND --help shows the settings of one"])

    def run(self, words: Sequence[str] | None = None) -> None:
        """Runs the command that the process's command line names."""
        words = sys.argv[1:] if words is None else words
        if words and words[0] in self.find:
            self.find[words[0]][1]().run(words[1:])
        else:
            run(self._refuse, self.usage, words or ["--help"])

    def _refuse(self, words: Sequence[str]) -> None:
        raise Mistake(
            f"{words[0]!r} is not a command of {self.name}, expected one of {', '.join(self.find)}"
            f"{guess(words[0], list(self.find))}"
        )


def run(
    command: Callable[[Sequence[str]], int | None],
    usage: Callable[[Sequence[str]], str],
    words: Sequence[str] | None = None,
    explain: Callable[[OSError], str] | None = None,
) -> None:
    """Runs ``command`` on the words; prints ``usage`` for --help; ends as this module says.

    Output that nobody takes any more ends nothing (`radial.cli.console`). Where several processes of a node meet the
    same mistake, the first one prints it.

    Args:
        words: instead of the process's own.
        explain: see `Command`.
    """
    drop_what_cannot_be_written()
    words = sys.argv[1:] if words is None else words
    at = next((at for at, word in enumerate(words) if word in ("-h", "--help")), None)
    try:
        code = command(words) if at is None else print(usage(words[at + 1 :]))
    except Mistake as error:
        code = _refused(str(error))
    except OSError as error:
        if explain is None:
            raise
        code = _refused(explain(error))
    except KeyboardInterrupt:  # before a run listens for it, or of a command that has nothing to save
        print("\ninterrupted", file=sys.stderr, flush=True)
        code = 130
    if code:
        raise SystemExit(code) from None


def _refused(message: str) -> int:
    if not Rank.here().first_of_node:
        time.sleep(5)  # where the first fails alike, it prints this, and srun or torchrun ends this process
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
