"""Fails if a built page has a link to a file or an anchor that does not exist: `python docs/dead_links.py build/docs`.

Links to other sites are not opened. A page without MathJax's files would need the network: this is checked, too.
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import List, Optional, Set, Tuple
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links and anchors of an HTML page, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: Set[str] = set()
        self.links: List[str] = []
        self.loaded: List[str] = []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        """Collects the attributes of a tag."""
        values = {key: value for key, value in attrs if value}
        self.anchors.update(values[key] for key in ('id', 'name') if key in values)
        links = [values[key] for key in ('href', 'src') if key in values]
        self.links += links
        if tag in ('script', 'img', 'iframe') or tag == 'link' and values.get('rel') == 'stylesheet':
            self.loaded += links


def dead_links(folder: Path) -> List[Tuple[str, str]]:
    """Returns the links of pages in a folder to missing files or anchors, and scripts and images of other sites."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob('*.html'))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.loaded and url.scheme != 'data':
                    dead.append((path.name, link))
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            if not target.is_file() or anchor and target in pages and anchor not in pages[target].anchors:
                dead.append((path.name, link))
    return dead


def main() -> int:
    """Prints the dead links of the folder that is named by the first argument."""
    dead = dead_links(Path(sys.argv[1]))
    for page, link in dead:
        print(f'{page}: {link} does not exist, or is loaded from another site', file=sys.stderr)
    return 1 if dead else 0


if __name__ == '__main__':
    sys.exit(main())
