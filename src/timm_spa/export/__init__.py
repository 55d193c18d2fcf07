"""Export to other runtimes, each file compared with PyTorch. Not imported by `import timm_spa`."""
from .exporter import ExportError, ExportReport, export

__all__ = ['ExportError', 'ExportReport', 'export']
