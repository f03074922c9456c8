"""From the records of a study to its answer: tables, statistics, figures, reports. Nothing in here imports torch."""
