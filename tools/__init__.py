"""Programs for the work on this repository; they are not part of the wheel."""
