"""What regions look like to every backend: their rows, windows and products, read from the IR alone."""
