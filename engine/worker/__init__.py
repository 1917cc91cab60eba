"""Between the scheduler's plain data and the program's flat arrays."""
