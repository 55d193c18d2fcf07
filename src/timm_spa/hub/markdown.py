"""Formatting of text for Markdown cards."""
import re
from typing import Any, List, Optional

__all__ = ['link', 'numbers', 'paragraphs', 'plain', 'wrapped']


def paragraphs(*texts: Optional[str]) -> str:
    """Joins the given texts with an empty line between them; leaves out empty texts."""
    return '\n\n'.join(text.strip() for text in texts if text)


def plain(text: str) -> str:
    """Returns text as one line that a page or a table shows without interpreting it as markup."""
    text = ' '.join(text.split()).replace('```', '').replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    return text.replace('|', '\\|')


def numbers(values: Any) -> str:
    """Returns numbers in parentheses, without trailing zeros."""
    return '(' + ', '.join(f'{v:g}' for v in values) + ')'


def link(paper: str) -> str:
    """Returns the address of a paper given as 'doi:...' or 'arXiv:...'; any other text unchanged."""
    kind, _, number = paper.partition(':')
    return {'doi': f'https://doi.org/{number}', 'arxiv': f'https://arxiv.org/abs/{number}'}.get(kind.lower(), paper)


def wrapped(command: str, width: int = 110) -> str:
    """Breaks a command between its words, but never inside quotes or between an option and its values."""
    pieces: List[str] = []
    command = ' '.join(command.replace('```', '').replace('\\\n', ' ').split('\n'))  # ``` would end the code block
    if any(command.count(quote) % 2 for quote in '\'"'):
        return command.strip()  # a single apostrophe: the words cannot be told apart safely
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
