"""Passwords and tokens in addresses: used where data is fetched, and kept out of everything that is printed or stored.

    argv = hide(argv)                   # https://me:password@host/set?token=abc -> https://host/set
    reveal("https://host/set/x.tar")    # https://me:password@host/set/x.tar?token=abc
    redact("can't read https://me:password@host/set?token=abc")

Secrets of http(s) are `user:password@` (the user may be a token) and the whole query, where signed links have theirs; of any
other scheme the password. What `hide` takes out is kept in the environment variable SECRETS of this process and those that it
starts, which a user may also set: addresses with their secrets, separated by spaces, each for itself and all below it. ~/.netrc
has passwords for http(s).
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SECRETS = "VFI_SECRET_URLS"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
# a password ends at the last @ before the first slash or, if a slash in it was not quoted, at the last @ of all
_PARTS = re.compile(
    r"(?P<scheme>[^:]+)://(?:(?P<user>[^/?#:@]*)(?::(?P<password>[^/?#]*|(?!\d+[/?#]).*))?@)?"
    r"(?P<host>[^/?#]*)(?P<path>[^?#]*)(?P<query>.*)",
    re.DOTALL,
)
HOW_TO_SIGN_IN = f"give https://USER:PASSWORD@…, or the same in {SECRETS}, or a line in ~/.netrc"


class CredentialsError(ValueError):
    """Raised for secrets in a place where they would be stored, and for a ~/.netrc that can't be used."""


class Address(NamedTuple):
    """Parts of an address, as they are written in it; `password` and `query` are empty in a public one."""

    scheme: str
    user: str
    password: str
    host: str
    path: str
    query: str

    def __str__(self) -> str:
        password = f":{self.password}" if self.password else ""
        sign_in = f"{self.user}{password}@" if self.user or password else ""
        return f"{self.scheme}://{sign_in}{self.host}{self.path}{self.query}"

    @property
    def public(self) -> Address:
        """The address without its secrets."""
        is_http = self.scheme.lower() in ("http", "https")
        return self._replace(password="", **dict.fromkeys(("user", "query"), "") if is_http else {})


def parse(url: str) -> Address:
    """Return the parts of an address that has a scheme."""
    found = _PARTS.fullmatch(url)
    assert found is not None, "an address without a scheme"
    return Address(**{name: text or "" for name, text in found.groupdict().items()})


def redact(text: str) -> str:
    """Return a text with all addresses in it without their secrets."""
    return _URL.sub(lambda found: str(parse(found[0]).public), text) if "://" in text else text


def redact_all(content: Any) -> Any:
    """Return the content of a JSON file with `redact` applied to each string in it."""
    if isinstance(content, dict):
        return {name: redact_all(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_all(value) for value in content]
    return redact(content) if isinstance(content, str) else content


def hide(words: Sequence[str]) -> list[str]:
    """Return arguments of a command with the secrets of addresses taken out, which `reveal` still knows."""
    for word in words:
        if redact(word) != word:
            secrets = (found[0] for found in _URL.finditer(word))
            os.environ[SECRETS] = " ".join((*os.environ.get(SECRETS, "").split(), *secrets))
    return [redact(word) for word in words]


def refuse_secrets(words: Sequence[str], why: str) -> None:
    """Raise CredentialsError when an argument holds a secret of an address."""
    for word in words:
        if redact(word) != word:
            raise CredentialsError(
                f"{redact(word)!r} was given with a password or token, {why}: leave it out, and export {SECRETS} with the "
                f"whole address, or give the host a line in ~/.netrc"
            )


def reveal(url: str) -> str:
    """Return an address with the secrets that are known for it: the last and longest address that it lies at or below."""
    address = parse(url)
    if address != address.public:
        return url
    best = None
    for known in map(parse, filter(_URL.fullmatch, os.environ.get(SECRETS, "").split())):
        top = known.path.rstrip("/")
        is_below = address.path == known.path or address.path.startswith(f"{top}/") or address.path == top
        same = (known.scheme, known.host) == (address.scheme, address.host) and address.user in ("", known.user)
        if same and is_below and (best is None or len(known.path) >= len(best.path)):
            best = known
    return str(address._replace(user=best.user, password=best.password, query=best.query)) if best else url


def password_from_netrc(address: Address) -> tuple[str, str] | None:
    """Return the user and password that ~/.netrc (or the file of the variable NETRC) has for a host; None without them.

    Raises CredentialsError for a file that can't be used; its own message could hold a password.
    """
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    if not path.is_file():
        return None
    try:
        found = netrc.netrc(str(path)).hosts.get(address.host.rpartition(":")[0] or address.host)
    except netrc.NetrcParseError as error:
        raise CredentialsError(f"{path} can't be used: line {error.lineno} is malformed") from None
    except OSError as error:
        raise CredentialsError(f"{path} can't be read: {error.strerror}") from error
    return (found[0], found[2] or "") if found and address.user in ("", found[0]) else None
