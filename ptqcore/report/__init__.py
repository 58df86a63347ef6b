"""The report: what a run cost, as one self-contained HTML page."""
