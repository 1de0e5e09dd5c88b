"""What every evaluation leaves behind: results, plots and videos."""
