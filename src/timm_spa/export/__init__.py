"""Export of models to other runtimes. Each exported file is compared with PyTorch."""
from .exporter import ExportReport, export
from .format import ExportError

__all__ = ['ExportError', 'ExportReport', 'export']
