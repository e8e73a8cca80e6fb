from .run import measure, tables, targets

__all__ = ["measure", "tables", "targets"]
