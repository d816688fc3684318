"""What a user reads: errors raised on purpose, reasons of failed system calls, and output on the terminal."""
