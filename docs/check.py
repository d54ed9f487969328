"""Checks the built site: every local link has its target, every public name has its place.

Run: ``python docs/check.py docs/_build/html``; it prints what is wrong and exits with 1.
"""

import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import meanfield_jax


class Page(HTMLParser):
    """The targets that a page has, and the links that it makes."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects ids, hrefs and sources."""
        named = dict(attrs)
        if found := named.get("id"):
            self.targets.add(found)
        if found := named.get("href" if tag in ("a", "link") else "src"):
            self.links.append(found)


def dead_links(site: Path) -> list[str]:
    """The local links without a target."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].targets
            ):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found


def missing_names(site: Path) -> list[str]:
    """The public names that the reference does not describe."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = [f"meanfield_jax.{name}" for name in meanfield_jax.__all__]
    return [name for name in names if name not in described]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    wrong = [f"dead link in {link}" for link in dead_links(folder)]
    wrong += [f"not in the reference: {name}" for name in missing_names(folder)]
    print("\n".join(wrong) or f"{len(list(folder.rglob('*.html')))} pages, no dead link")
    sys.exit(bool(wrong))
