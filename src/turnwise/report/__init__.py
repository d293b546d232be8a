"""What a run learned: the paper's table, curves, and the credit of every turn on the actual text.

Reads run directories only; no model and no torch.
"""

from turnwise.report.data import Run, load_run
from turnwise.report.page import write_report
from turnwise.report.tables import markdown_table, paper_table, print_table, table_notes

__all__ = [
    "Run",
    "load_run",
    "markdown_table",
    "paper_table",
    "print_table",
    "table_notes",
    "write_report",
]
