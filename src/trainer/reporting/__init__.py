"""The parts of a report: runs are read, measured, put into words, tables and plots. ``report`` writes them."""
