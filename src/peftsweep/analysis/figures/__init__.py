"""What was found, in pictures: plots and report.html."""
