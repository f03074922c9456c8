"""What lies on the disk? Records, the folder of a study, the names in it."""
