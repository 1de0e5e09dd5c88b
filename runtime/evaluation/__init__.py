"""Output of the evaluations: result files, plots and videos."""
