"""Text of a card as Markdown."""
import re
from typing import Any, List, Optional

__all__ = ['link', 'listed', 'numbers', 'paragraphs', 'plain', 'wrapped']


def paragraphs(*texts: Optional[str]) -> str:
    """Joins texts, those that there are, with an empty line between them."""
    return '\n\n'.join(text.strip() for text in texts if text)


def plain(text: str) -> str:
    """Escapes a line of text, so that nothing in it is markup of a page or a table."""
    text = ' '.join(text.split()).replace('```', '').replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    return text.replace('|', '\\|')


def listed(value: Optional[str]) -> List[str]:
    """Returns a list of the one text, empty if there is none."""
    return [value] if value else []


def numbers(values: Any) -> str:
    """Returns numbers in brackets, without needless digits."""
    return '(' + ', '.join(f'{v:g}' for v in values) + ')'


def link(paper: str) -> str:
    """Returns the address of a paper, 'doi:...' or 'arXiv:...'; any other text as it is."""
    kind, _, number = paper.partition(':')
    return {'doi': f'https://doi.org/{number}', 'arxiv': f'https://arxiv.org/abs/{number}'}.get(kind.lower(), paper)


def wrapped(command: str, width: int = 110) -> str:
    """Breaks a command between its words, never inside quotes or between an option and its values."""
    pieces: List[str] = []
    command = ' '.join(command.replace('```', '').replace('\\\n', ' ').split('\n'))  # the first would end its block
    if any(command.count(quote) % 2 for quote in '\'"'):
        return command.strip()  # an apostrophe, say: not to be taken apart
    for word in re.findall(r'''(?:[^\s'"]|'[^']*'|"[^"]*")+''', command):
        if pieces and pieces[-1].startswith('-') and not word.startswith('-'):
            pieces[-1] += f' {word}'
        else:
            pieces.append(word)
    lines = ['']
    for piece in pieces:
        if lines[-1].strip() and len(lines[-1]) + len(piece) > width:
            lines.append('   ')
        lines[-1] += f' {piece}' if lines[-1] else piece
    return ' \\\n'.join(lines)
