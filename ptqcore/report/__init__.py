"""What a run cost and what it kept: the record of a run, and its report as one HTML page."""

from ptqcore.report.page import render

__all__ = ["render"]
