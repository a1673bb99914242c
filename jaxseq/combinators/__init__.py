"""What makes cells of cells."""
