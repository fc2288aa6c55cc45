"""A tracking URI as people may see it, without credentials. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

#: stands for an address in which credentials cannot be told from the rest
UNREADABLE = "..."
#: Shorter secrets are not searched for in texts: replacing every "a" helps nobody.
SECRET_CHARS_MIN = 4


def redact_uri(uri: str) -> str:
    """Return the URI without user, password, query and fragment.

    What cannot be taken apart safely (a password with an unescaped slash in it, say) is left out
    as a whole: `scheme://...`.
    """
    bare = uri.partition("#")[0].partition("?")[0]
    scheme, separator, rest = bare.partition("://")
    if not separator:
        return bare  # a path, or a bare word such as "databricks"
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    after_authority = uri[len(scheme) + len(separator) + len(authority) :]
    if not _is_host(host) or (authority and "@" in after_authority):
        return f"{scheme}://{UNREADABLE}"
    return f"{scheme}://{host}{slash}{path}"


def uri_secrets(uri: str) -> tuple[str, ...]:
    """Return what of a URI must not be shown: its password, as written and decoded, its query."""
    try:
        parts = urlsplit(uri)
        password = parts.password or ""
    except ValueError:
        return (uri,)
    return tuple(filter(None, (password, unquote(password), parts.query)))


def scrub(text: str, secrets: Iterable[str]) -> str:
    """Return the text with every secret in it replaced by "***"."""
    for secret in secrets:
        if len(secret) >= SECRET_CHARS_MIN:
            text = text.replace(secret, "***")
    return text


def _is_host(text: str) -> bool:
    """Tell whether this is `host`, `host:port` or nothing, and not the front half of a password."""
    try:
        _ = urlsplit(f"//{text}").port
    except ValueError:
        return False
    return True
